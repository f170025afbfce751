"""Commands that run a model on images: embed, validate, evaluate."""
import argparse
import os
import shlex
import sys
from pathlib import Path

from . import arguments


def add_embed(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add(parser, 'images', '--strict')
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='DIR', help='folder to write')
    add('--split', metavar='NAME', help='subfolder, or split of the data set')
    add('--dim', type=int, metavar='N', help='first components of a whitened descriptor')
    add('--raw', action='store_true', help='the pooled embedding as it is, not normalised')
    add('--shard-size', type=int, default=1024, metavar='N', help='images per file (%(default)s)')
    arguments.add_protocol(parser)
    arguments.add_extraction(parser)


def run_embed(args: argparse.Namespace) -> None:
    """Embed images: retrieval descriptors of a folder, a list or a data set of timm, in a folder of shards.

        timm-multigrain embed multigrain_resnet50 photos -o descriptors --size 500
        torchrun --nproc-per-node 8 -m timm_multigrain embed MODEL IMAGES -o DIR --device cuda

    IMAGES is a folder, a list file (.txt, a path per line; .json) or a data set of timm such as torch/cifar10:DIR. A
    run that was stopped goes on where it was when the same command is given again. Read the result with
    timm_multigrain.embed.shards.Descriptors.load.
    """
    from timm_multigrain.embed.extract import extract
    from timm_multigrain.files import counted
    from timm_multigrain.images.sources import open_images

    source = open_images(args.images, args.split)
    model = arguments.open_model(args)
    protocol = arguments.protocol_of(args, model)
    first = int(os.environ.get('RANK', 0)) == 0
    if first:
        print(f'{counted(len(source), "image")}, {protocol}')
    found = extract(
        model, source, protocol, args.output, shard_size=args.shard_size, strict=args.strict, dim=args.dim,
        descriptor=not args.raw, **arguments.extraction_of(args))
    if first:
        print(found)


def add_validate(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    add = parser.add_argument
    add('data', metavar='DATA', help='folder of class folders')
    add('--split', metavar='NAME', default='validation', help='subfolder (default: val, validation or test, if there '
                                                              'is one)')
    arguments.add(parser, '--class-map', '--strict')
    add('--json', type=arguments.output_file, metavar='FILE',
        help='write the figures to FILE, as `publish --metrics` takes them')
    add('--dataset', metavar='NAME', help='name of the data set in the figures (default: of the folder)')
    arguments.add_protocol(parser, kind='crop')
    arguments.add_extraction(parser)


def run_validate(args: argparse.Namespace) -> None:
    """Measure classification at any resolution: top-1 and top-5, rectangular images as they are.

        timm-multigrain validate multigrain_resnet50 imagenet --size 500 --protocol longer-side --p 4
        timm-multigrain validate my-model pictures --size 224 --json results.json

    DATA has a folder of images for each class, itself or in its subfolder val, validation or test. The folders are
    matched with the model's classes by its label names, by WordNet ids for ImageNet, of which the folders may be some,
    or in sorted order where there are as many of them.
    """
    from timm_multigrain.images.labels import open_classes
    from timm_multigrain.measure.classify import validate

    model = arguments.open_model(args)
    protocol = arguments.protocol_of(args, model)
    source = open_classes(args.data, model, args.split, args.class_map)
    result = validate(model, source, protocol, strict=args.strict, **arguments.extraction_of(args))
    p = f', p = {model.gem_p:g}' if isinstance(model.gem_p, float) else ''
    print(f'{protocol}{p}\n{result}')
    if args.json:
        command = shlex.join(['timm-multigrain', *sys.argv[1:]])
        arguments.write_json(args.json, result.metrics(args.dataset or Path(args.data).resolve().name, command))


_BENCHMARKS = (
    'folder', 'list', 'cub200', 'cars196', 'sop', 'inshop', 'consumer2shop', 'street2shop', 'instre', 'gldv2', 'ilias',
    'oxford5k', 'paris6k', 'grocery', 'holidays', 'ukbench', 'copydays', 'roxford5k', 'rparis6k', 'disc21')


def add_evaluate(parser: argparse.ArgumentParser) -> None:
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


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure models on a benchmark of image retrieval or copy detection.

        timm-multigrain evaluate multigrain_resnet50 --benchmark roxford5k --data DIR --download --size 1024 \\
            --p 3 --whiten IMAGES --json results.json
        timm-multigrain evaluate resnet50 --benchmark ukbench --data DIR --pool gem mac spoc rmac crow --p 1 3 4
        timm-multigrain evaluate my-model --benchmark folder --data my-images
        timm-multigrain evaluate my-model --benchmark list --data my-images --ground-truth list.csv

    Several models, poolings, exponents and sizes make one table; each trunk runs once for all its poolings. --whiten
    adds each system whitened. The JSON file is what `timm-multigrain publish --metrics` takes.
    """
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
    return [arguments.protocol_of(argparse.Namespace(**{**vars(args), 'size': size}), model, **benchmark.published)
            for size in dict.fromkeys(args.size or [None])]
