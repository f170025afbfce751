"""Embed images: retrieval descriptors of a folder, a list or a data set of timm, in a folder of shards.

    timm-multigrain embed multigrain_resnet50 photos -o descriptors --size 500
    torchrun --nproc-per-node 8 -m timm_multigrain embed MODEL IMAGES -o DIR --device cuda

IMAGES is a folder, a list file (.txt, a path per line; .json) or a data set of timm such as torch/cifar10:DIR. A run
that was stopped goes on where it was when the same command is given again. Read the result with
timm_multigrain.embed.shards.Descriptors.load.
"""
import argparse
import os

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
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
