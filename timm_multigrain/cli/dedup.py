"""The command dedup, of copies in a collection."""
import argparse
import os
import shlex
import sys
import unicodedata
import warnings

from . import arguments


def add_dedup(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('index', metavar='INDEX', nargs='?', help='index folder')
    add('--between', metavar=('TRAIN', 'VAL'), nargs=2,
        help='which images of VAL are copies of images of TRAIN: folders in INDEX, or without INDEX two indexes')
    add('--keep', choices=('largest', 'oldest', 'newest', 'first-folder'), default='largest',
        help='which file of a group to keep (%(default)s)')
    add('--prefer', metavar='DIR', action='append', default=[],
        help='folder whose files are never surplus; may be given several times')
    add('--include-likely', action='store_true', help='list and move likely copies too')
    add('--html', type=arguments.output_file, metavar='FILE', help='write a page with the groups in pictures')
    add('--script', type=arguments.output_file, metavar='FILE',
        help='write a shell script that moves the surplus files to a folder; each line looks at the files again '
             'when it runs')
    add('--list', action='store_true', help='print the surplus files, one per line')
    add('-0', '--null', action='store_true', help='end the lines of --list with a null byte, for xargs -0')
    add('--json', type=arguments.output_file, metavar='FILE', help='write everything as JSON, - for stdout')
    add('--identical', action='store_true', help='identical files only')
    add('--threshold', type=float, metavar='T', help='similarity from which pictures are copies (default: those that '
                                                     'look the same)')
    add('--false-positives', type=float, metavar='F', help='with --no-look: share of the pictures that may have a '
                                                           'different picture above the threshold (default: 0.002)')
    add('--no-look', action='store_true', help='go by the descriptors alone, and decode no picture')
    add('--measure', type=int, metavar='N', nargs='?', const=50,
        help='make edited copies of N pictures (50), and print which share of them would be found, by edit')


def run_dedup(args: argparse.Namespace) -> int:
    """Find copies in an indexed collection: identical files, near-duplicates, edited copies.

        timm-multigrain dedup my-index --html copies.html
        timm-multigrain dedup my-index --prefer originals --script move.sh && sh move.sh surplus-files
        timm-multigrain dedup my-index --list -0 | xargs -0 ls -l
        timm-multigrain dedup my-index --between pictures/train pictures/val

    It prints how many there are, and never moves or deletes anything. Of each group one file is kept: a real file
    before a link, colour before grey, more pixels before fewer, one with the camera's data, the JPEG file that a PNG
    file was made from, one that is not named a copy, an older one, the one that is compressed less; --keep and --prefer
    come before that.

    A copy is certain if the file is identical, or if its details agree with those of the file to keep; --list and
    --script take these only, unless --include-likely. --measure reports how many edited copies of some pictures would
    be found.

    Every file of a group is checked before the group is reported. Exit status: 0; 1 if groups were left out because
    files have changed since they were indexed (`timm-multigrain index -o INDEX` brings it up to date); 2 for an error.
    """
    from timm_multigrain.files import counted, printable
    from timm_multigrain.index import Index
    from timm_multigrain.index.dedup import FALSE_POSITIVES, find_copies, measure_recall

    if not (args.index or args.between):
        raise ValueError('Name an index, or two with --between.')
    if args.measure is not None and (args.html or args.script or args.json or args.list or args.identical):
        raise ValueError('--measure prints a table only: leave --html, --script, --json, --list and --identical out.')
    if args.false_positives is not None and not args.no_look:
        warnings.warn('--false-positives has no effect without --no-look: pictures are compared, whatever their '
                      'similarity.', stacklevel=1)
    index = Index(args.index) if args.index else None
    share = FALSE_POSITIVES if args.false_positives is None else args.false_positives
    options = {'threshold': args.threshold, 'false_positives': share, 'look': not args.no_look}
    title = f'Copies in {args.index}'
    if args.between:
        from timm_multigrain.index.between import find_copies_between, sets_of
        if args.measure is not None or args.prefer or args.keep != 'largest':
            raise ValueError('--between keeps the images of TRAIN: leave --keep, --prefer and --measure out.')
        sets, title = sets_of(args.between, index), f'Copies of {args.between[0]} in {args.between[1]}'
        index = sets[0].index
        copies = find_copies_between(*sets, exact_only=args.identical, progress=True, **options)
    elif args.measure is not None:
        print(measure_recall(index, args.measure, progress=True, **options))
        return 0
    else:
        copies = find_copies(
            index, exact_only=args.identical, keep=args.keep, prefer=args.prefer, progress=True, **options)
    surplus = copies.surplus(args.include_likely)
    if args.html:
        from timm_multigrain.report.collection import write_copies_page
        page = write_copies_page(args.html, copies, title, index.protocol().exif)
        print(f'Page: {page}', file=sys.stderr)
    if args.script:
        from timm_multigrain.index.keep import write_script
        write_script(args.script, surplus)
        print(f'Script: {args.script} moves {counted(len(surplus), "file")}: sh {shlex.quote(args.script)} FOLDER',
              file=sys.stderr)
    if args.json:
        arguments.write_json(args.json, copies.to_dict())
    if args.list:
        _print_list([file.record.path for file, _ in surplus], args.null)
    elif args.json != '-':
        print(copies)
    if copies.changed:
        print(f'timm-multigrain dedup: changed since they were indexed: {len(copies.changed):,} of the files, such as '
              f'{printable(copies.changed[0])}; groups left out with them: {copies.left_out:,}. Run timm-multigrain '
              f'index -o {printable(index.path)}, then this again.', file=sys.stderr)
        return 1
    return 0


def _print_list(paths: list[str], null: bool) -> None:
    """As bytes: names need not be text.

    Raises:
        ValueError: A name that would be several lines, or something else than a name to a terminal, without ``null``.
    """
    from timm_multigrain.files import printable

    for path in [] if null else paths:
        if any(unicodedata.category(c) == 'Cc' for c in path):
            raise ValueError(f'{printable(path)} has control characters in its name: take --list -0, and what reads '
                             'names that end in a null byte.')
    sys.stdout.buffer.write(b''.join(os.fsencode(path) + (b'\0' if null else b'\n') for path in paths))
    sys.stdout.buffer.flush()
