"""Find the images of an index that are nearest to some pictures.

    timm-multigrain search pictures.index query.jpg
    timm-multigrain search pictures.index query.jpg --crop 120,40,200,200 -k 20 --html found.html

INDEX is a folder that `timm-multigrain index` has made, or milvus:URI, where one was exported to. Scores are cosine
similarities of descriptors, 1 for the same picture. --json writes a list with what was found for each picture.

Exit status: 0; 1 if some of the pictures could not be read, 2 if none could.
"""
import argparse
import os
import sys

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> int:
    from timm_multigrain.index.milvus import open_collection
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
