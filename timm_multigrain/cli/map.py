"""Draw an indexed collection as a map on one page: pictures that are alike lie beside each other.

    timm-multigrain map my-index -o map.html

Thumbnails are in the page; it needs no server. Up to 5,000 pictures are placed by t-SNE, more (-n) by their two
principal components. Needs scikit-learn (extra `metric`).
"""
import argparse
import sys

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser, 'index')
    add = parser.add_argument
    add('-o', dest='out', type=arguments.output_file, metavar='FILE', required=True, help='page to write')
    add('-n', dest='number', type=int, default=2000, metavar='N',
        help='pictures to draw at most, evenly spread over the index; each takes some 20 kB (%(default)s)')


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.index import Index
    from timm_multigrain.report.collection import write_map

    page = write_map(args.out, Index.open(args.index), args.number)
    print(f'Page: {page.resolve()}', file=sys.stderr)
