"""Pages of HTML that need nothing else: style, script, pictures and charts are in the file, which forbids itself
to load more, and to run anything else.

Everything that a template shows is escaped, and control characters and what UTF-8 cannot hold are spelled out. Pages
follow the reader's light or dark setting, and no meaning is carried by colour alone.
"""
import base64
import hashlib
import io
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw

from timm_multigrain.files import printable, write_text
from timm_multigrain.images.pixels import UnreadableImage, decode, read_image

THUMBNAIL = 200  # pixels of the longer side


def write_page(path: str | os.PathLike, template: str, script: str = '', **values: object) -> Path:
    """Write `render_page`; an old file is replaced in one step."""
    return write_text(path, render_page(template, script, path, **values))


def render_page(template: str, script: str = '', path: str | os.PathLike | None = None, **values: object) -> str:
    """Fill the values into a template of templates/.

    Args:
        template: Name of the template.
        script: Name of a file of templates/ that the page runs, the only one that it may.
        path: Where the page will be, so that it can link to files; None for a page that cannot lead to files.
        **values: What the template shows.
    """
    environment, folder = _environment(), os.path.dirname(os.path.realpath(path or '.'))

    def link(file: str) -> str:
        return quote(os.fsencode(os.path.relpath(file, folder)))

    code = Markup(environment.loader.get_source(environment, script)[0]) if script else ''
    return environment.get_template(template).render(**values, script=code, link=None if path is None else link)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if hasattr(value, '__html__') else printable(str(value)))
    environment.filters.update(
        thumbnail=thumbnail, file_size=file_size, basename=os.path.basename, dirname=os.path.dirname,
        breakable=_breakable, sha256=_sha256)
    environment.tests['utf8'] = lambda path: not any('\udc80' <= c <= '\udcff' for c in path)
    return environment


def _breakable(name: str) -> Markup:
    """A name that lines may break in between words, not within them."""
    return Markup('').join(part + Markup('<wbr>') if part in '/_-. ' else part
                           for part in re.split(r'([/_. -])', printable(name)) if part)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> Markup:
    """A small JPEG as a data URI."""
    small, buffer = decode(image).copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, 'JPEG', quality=85)
    return Markup('data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii'))


def read_picture(path: str, exif: bool = True, size: int | None = THUMBNAIL) -> Image.Image | None:
    """A picture to be looked at, see `read_image`; None if it cannot be read."""
    try:
        return read_image(path, exif=exif, size=size)
    except UnreadableImage:
        return None


def outlined(image: Image.Image, box: Sequence[float], size: tuple[int, int]) -> Image.Image:
    """A picture with a box drawn on it: left, top, right, bottom in pixels of its original of this (width, height)."""
    image, scale = image.copy(), image.width / size[0]
    left, top, right, bottom = (scale * side for side in box)
    corners = (left, top, max(left, right - 1), max(top, bottom - 1))
    ImageDraw.Draw(image).rectangle(corners, outline='#e0701a', width=max(1, max(image.size) // 100))
    return image


def file_size(number: int) -> str:
    """Bytes in words."""
    return f'{number / 1e6:.1f} MB' if number >= 1e6 else f'{number / 1e3:.0f} kB'
