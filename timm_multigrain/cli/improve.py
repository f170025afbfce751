"""Commands that improve a trained model without retraining its trunk: whiten, adapt, tune-p."""
import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import arguments


def add_whiten(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add(parser, 'images', '--output', '--strict', '--work-dir')
    add = parser.add_argument
    add('--split', metavar='NAME', help='subfolder, or split of the data set')
    add('--limit', type=int, metavar='N', help='the first N images only')
    add('--dim', type=int, metavar='N', help='components kept (default: all, which keeps the classifier exact; '
                                             'descriptors can be cut to fewer later)')
    add('--shrinkage', type=_shrinkage, metavar='S',
        help="share of the identity in the covariance, 0 to 1, or 'oas' (default: 0, or oas with fewer images than "
             'channels)')
    add('--learned', action='store_true', help='learn from matching images')
    arguments.add_protocol(parser)
    arguments.add_extraction(parser)


def run_whiten(args: argparse.Namespace) -> None:
    """Whiten a model: fit PCA whitening on images and fold it into the network, in a timm folder.

        timm-multigrain whiten multigrain_resnet50 IMAGES -o my-whitened-model --size 500
        timm-multigrain whiten my-model GROUPS -o my-whitened-model --learned

    IMAGES is a folder, a list file or a data set of timm: unlabelled images of the kind that will be searched, at least
    as many as the embedding has channels, plus two (20,000 in the paper), none of them a test image. The whitening
    belongs to the size, protocol and p it was fitted at. Classes are ranked as before. With --learned, matching images
    are learned from: GROUPS has a folder for each group, or a gt.json of path: number.
    """
    from timm_multigrain.images.sources import Subset, open_images
    from timm_multigrain.whiten.fit import whiten_model

    source, groups = _groups(args) if args.learned else (open_images(args.images, args.split), None)
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f'--limit {args.limit}: give a number of images.')
        source, groups = Subset(source, range(min(args.limit, len(source)))), groups and groups[:args.limit]
    _fit(args, source, lambda *given, **extraction: whiten_model(
        *given, dim=args.dim, shrinkage=args.shrinkage, groups=groups, **extraction))


def _shrinkage(text: str) -> float | str:
    try:
        return text if text == 'oas' else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share from 0 to 1, or 'oas'") from None


