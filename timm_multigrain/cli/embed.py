"""Embed images: retrieval descriptors of a folder, a list or a data set of timm, in a folder of shards.

    timm-multigrain embed multigrain_resnet50 photos -o descriptors --size 500
    torchrun --nproc-per-node 8 -m timm_multigrain embed MODEL IMAGES -o DIR --device cuda

IMAGES is a folder, a list file (.txt, a path per line; .json) or a data set of timm such as torch/cifar10:DIR. A run
that was stopped goes on where it was when the same command is given again. Read the result with
timm_multigrain.embed.shards.Descriptors.load.
"""
import argparse
import os

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
    add('-o', '--output', required=True, metavar='DIR', help='folder to write')
    add('--split', metavar='NAME', help='subfolder, or split of the data set')
    add('--dim', type=int, metavar='N', help='first components of a whitened descriptor')
    add('--raw', action='store_true', help='the pooled embedding as it is, not normalised')
    add('--shard-size', type=int, default=1024, metavar='N', help='images per file (%(default)s)')
    add('--strict', action='store_true', help='stop at an image that cannot be read instead of leaving it out')
    add_protocol_arguments(parser)
    add_extraction_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from timm_multigrain.embed.extract import extract_shards
    from timm_multigrain.images.sources import open_images

    source = open_images(args.images, args.split)
    model = model_from_args(args)
    protocol = protocol_from_args(args, model)
    first = int(os.environ.get('RANK', 0)) == 0
    if first:
        print(f'{len(source)} images, {protocol}')
    extraction = extract_shards(
        model, source, protocol, args.output, shard_size=args.shard_size, strict=args.strict, dim=args.dim,
        descriptor=not args.raw, **extraction_from_args(args))
    if first:
        print(extraction)
    return 0
