"""Export an index to Milvus, for more than one machine, or to a Parquet file.

    timm-multigrain export my-index -o milvus:http://milvus.example.org:19530
    timm-multigrain export my-index -o 'milvus:photos.db#holidays'
    timm-multigrain export my-index -o photos.parquet

Exporting again sends what has changed, also after a run that was stopped. `timm-multigrain search milvus:... IMAGE`
searches there. A cluster's token is taken from MILVUS_TOKEN.
"""
import argparse

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser, 'index')
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='TARGET',
        help='milvus:URI[#COLLECTION], URI being http://HOST:PORT or a local FILE.db; or FILE.parquet')
    add('--mirror', action='store_true', help='Milvus: remove the rows of images that are not in this index')
    add('--batch-size', type=int, default=1000, metavar='N', help='Milvus: images sent at once (%(default)s)')


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.index.export import export_index

    print(export_index(
        args.index, args.output, mirror=args.mirror, batch_size=args.batch_size))