def add_adapt(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add(parser, 'images', '--output', '--strict', '--work-dir')
    add = parser.add_argument
    add('--dim', type=int, metavar='N', help='components (default: 512)')
    add('--epochs', type=int, metavar='N', help='passes over the embeddings (default: 2, or as many as make 500 steps)')
    add('--seed', type=int, default=0, metavar='N', help='of the start and the order (%(default)s)')
    arguments.add_protocol(parser)
    arguments.add_extraction(parser)


def run_adapt(args: argparse.Namespace) -> None:
    """Adapt a model to instances: learn a projection of its frozen embedding from labelled images, in minutes on a CPU.

        timm-multigrain adapt my-model PRODUCTS -o my-adapted-model --size 224

    PRODUCTS has a folder for each thing (DIR/<thing>/<image>), or a gt.json of path: number; none of them a test image.
    The trunk stays as it is and runs once for each image, not at all with --work-dir SHARDS if SHARDS is what `embed
    --raw -o SHARDS` made of the same images by the same settings. The result is a timm folder, in which the projection
    (512 components) takes the place of a whitening: it belongs to the size, protocol and p it was learned at.
    """
    from timm_multigrain.whiten.adapt import adapt

    source, groups = _groups(args)
    _fit(args, source, lambda model, source, protocol, **extraction: adapt(
        model, source, groups, protocol, dim=args.dim, epochs=args.epochs, seed=args.seed, **extraction))


def _groups(args: argparse.Namespace) -> tuple:
    """Images in groups, and the group of each."""
    from timm_multigrain.measure.benchmarks import load_benchmark

    truth = load_benchmark('folder', args.images)
    return truth.database, truth.groups.tolist()


def _fit(args: argparse.Namespace, source, fit: Callable) -> None:
    """Fit a whitening or an adaptation, and save the model with it."""
    from timm_multigrain.embed.extract import extract
    from timm_multigrain.files import counted
    from timm_multigrain.models.save import check_model_folder
    from timm_multigrain.whiten.fit import save_fitted

    check_model_folder(args.output)
    model = arguments.open_model(args)
    protocol = arguments.protocol_of(args, model)
    work_dir = args.work_dir or f'{args.output.rstrip(os.sep)}-embeddings'
    extraction = {'strict': args.strict, **arguments.extraction_of(args)}
    if int(os.environ.get('RANK', 0)):  # under torchrun the others help with the extraction
        extract(model, source, protocol, work_dir, descriptor=False, **extraction)
        return
    print(f'{counted(len(source), "image")}, {protocol}')
    print(fit(model, source, protocol, work_dir=work_dir, **extraction))
    print(f'Written: {save_fitted(model, args.output, protocol)}')
    if not args.work_dir:
        shutil.rmtree(work_dir)


def add_tune_p(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    add = parser.add_argument
    add('data', metavar='DATA', help='folder of class folders, or of groups of images of an instance')
    add('-o', '--output', metavar='DIR', help='folder of the model with the new p (default: save none)')
    add('--criterion', choices=('top1', 'map'), help='top-1 on classes or mAP on groups (default: map for a folder '
                                                     'with gt.json or a model without classifier)')
    add('--grid', nargs='*', type=float, metavar='P',
        help="exponents to scan beside the model's own (default: 1 to 8); none: fine-tune only")
    add('--choose', choices=('tuned', 'best'),
        help="p to save: fine-tuned, or best of the grid (default: the best if surely better than the model's own)")
    add('--per-class', type=int, default=50, metavar='N', help='images of each class, by name (%(default)s)')
    add('--split', metavar='NAME', default='train', help='subfolder of the class folders (default: train, if there is '
                                                         'one)')
    arguments.add(parser, '--class-map')
    add('--lr', type=float, default=0.005, help='learning rate of the first step (%(default)s)')
    add('--seed', type=int, default=0, help='of the order of the images (%(default)s)')
    add('--json', type=arguments.output_file, metavar='FILE', help='write what was found (default: OUTPUT-p.json)')
    add('--plot', type=arguments.output_file, metavar='FILE',
        help='draw it (default: OUTPUT-p.png, if matplotlib is installed)')
    arguments.add_protocol(parser)
    arguments.add_extraction(parser, batch_size='4 to fine-tune p, else 32')


def run_tune_p(args: argparse.Namespace) -> None:
    """Find the exponent p* of GeM for a test resolution: fine-tune it and scan a grid, the trunk run once per image.

        timm-multigrain tune-p my-model pictures -o my-model-500 --size 500
        timm-multigrain tune-p my-model GROUPS -o my-model-500 --size 500 --criterion map

    With class folders (DATA/<class>/ or DATA/train/<class>/) p is fine-tuned on the first images of each class, and
    top-1 is scanned on the same ones. With images of instances (DATA/<instance>/, or a gt.json of path: number) mAP is
    scanned. The p that is recommended is saved with -o OUTPUT: the best of the grid if it gains more than twice the
    noise, or else the model's own. OUTPUT-p.json and OUTPUT-p.png lie beside it. Take no test images. A run that was
    killed goes on when the same command is given again.
    """
    from timm_multigrain.models.save import check_model_folder

    if args.output:
        check_model_folder(args.output)
    model = arguments.open_model(args)
    protocol = arguments.protocol_of(args, model)
    groups = args.criterion == 'map' or (
        args.criterion is None and (not model.num_classes or (Path(args.data) / 'gt.json').is_file()))
    base = args.output and args.output.rstrip(os.sep)
    result = replace((_scan_groups if groups else _tune)(args, model, protocol, base), choose=args.choose)
    print(result)
    if args.json or base:
        print(f'Written: {result.save(args.json or f"{base}-p.json")}')
    if (args.plot or base) and result.grid:
        try:
            print(f'Written: {result.draw(args.plot or f"{base}-p.png")}')
        except ImportError as e:
            if args.plot:
                raise
            print(f'No plot: {e}')
    if base:
        _save(base, model, protocol, result)


def _tune(args: argparse.Namespace, model, protocol, base: str | None):
    from timm_multigrain.files import counted
    from timm_multigrain.images.labels import first_of_each, open_classes
    from timm_multigrain.measure.tune_p import GRID, tune_p

    grid = GRID if args.grid is None else args.grid
    if args.choose == 'best' and not grid:
        raise ValueError('--choose best needs a grid: give exponents, such as --grid 1 2 3 4.')
    if args.fast:
        raise ValueError('--fast is for --criterion map: top-1 is scanned on the maps of the trunk.')
    source = first_of_each(open_classes(args.data, model, args.split, args.class_map), args.per_class)
    print(f'{counted(len(source), "image")} of {len(set(source.labels))} classes, {protocol}')
    extraction = {name: value for name, value in arguments.extraction_of(args).items() if name != 'fast'}
    extraction['batch_size'] = 4 if args.batch_size is None else args.batch_size
    return tune_p(model, source, protocol, grid=grid, finetune=args.choose != 'best', lr=args.lr, seed=args.seed,
                  state_file=base and f'{base}-progress.json', **extraction)


def _scan_groups(args: argparse.Namespace, model, protocol, base: str | None):
    from timm_multigrain.measure.benchmarks import load_benchmark
    from timm_multigrain.measure.tune_p import GRID, scan_p_groups

    if args.choose == 'tuned':
        raise ValueError('--choose tuned: p is fine-tuned on classes, and mAP is scanned only.')
    return scan_p_groups(model, load_benchmark('folder', args.data), protocol, GRID if args.grid is None else args.grid,
                         work_dir=base and f'{base}-embeddings', **arguments.extraction_of(args))


def _save(output: str, model, protocol, result) -> None:
    """Save the model with the p that was found; what a killed run would have gone on from is removed."""
    from timm_multigrain.files import json_p
    from timm_multigrain.models.save import note_fitted
    from timm_multigrain.whiten.fit import save_fitted

    model.set_gem_p(result.p)
    note_fitted(model, 'p', {
        'p': json_p(result.p), 'from': json_p(result.start), 'how': result.how, 'criterion': result.criterion,
        'images': result.num_images, 'protocol': protocol.to_dict()})
    print(f'Written: {save_fitted(model, output, protocol)}')
    Path(f'{output}-progress.json').unlink(missing_ok=True)
    shutil.rmtree(f'{output}-embeddings', ignore_errors=True)
