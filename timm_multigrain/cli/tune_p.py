"""Find the exponent p* of GeM for a test resolution: fine-tune it and scan a grid, the trunk run once per image.

    timm-multigrain tune-p my-model pictures -o my-model-500 --size 500
    timm-multigrain tune-p my-model GROUPS -o my-model-500 --size 500 --criterion map

With class folders (DATA/<class>/ or DATA/train/<class>/) p is fine-tuned on the first images of each class, and top-1
is scanned on the same ones. With images of instances (DATA/<instance>/, or a gt.json of path: number) mAP is scanned.
The p that is recommended is saved with -o OUTPUT: the best of the grid if it gains more than twice the noise, or else
the model's own. OUTPUT-p.json and OUTPUT-p.png lie beside it. Take no test images. A run that was killed goes on when
the same command is given again.
"""
import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
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
    _write(result, args.json or (base and f'{base}-p.json'), args.plot or (base and f'{base}-p.png'), bool(args.plot))
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


def _write(result, json_file: str | None, plot: str | None, must_plot: bool) -> None:
    if json_file:
        print(f'Written: {result.save(json_file)}')
    if plot and result.grid:
        try:
            print(f'Written: {result.draw(plot)}')
        except ImportError as e:
            if must_plot:
                raise
            print(f'No plot: {e}')


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
