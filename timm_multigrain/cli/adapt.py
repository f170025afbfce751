"""Adapt a model to instances: learn a projection of its frozen embedding from labelled images, in minutes on a CPU.

    timm-multigrain adapt my-model PRODUCTS -o my-adapted-model --size 224

PRODUCTS has a folder for each thing (DIR/<thing>/<image>), or a gt.json of path: number; none of them a test image. The
trunk stays as it is and runs once for each image, not at all with --work-dir SHARDS if SHARDS is what `embed --raw -o
SHARDS` made of the same images by the same settings. The result is a timm folder, in which the projection (512
components) takes the place of a whitening: it belongs to the size, protocol and p it was learned at.
"""
import argparse
import os
import shutil

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add(parser, 'images', '--strict', '--work-dir')
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='DIR', help='folder to write; an earlier model there is replaced')
    add('--dim', type=int, metavar='N', help='components (default: 512)')
    add('--epochs', type=int, metavar='N', help='passes over the embeddings (default: 2, or as many as make 500 steps)')
    add('--seed', type=int, default=0, metavar='N', help='of the start and the order (%(default)s)')
    arguments.add_protocol(parser)
    arguments.add_extraction(parser)


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.files import counted
    from timm_multigrain.measure.benchmarks import load_benchmark
    from timm_multigrain.models.save import check_model_folder
    from timm_multigrain.whiten.adapt import adapt
    from timm_multigrain.whiten.fit import save_fitted

    check_model_folder(args.output)
    truth = load_benchmark('folder', args.images)
    model = arguments.open_model(args)
    protocol = arguments.protocol_of(args, model)
    work_dir = args.work_dir or f'{args.output.rstrip(os.sep)}-embeddings'
    print(f'{counted(len(truth.database), "image")}, {protocol}')
    print(adapt(
        model, truth.database, truth.groups.tolist(), protocol, dim=args.dim, epochs=args.epochs, seed=args.seed,
        work_dir=work_dir, strict=args.strict, **arguments.extraction_of(args)))
    print(f'Written: {save_fitted(model, args.output, protocol)}')
    if not args.work_dir:
        shutil.rmtree(work_dir)
