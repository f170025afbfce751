"""The copies of a collection on one HTML page that needs nothing else: groups in pictures, the file to keep marked."""
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from timm_multigrain.images.sources import UnreadableImage, read_image
from timm_multigrain.index.dedup import KINDS, Copies, CopyFile, CopyGroup

from .page import THUMBNAIL_SIDE, escape, inline_image, write_page

__all__ = ['write_copies']

MAX_GROUPS = 500  # a page of more is a burden for browsers; the JSON has them all
MAX_FILES = 24


def write_copies(path: str | os.PathLike, copies: Copies, title: str = 'Copies', exif: bool = True) -> Path:
    """Write the page; a file of that name is replaced in one step.

    Args:
        path: HTML file.
        copies: What was found.
        title: Heading.
        exif: Turn the pictures as their EXIF orientation says.

    Returns:
        The path written.
    """
    summary = ''.join(f'<li>{escape(line)}</li>' for line in str(copies).splitlines())
    parts = [f'<h1>{escape(title)}</h1>', f'<ul>{summary}</ul>',
             '<p class="faint">Nothing was deleted. The first file of a group is the one suggested to keep: most '
             'pixels, then most bytes, then the shortest name. The number is the similarity to it.</p>']
    room = MAX_GROUPS
    for kind, heading in KINDS.items():
        groups = copies.of_kind(kind)
        if groups:
            number = f'{len(groups):,} {"group" if len(groups) == 1 else "groups"}'
            parts.append(f'<h2>{number} of {escape(heading)}</h2>')
            parts += [_group(group, exif) for group in groups[:room]]
            if len(groups) > room:
                parts.append(f'<p>{len(groups) - room:,} more groups are not shown; --json has them.</p>')
            room -= min(room, len(groups))
    return write_page(path, title, '\n'.join(parts))


def _group(group: CopyGroup, exif: bool) -> str:
    surplus = sum(file.record.bytes for file in group.files[1:])
    more = len(group.files) - MAX_FILES
    rest = f'<p class="faint">and {more:,} more files</p>' if more > 0 else ''
    return (f'<section class="card"><header class="faint">{len(group.files):,} files, {_size(surplus)} besides the one '
            f'to keep</header><div class="strip">{"".join(_figures(group, exif))}</div>{rest}</section>')


def _figures(group: CopyGroup, exif: bool) -> Iterator[str]:
    for number, file in enumerate(group.files[:MAX_FILES]):
        yield _figure(file, keep=number == 0, exact=group.kind == 'exact', exif=exif)


def _figure(file: CopyFile, keep: bool, exact: bool, exif: bool) -> str:
    record = file.record
    name, folder = escape(os.path.basename(record.path)), escape(os.path.dirname(record.path))
    badge = '<span class="badge copy">Keep</span>' if keep else (
        f'<span class="badge other">{"Identical" if exact else f"{file.score:.3f}"}</span>')
    try:
        image = read_image(record.path, exif=exif, size=THUMBNAIL_SIDE)
        picture = inline_image(image, f'{name}, {"to keep" if keep else "copy"}')
    except UnreadableImage:
        picture = inline_image(Image.new('RGB', (8, 8), (128, 128, 128)), f'{name} can no longer be read')
    return (f'<figure class="{"copy" if keep else "other"}">{picture}<figcaption>{badge}<br><strong>{name}</strong><br>'
            f'{record.width} x {record.height}, {_size(record.bytes)}<br><span class="faint">{folder}</span>'
            '</figcaption></figure>\n')


def _size(number: int) -> str:
    return f'{number / 1e6:.1f} MB' if number >= 1e6 else f'{number / 1e3:.0f} kB'
