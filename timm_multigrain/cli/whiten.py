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
import sys
import warnings

from .arguments import (
    add_extraction_arguments,
    add_model_arguments,
    add_protocol_arguments,
    extraction_from_args,
    model_from_args,
    protocol_from_args,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add('images', metavar='IMAGES', help='folder, list file, or data set of timm')
    add('-o', '--output', required=True, metavar='DIR', help='folder to write; an earlier model there is replaced')
    add('--split', metavar='NAME', help='subfolder, or split of the data set')
    add('--limit', type=int, metavar='N', help='the first N images only')
    add('--dim', type=int, metavar='N', help='components kept (default: all, which keeps the classifier exact; '
                                             'descriptors can be cut to fewer later)')
    add('--shrinkage', metavar='S', help="share of the identity in the covariance, 0 to 1, or 'oas' (default: 0, or "
                                         'oas with fewer images than channels)')
    add('--learned', action='store_true', help='learn from matching images')
    add('--work-dir', metavar='DIR', help='folder of the embeddings, for a run that is killed to go on (default: '
                                          'OUTPUT-embeddings, removed at the end)')
    add('--strict', action='store_true', help='stop at an image that cannot be read instead of leaving it out')
    add_protocol_arguments(parser)
    add_extraction_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from timm_multigrain.embed.extract import extract_shards
    from timm_multigrain.models.save import check_model_folder
    from timm_multigrain.whiten.fit import save_fitted, whiten_model

    shrinkage = _shrinkage(args.shrinkage)
    check_model_folder(args.output)
    source, groups = _images(args)
    model = model_from_args(args)
    protocol = protocol_from_args(args, model)
    work_dir = args.work_dir or f'{args.output.rstrip(os.sep)}-embeddings'
    if int(os.environ.get('RANK', 0)):  # under torchrun the others help with the extraction
        extract_shards(model, source, protocol, work_dir, strict=args.strict, descriptor=False,
                       **extraction_from_args(args))
        return 0
    print(f'{len(source)} images, {protocol}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        result = whiten_model(
            model, source, protocol, dim=args.dim, shrinkage=shrinkage, groups=groups, work_dir=work_dir,
            strict=args.strict, **extraction_from_args(args))
    for warning in caught:
        print(f'Warning: {warning.message}', file=sys.stderr)
    print(result)
    print(f'Written: {save_fitted(model, args.output, protocol)}')
    if not args.work_dir:
        shutil.rmtree(work_dir)
    return 0


def _images(args: argparse.Namespace):
    """The images, and their groups or None."""
    from timm_multigrain.images.sources import Subset, open_images

    if not args.learned:
        source, groups = open_images(args.images, args.split), None
    else:
        from timm_multigrain.measure.benchmarks import load_benchmark
        truth = load_benchmark('folder', args.images)
        source, groups = truth.database, truth.groups.tolist()
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f'--limit {args.limit}: give a number of images.')
        source, groups = Subset(source, range(min(args.limit, len(source)))), groups and groups[:args.limit]
    return source, groups


def _shrinkage(text: str | None) -> float | str | None:
    if text is None or text == 'oas':
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--shrinkage {text}: give a share from 0 to 1, or 'oas'.") from None
