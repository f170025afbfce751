"""What a search has found as a table, as lines of JSON, and as a page with pictures."""
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from timm_multigrain.images.sources import UnreadableImage, printable, read_image
from timm_multigrain.index.index import Hit
from timm_multigrain.index.queries import cut

from .page import THUMBNAIL_SIDE, escape, inline_image, write_page

__all__ = ['json_lines', 'table', 'write_search_page']


def table(images: Sequence[str], found: Sequence[Sequence[Hit]]) -> str:
    """Rank, score, most probable class and path of what was found, query by query."""
    parts = []
    for image, hits in zip(images, found, strict=True):
        names = [_class(hit).replace('\xa0', ' ') for hit in hits]
        width = max(map(len, names), default=0)
        lines = [f'{rank:4}  {hit.score:6.3f}  {name:{width}}{"  " if width else ""}{printable(hit.path)}'
                 for rank, (hit, name) in enumerate(zip(hits, names, strict=True), 1)]
        parts.append('\n'.join([f'{printable(image)}:', *(lines or ['  nothing found'])]))
    return '\n\n'.join(parts)


def json_lines(images: Sequence[str], found: Sequence[Sequence[Hit]]) -> Iterator[str]:
    """A line of JSON for each image found. Bytes of a name that are not UTF-8 are lone surrogates, as in Python."""
    for image, hits in zip(images, found, strict=True):
        for rank, hit in enumerate(hits, 1):
            record = hit.record
            yield json.dumps({
                'query': os.fspath(image), 'rank': rank, 'score': hit.score, 'path': hit.path, 'width': record.width,
                'height': record.height, 'bytes': record.bytes, 'sha256': record.sha256,
                'mtime_ns': record.mtime_ns, 'classes': [list(pair) for pair in record.classes]})


def write_search_page(
        path: str | os.PathLike,
        index: str | os.PathLike,
        images: Sequence[str],
        found: Sequence[Sequence[Hit]],
        crop: Sequence[float] | None = None,
        class_name: str | None = None,
) -> Path:
    """Write a page with each query and the pictures found for it, thumbnails in the page itself.

    Args:
        path: HTML file.
        index: Name of what was searched.
        images: The queries.
        found: Their hits, nearest first.
        crop: The part (x, y, width, height) of the queries that was searched for; it is outlined.
        class_name: The class that was asked for.
    """
    number = len(images)
    intro = f'The nearest images in {printable(index)} to {number} {"pictures" if number > 1 else "picture"}'
    intro += f', of class {class_name}' if class_name else ''
    body = [f'<h1>Search results</h1>\n<p>{escape(intro)}. The number is the cosine similarity of the descriptors.</p>']
    body += [_query(image, hits, crop) for image, hits in zip(images, found, strict=True)]
    return write_page(path, 'Search results', '\n'.join(body))


def _query(image: str, hits: Sequence[Hit], crop: Sequence[float] | None) -> str:
    shown, parts = escape(printable(image)), []
    query = _picture(image)
    if query is not None and crop is not None:
        query = _outlined(query, crop, shown)
    picture = _missing() if query is None else inline_image(query, f'Query: {shown}')
    for rank, hit in enumerate(hits, 1):
        parts.append(_hit(rank, hit, os.path.realpath(hit.path) == os.path.realpath(image)))
    found = f'<div class="strip">{"".join(parts)}</div>' if parts else '<p class="faint">Nothing found.</p>'
    return (f'<article class="card query"><figure>{picture}<figcaption><strong>Query</strong><br>{shown}</figcaption>'
            f'</figure><div>{found}</div></article>')


def _hit(rank: int, hit: Hit, same: bool) -> str:
    name, folder = escape(printable(os.path.basename(hit.path))), escape(printable(os.path.dirname(hit.path)))
    picture = _picture(hit.path, THUMBNAIL_SIDE)
    image = _missing() if picture is None else inline_image(picture, f'Result {rank}: {name}')
    badge, kind = ('<span class="badge">The query</span><br>', ' class="copy"') if same else ('', '')
    details = '<br>'.join(filter(None, [escape(_class(hit)), f'{hit.record.width}\xa0×\xa0{hit.record.height}']))
    return (f'<figure{kind} title="{folder}">{image}<figcaption>{badge}'
            f'<span class="score">{rank}. {hit.score:.3f}</span> {name}<br>{details}</figcaption></figure>\n')


def _picture(path: str, size: int | None = None) -> Image.Image | None:
    try:
        return read_image(path, size=size)
    except UnreadableImage:
        return None


def _missing() -> str:
    return '<p class="faint">The file cannot be read now.</p>'


def _outlined(image: Image.Image, crop: Sequence[float], name: str) -> Image.Image:
    """The picture, the part around the crop dimmed."""
    inside = cut(image, crop, name)
    dimmed = Image.blend(image, Image.new('RGB', image.size, 'white'), 0.6)
    x, y = max(0, round(crop[0])), max(0, round(crop[1]))
    dimmed.paste(inside, (x, y))
    line = max(1, max(image.size) // 100)
    ImageDraw.Draw(dimmed).rectangle((x, y, x + inside.width - 1, y + inside.height - 1), outline='#e0701a', width=line)
    return dimmed


def _class(hit: Hit) -> str:
    if not hit.record.classes:
        return ''
    name, probability = hit.record.classes[0]
    return f'{printable(name)} {100 * probability:.0f}\xa0%'
