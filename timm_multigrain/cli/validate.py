"""Measure classification at any resolution: top-1 and top-5, rectangular images as they are.

    timm-multigrain validate multigrain_resnet50 imagenet --size 500 --protocol longer-side --p 4
    timm-multigrain validate my-model pictures --size 224 --json results.json

DATA has a folder of images for each class, itself or in its subfolder val, validation or test. The folders are matched
with the model's classes by its label names, by WordNet ids for ImageNet, of which the folders may be some, or in sorted
order where there are as many of them.
"""
import argparse
import shlex
import sys
from pathlib import Path

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
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
