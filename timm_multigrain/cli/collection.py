"""Commands on a collection of pictures: index, search, map, app, export."""
import argparse
import os
import sys

from . import arguments


def add_index(parser: argparse.ArgumentParser) -> None:
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


def run_index(args: argparse.Namespace) -> None:
    """Index the images below some folders, or bring an index up to date.

        timm-multigrain index ~/Pictures -o pictures.index
        timm-multigrain index ~/Pictures -o pictures.index --model my-model
        timm-multigrain index -o pictures.index

    Every image goes through the model once: its descriptor, its most probable classes, its size and its hash are kept.
    Run again, it finds what is new, changed, moved and removed, and leaves the rest alone; stopped, it goes on where it
    was.
    """
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
    said = any(value is not None for value in (args.size, args.protocol, args.scales, args.flip, args.exif))
    return (lambda model: arguments.protocol_of(args, model)) if said else None


def add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('index', metavar='INDEX', help='index folder, or milvus:URI')
    add('images', nargs='+', metavar='IMAGE', help="pictures to search for; '-' reads their paths from stdin")
    add('-k', type=int, default=10, metavar='N', help='images to find for each (%(default)s)')
    add('--crop', type=_crop, metavar='X,Y,W,H', help='search for this part: left, top, width, height in pixels')
    add('--class', dest='class_name', metavar='NAME', help='only images whose most probable class is this one')
    add('--category', metavar='NAME', help='only parts of pictures, of this category of the boxes')
    add('--exact', action='store_true', help='compare with all images of an index that is searched approximately')
    arguments.add_refinements(add)
    add('--html', type=arguments.output_file, metavar='FILE', help='write a page with the pictures')
    add('--json', type=arguments.output_file, metavar='FILE', help='write what was found as JSON, - for stdout')
    add('--model', metavar='MODEL', help='where the model of the index is now, if it was moved')


def run_search(args: argparse.Namespace) -> int:
    """Find the images of an index that are nearest to some pictures.

        timm-multigrain search pictures.index query.jpg
        timm-multigrain search pictures.index query.jpg --crop 120,40,200,200 -k 20 --html found.html

    INDEX is a folder that `timm-multigrain index` has made, or milvus:URI, where one was exported to. Scores are cosine
    similarities of descriptors, 1 for the same picture. --json writes a list with what was found for each picture.

    Exit status: 0; 1 if some of the pictures could not be read, 2 if none could.
    """
    from timm_multigrain.index.export import open_collection
    from timm_multigrain.report.collection import search_json, search_table, write_search_page

    index = open_collection(args.index)
    if args.model:
        index.model(args.model)
    images = [path for image in args.images for path in (_from_stdin() if image == '-' else [image])]
    images, found, unreadable = _search(index, images, args)
    for message in unreadable:
        print(f'timm-multigrain search: {message}', file=sys.stderr)
    if not images:
        return 2
    if args.html:
        page = write_search_page(args.html, args.index, images, found, args.crop, args.class_name)
        print(f'Page: {page.resolve()}', file=sys.stderr)
    if args.json:
        arguments.write_json(args.json, search_json(images, found))
    if args.json != '-':
        print(search_table(images, found))
    return 1 if unreadable else 0


def _from_stdin() -> list[str]:
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


def _search(index, images: list[str], args: argparse.Namespace) -> tuple[list[str], list, list[str]]:
    """The pictures that can be read, what was found for each, and what is wrong with the others."""
    from timm_multigrain.images.pixels import UnreadableImage

    options = {'class_name': args.class_name, 'category': args.category, 'exact': args.exact,
               'report': lambda text: print(text, file=sys.stderr), **arguments.refinements_of(args)}
    try:
        return images, index.search_images(images, args.k, args.crop, **options), []
    except UnreadableImage:
        readable, found, unreadable = [], [], []
    for image in images:
        try:
            found += index.search_images([image], args.k, args.crop, **options)
            readable.append(image)
        except UnreadableImage as e:
            unreadable.append(str(e))
    return readable, found, unreadable


