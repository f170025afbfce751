"""A page of HTML that needs nothing else: its style and pictures are in it, and it forbids itself to load anything."""
import base64
import html
import io
import os
import re
from importlib.resources import files
from pathlib import Path

from PIL import Image

from timm_multigrain.files import write_text

__all__ = ['escape', 'inline_image', 'write_page']

THUMBNAIL_SIDE = 200

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(path: str | os.PathLike, title: str, body: str) -> Path:
    """Write a page; a file of that name is replaced in one step.

    Args:
        path: HTML file; its folder is made if missing.
        title: Plain text.
        body: HTML.
    """
    style = files(__package__).joinpath('report.css').read_text(encoding='utf-8')
    return write_text(path, PAGE.format(title=escape(title), style=style, body=body))


def escape(value: object) -> str:
    """Escaped for elements and quoted attributes; what UTF-8 or HTML cannot hold is shown by a stand-in."""
    text = str(value).encode('utf-8', 'backslashreplace').decode('utf-8')
    return html.escape(re.sub(r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]', '\ufffd', text))


def inline_image(image: Image.Image, escaped_alt: str) -> str:
    """An img element with a thumbnail, at most `THUMBNAIL_SIDE` pixels long."""
    thumbnail = image.convert('RGB')
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    thumbnail.save(buffer, 'JPEG', quality=85)
    data = base64.b64encode(buffer.getvalue()).decode('ascii')
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escaped_alt}" loading="lazy">'
