"""Pages of HTML that need nothing else: style, pictures and charts are in the file, which forbids itself to load more.

Everything that a template shows is escaped, and control characters and what UTF-8 cannot hold are spelled out. Pages
follow the reader's light or dark setting, and no meaning is carried by colour alone.
"""
import base64
import io
import os
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from timm_multigrain.files import printable, write_text
from timm_multigrain.images.pixels import decode
from timm_multigrain.images.sources import UnreadableImage, read_image

__all__ = ['THUMBNAIL', 'file_size', 'read_picture', 'write_page']

THUMBNAIL = 200  # pixels of the longer side


def write_page(path: str | os.PathLike, template: str, **values: object) -> Path:
    """Fill the values into a template of templates/ and write the page; an old file is replaced in one step."""
    return write_text(path, _environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if hasattr(value, '__html__') else printable(str(value)))
    environment.filters.update(
        thumbnail=_thumbnail, file_size=file_size, basename=os.path.basename, dirname=os.path.dirname)
    return environment


def _thumbnail(image: Image.Image) -> Markup:
    """A small JPEG as a data URI."""
    small, buffer = decode(image).copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(buffer, 'JPEG', quality=85)
    return Markup('data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii'))


def read_picture(path: str, exif: bool = True, size: int | None = THUMBNAIL) -> Image.Image | None:
    """A picture to be looked at, see `read_image`; None if it cannot be read."""
    try:
        return read_image(path, exif=exif, size=size)
    except UnreadableImage:
        return None


def file_size(number: int) -> str:
    """Bytes in words."""
    return f'{number / 1e6:.1f} MB' if number >= 1e6 else f'{number / 1e3:.0f} kB'
