"""Index the images below some folders, or bring an index up to date.

    timm-multigrain index ~/Pictures -o pictures.index
    timm-multigrain index ~/Pictures -o pictures.index --model my-model
    timm-multigrain index -o pictures.index

Every image goes through the model once: its descriptor, its most probable classes, its size and its hash are kept. Run
again, it finds what is new, changed, moved and removed, and leaves the rest alone; stopped, it goes on where it was.
"""
import argparse
import sys

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('dirs', nargs='*', metavar='DIR', help='folders of images, searched with their subfolders (default: '
                                               'those of the index)')
    add('-o', '--output', required=True, metavar='INDEX', help='index folder, created if it does not exist')
    add('--model', metavar='MODEL',
        help=f"{arguments.MODEL} (default: the index's; for a new one tf_efficientnet_lite0.in1k)")
    add('--boxes', metavar='FILE|MODULE:FUNCTION',
        help='embed parts of the pictures, too: a list (.csv, .jsonl) with path, box and category, or a function that '
             'is given a picture and gives (left, top, right, bottom) of each thing in it, or that and a category')
    add('--local', action='store_true',
        help='keep local descriptors, too, some 68 KB a picture, now and in all later updates, so that search --local '
             'need not compute them')
    add('--all', dest='everything', action='store_true',
        help='take hidden folders into a new index, and those with thumbnails or deleted files (@eaDir, #recycle, ...)')
    add('--half', action='store_true', help='keep descriptors of a new index as 16-bit numbers, in half the space')
    add('--kind', choices=('auto', 'exact', 'hnsw', 'ivf-pq'), default='auto',
        help='structure for search: by the number of images, or this one (%(default)s)')
    add('--retry', action='store_true', help='try files again that could not be read before')
    add('--remove-missing', action='store_true',
        help='forget the images of a folder even if all of them, or the folder itself, are gone')
    add('--list-skipped', action='store_true', help='print the files that could not be read, with the reason')
    arguments.add_model(parser, positional=False)
    arguments.add_protocol(parser)
    arguments.add_extraction(parser)


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.files import counted, printable
    from timm_multigrain.index import build_index

    given = {'pool': args.pool, 'p': args.p, 'pretrained': False if args.no_pretrained else None,
             'ema': False if args.no_ema else None}
    given = {name: value for name, value in given.items() if value is not None}
    report = build_index(
        args.dirs, args.output, args.model, _protocol_options(args), model_options=given, boxes=args.boxes,
        local=args.local, half=args.half, retry=args.retry, remove_missing=args.remove_missing,
        everything=args.everything, kind=args.kind, **arguments.extraction_of(args))
    for path, reason in report.unreadable.items():
        print(f'not searched: {printable(path)}: {reason}', file=sys.stderr)
    if args.list_skipped:
        for path, reason in report.skipped.items():
            print(f'{printable(path)}: {printable(reason)}')
    elif report.new_skipped:
        print(f'{counted(report.new_skipped, "file")} could not be read; --list-skipped shows them.', file=sys.stderr)
    print(report)


def _protocol_options(args: argparse.Namespace):
    """What the command line says of the protocol, to be completed by the model's own; None if it says nothing."""
    return (lambda model: arguments.protocol_of(args, model)) if arguments.names_protocol(args) else None
