"""Measure models on a benchmark of image retrieval or copy detection.

    timm-multigrain evaluate multigrain_resnet50 --benchmark roxford5k --data DIR --download --size 1024 \
        --p 3 --whiten IMAGES --json results.json
    timm-multigrain evaluate resnet50 --benchmark ukbench --data DIR --pool gem mac spoc rmac crow --p 1 3 4
    timm-multigrain evaluate my-model --benchmark folder --data my-images
    timm-multigrain evaluate my-model --benchmark list --data my-images --ground-truth list.csv

Several models, poolings, exponents and sizes make one table; each trunk runs once for all its poolings. --whiten adds
each system whitened. The JSON file is what `timm-multigrain publish --metrics` takes.
"""
import argparse
import os
import shlex
import sys

from . import arguments

_BENCHMARKS = (
    'folder', 'list', 'cub200', 'cars196', 'sop', 'inshop', 'consumer2shop', 'street2shop', 'instre', 'gldv2', 'ilias',
    'oxford5k', 'paris6k', 'grocery', 'holidays', 'ukbench', 'copydays', 'roxford5k', 'rparis6k', 'disc21')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', nargs='+', metavar='MODEL', help=arguments.MODEL)
    add = parser.add_argument_group('benchmark').add_argument
    add('--benchmark', required=True, choices=_BENCHMARKS, metavar='NAME',
        help=f'{", ".join(_BENCHMARKS)}; folder and list: your own images')
    add('--data', required=True, metavar='DIR', help='its folder, as it is published')
    add('--download', action='store_true', help='download what is missing, or say where to get it')
    add('--subset', action='store_true', help='take the images that are there, and cut the ground truth down to them; '
                                                'the figures say how many')
    add('--ground-truth', metavar='FILE', help='another ground truth: .csv or .jsonl (list), .json of path: group '
                                               '(folder), .pkl or .json (roxford5k, rparis6k), .csv (disc21)')
    add('--upright', metavar='FILE', help='holidays: list of clockwise turns, a name and degrees per line, or JSON')
    add('--queries', metavar='FILE', help='disc21: list of the queries, a name per line')
    add('--distractors', metavar='IMAGES', help='more images for the database: folder or list')
    add('--download-distractors', action='store_true',
        help='roxford5k, rparis6k: download R1M, a million images, into the folder of --distractors')
    group = parser.add_argument_group('what to measure')
    add = group.add_argument
    add('--pool', nargs='+', default=[], metavar='NAME',
        help="poolings: gem, mac, spoc, rmac, crow, avg, cls, cls+gem, map, trunk (default: the model's own)")
    add('--p', nargs='+', type=float, default=[], metavar='P', help='exponents of gem and cls+gem')
    add('--whiten', metavar='IMAGES', help='add each system with a whitening fitted on these images, at the same size '
                                           'and p: folder or list, none of the benchmark')
    add('--nmi', action='store_true', help='also cluster the queries (k-means, slow for many labels): NMI')
    add('--dim', type=int, metavar='N', help='components of the whitening (default: all)')
    arguments.add(group, '--no-pretrained', '--no-ema')
    arguments.add_protocol(parser, sizes=True)
    add = parser.add_argument_group('after the first ranking').add_argument
    arguments.add_refinements(add)
    add('--score-norm', nargs='?', const=True, metavar='IMAGES',
        help='copy detection: also with scores normalised by these images (disc21: by its training images)')
    arguments.add_extraction(parser)
    group = parser.add_argument_group('output')
    arguments.add(group, '--work-dir')
    group.add_argument('--json', type=arguments.output_file, metavar='FILE', help='write the figures to FILE')


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.measure.benchmarks import download_benchmark, load_benchmark
    from timm_multigrain.measure.evaluate import evaluate
    from timm_multigrain.models.open import open_model

    refinements = arguments.refinements_of(args)
    if args.download:
        download_benchmark(args.benchmark, args.data)
    if args.download_distractors:
        if not args.distractors or args.benchmark not in ('roxford5k', 'rparis6k'):
            raise ValueError('--download-distractors is for roxford5k and rparis6k, with a folder as --distractors.')
        download_benchmark('revisitop1m', args.distractors)
    benchmark = load_benchmark(args.benchmark, args.data, subset=args.subset, ground_truth=args.ground_truth,
                               upright=args.upright, queries=args.queries)
    models = {label: open_model(name, pretrained=not args.no_pretrained, ema=not args.no_ema)
              for label, name in _labels(args.models).items()}
    result = evaluate(
        models, benchmark, protocols=lambda model: _protocols(args, model, benchmark), poolings=args.pool,
        exponents=args.p, whiten=args.whiten, dim=args.dim, distractors=args.distractors,
        score_norm=args.score_norm, nmi=args.nmi, work_dir=args.work_dir,
        command=shlex.join(['timm-multigrain', *sys.argv[1:]]), **refinements, **arguments.extraction_of(args))
    if int(os.environ.get('RANK', 0)):  # torchrun: the processes share the images, and one reports the result
        return
    print(result)
    if args.json:
        print(f'Written: {result.save(args.json)}')


def _labels(names: list[str]) -> dict[str, str]:
    """What to call each model in the table: the last component of a path, if that is unique."""
    short = [os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name for name in names]
    labels = short if len(set(short)) == len(set(names)) else names
    return dict(zip(labels, names, strict=True))


def _protocols(args: argparse.Namespace, model, benchmark) -> list:
    """A protocol for each size."""
    sizes = dict.fromkeys(args.size or [None])
    return [arguments.protocol_of(argparse.Namespace(**{**vars(args), 'size': size}), model, **benchmark.published)
            for size in sizes]