def _crop(text: str) -> tuple[float, ...]:
    try:
        x, y, width, height = (float(number) for number in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not left,top,width,height, such as 10,20,300,200') from None
    if not (width > 0 and height > 0):
        raise argparse.ArgumentTypeError(f'{text!r} has no area: give a width and a height above 0')
    return x, y, width, height


def add_map(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser, 'index')
    add = parser.add_argument
    add('-o', dest='out', type=arguments.output_file, metavar='FILE', required=True, help='page to write')
    add('-n', dest='number', type=int, default=2000, metavar='N',
        help='pictures to draw at most, evenly spread over the index; each takes some 20 kB (%(default)s)')


def run_map(args: argparse.Namespace) -> None:
    """Draw an indexed collection as a map on one page: pictures that are alike lie beside each other.

        timm-multigrain map my-index -o map.html

    Thumbnails are in the page; it needs no server. Up to 5,000 pictures are placed by t-SNE, more (-n) by their two
    principal components. Needs scikit-learn (extra `metric`).
    """
    from timm_multigrain.index import Index
    from timm_multigrain.report.collection import write_map

    page = write_map(args.out, Index(args.index), args.number)
    print(f'Page: {page.resolve()}', file=sys.stderr)


PASSWORD = 'MULTIGRAIN_PASSWORD'


def add_app(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser, 'index')
    add = parser.add_argument
    add('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 lets other computers in (%(default)s)')
    add('--port', type=int, help='port (default: the first free one from 7860 on)')
    add('--allow-host', nargs='+', default=[], metavar='NAME', help='other names that it is reached by, as by a proxy')
    add('--auth', metavar='USER[:PASS]', help='ask for this user and password; without the password, which other users '
                                              f'of the computer could see here, that of ${PASSWORD}')
    add('--title', help='heading of the page')
    add('--max-upload', type=float, default=32, metavar='MB', help='largest picture, megabytes (%(default)s)')


def run_app(args: argparse.Namespace) -> None:
    """Search an indexed collection in the browser: drop a picture, see its classes, nearest images, copies.

        timm-multigrain app my-index
        MULTIGRAIN_PASSWORD=... timm-multigrain app my-index --host 0.0.0.0 --allow-host photos.example.org --auth me

    It listens on this computer only, unless --host says otherwise, answers by its own address and the names of
    --allow-host only, and loads nothing from elsewhere.
    """
    auth = _auth(args.auth) if args.auth is not None else None
    if not 0 < args.max_upload <= 1000:
        raise ValueError(f'--max-upload {args.max_upload:g}: give megabytes above 0, up to 1000.')
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f'--port {args.port}: give a number from 1 to 65535.')
    from timm_multigrain.app.app import launch_app
    from timm_multigrain.index import Index

    if auth is None and not (args.host in ('localhost', '::1') or args.host.startswith('127.')):
        print(f'warning: everybody who can reach {args.host} sees these pictures: ask for a password with --auth.',
              file=sys.stderr)
    launch_app(Index(args.index), host=args.host, port=args.port, title=args.title, allow_hosts=args.allow_host,
               auth=auth, max_upload=round(args.max_upload * 1e6))


def _auth(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(':')
    password = password if colon else os.environ.get(PASSWORD, '')
    if not user or not password or not (user + password).isprintable():
        raise ValueError(f'--auth takes USER:PASS, or USER with the password in the environment variable {PASSWORD}; '
                         'neither may be empty.')
    return user, password


def add_export(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser, 'index')
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='TARGET',
        help='milvus:URI[#COLLECTION], URI being http://HOST:PORT or a local FILE.db; or FILE.parquet')
    add('--mirror', action='store_true', help='Milvus: remove the rows of images that are not in this index')
    add('--batch-size', type=int, default=1000, metavar='N', help='Milvus: images sent at once (%(default)s)')


def run_export(args: argparse.Namespace) -> None:
    """Export an index to Milvus, for more than one machine, or to a Parquet file.

        timm-multigrain export my-index -o milvus:http://milvus.example.org:19530
        timm-multigrain export my-index -o 'milvus:photos.db#holidays'
        timm-multigrain export my-index -o photos.parquet

    Exporting again sends what has changed, also after a run that was stopped. `timm-multigrain search milvus:... IMAGE`
    searches there. A cluster's token is taken from MILVUS_TOKEN.
    """
    from timm_multigrain.index.export import export_index

    print(export_index(
        args.index, args.output, mirror=args.mirror, batch_size=args.batch_size))
