"""Find copies in an indexed collection: identical files, near-duplicates, edited copies.

    timm-multigrain dedup my-index --html copies.html
    timm-multigrain dedup my-index --json > copies.json
    timm-multigrain dedup my-index --list -0 | xargs -0 mv -t to-be-looked-at

It prints how many there are, and with --list the files that are not suggested to be kept; it never deletes or moves
anything. Suggested to be kept is the file of most pixels, of equal ones that of most bytes. The threshold is found from
the collection itself (--false-positives); --measure tells what it finds, by making copies of some of the pictures.
"""
import argparse
import json
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('index', metavar='INDEX', help='index folder')
    add('--html', metavar='FILE', help='write a page with the groups in pictures')
    add('--list', action='store_true', help='print the surplus files, one a line')
    add('-0', '--null', action='store_true', help='end the lines of --list with a null byte, for xargs -0')
    add('--json', action='store_true', help='print everything as JSON')
    add('--exact', action='store_true', help='identical files only')
    add('--threshold', type=float, metavar='T', help='similarity from which pictures are copies (default: found from '
                                                     'the collection)')
    add('--false-positives', type=float, metavar='F', help='share of the pictures that may have a different picture '
                                                           'above the threshold (default: 0.002)')
    add('--no-look', action='store_true', help='go by the index alone, and open no picture')
    add('--measure', type=int, metavar='N', nargs='?', const=50,
        help='make edited copies of N pictures (50), and print which share of them would be found, by edit')


def run(args: argparse.Namespace) -> int:
    from timm_multigrain.collection import Index
    from timm_multigrain.collection.dedup import FALSE_POSITIVES, find_copies

    index = Index.open(args.index)
    share = FALSE_POSITIVES if args.false_positives is None else args.false_positives
    if args.measure is not None:
        from timm_multigrain.collection.dedup_recall import measure_recall
        print(measure_recall(
            index, args.measure, threshold=args.threshold, false_positives=share, look=not args.no_look))
        return 0
    copies = find_copies(
        index, args.threshold, false_positives=share, look=not args.no_look, exact_only=args.exact)
    if args.html:
        from timm_multigrain.collection.dedup_page import write_copies
        page = write_copies(args.html, copies, f'Copies in {args.index}', index.protocol().exif)
        print(f'Page: {page}', file=sys.stderr)
    if args.json:
        print(json.dumps(copies.to_json(), indent=1))
    elif args.list:
        # as bytes: names need not be text
        end = b'\0' if args.null else b'\n'
        sys.stdout.buffer.write(b''.join(os.fsencode(path) + end for path in copies.surplus))
        sys.stdout.buffer.flush()
    else:
        print(copies)
    return 0
