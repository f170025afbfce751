"""Whiten a model: fit PCA whitening on images and fold it into the network, in a timm folder.

    timm-multigrain whiten multigrain_resnet50 IMAGES -o my-whitened-model --size 500
    timm-multigrain whiten my-model GROUPS -o my-whitened-model --learned

IMAGES is a folder, a list file or a data set of timm: unlabelled images of the kind that will be searched, at least as
many as the embedding has channels, plus two (20,000 in the paper), none of them a test image. The whitening belongs to
the size, protocol and p it was fitted at. Classes are ranked as before. With --learned, matching images are learned
from: GROUPS has a folder for each group, or a gt.json of path: number.
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


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.embed.extract import extract
    from timm_multigrain.files import counted
    from timm_multigrain.models.save import check_model_folder
    from timm_multigrain.whiten.fit import save_fitted, whiten_model

    check_model_folder(args.output)
    source, groups = _images(args)
    model = arguments.open_model(args)
    protocol = arguments.protocol_of(args, model)
    work_dir = args.work_dir or f'{args.output.rstrip(os.sep)}-embeddings'
    extraction = {'strict': args.strict, **arguments.extraction_of(args)}
    if int(os.environ.get('RANK', 0)):  # under torchrun the others help with the extraction
        extract(model, source, protocol, work_dir, descriptor=False, **extraction)
        return
    print(f'{counted(len(source), "image")}, {protocol}')
    print(whiten_model(
        model, source, protocol, dim=args.dim, shrinkage=args.shrinkage, groups=groups, work_dir=work_dir,
        **extraction))
    print(f'Written: {save_fitted(model, args.output, protocol)}')
    if not args.work_dir:
        shutil.rmtree(work_dir)


def _images(args: argparse.Namespace):
    """The images, and their groups or None."""
    from timm_multigrain.images.sources import Subset, open_images
    from timm_multigrain.measure.benchmarks import load_benchmark

    if args.learned:
        truth = load_benchmark('folder', args.images)
        source, groups = truth.database, truth.groups.tolist()
    else:
        source, groups = open_images(args.images, args.split), None
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f'--limit {args.limit}: give a number of images.')
        source, groups = Subset(source, range(min(args.limit, len(source)))), groups and groups[:args.limit]
    return source, groups


def _shrinkage(text: str) -> float | str:
    try:
        return text if text == 'oas' else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share from 0 to 1, or 'oas'") from None
