"""What was found in an index: search results as a table, as JSON and as a page, and the pages of its copies and map."""
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from timm_multigrain.extras import extra
from timm_multigrain.files import printable, write_text
from timm_multigrain.index.dedup import BASES, Copies
from timm_multigrain.index.index import Hit, Index
from timm_multigrain.index.keep import FOOTER, HEADER
from timm_multigrain.index.model import cut
from timm_multigrain.index.records import Record
from timm_multigrain.search.local import draw_matches

from .page import outlined, read_picture, render_page, write_page

MAX_GROUPS = 300  # a page of more is a burden for browsers; the JSON has them all
MAX_FILES = 24
SIDE = 400  # pixels of the longer side of a picture, to be judged by
TSNE_UP_TO = 5000  # pictures of a map; beyond, t-SNE takes many minutes
COLORS = ('#2f7fe6', '#e0701a', '#1a9e62', '#c05bb0', '#8a7a00', '#d03b3b', '#0e9aa7', '#7a63d6')
MAP_SIDE = 280


def search_table(images: Sequence[str], found: Sequence[Sequence[Hit]]) -> str:
    """Rank, score, most probable class, path and box of what was found, query by query."""
    parts = []
    for image, hits in zip(images, found, strict=True):
        classes = [class_caption(hit.record.classes) for hit in hits]
        width = max(map(len, classes), default=0)
        width += 2 if width else 0
        lines = []
        for rank, (hit, name) in enumerate(zip(hits, classes, strict=True), 1):
            details = '' if hit.match is None else f'{len(hit.match):3} details  '
            gone = '' if os.path.exists(hit.path) else '  (gone)'
            path = f'{printable(hit.path)}{_region(hit)}{gone}'
            lines.append(f'{rank:4}  {hit.score:6.3f}  {details}{name:{width}}{path}')
        parts.append('\n'.join([f'{printable(image)}:', *(lines or ['  nothing found'])]))
    return '\n\n'.join(parts)


def search_json(images: Sequence[str], found: Sequence[Sequence[Hit]]) -> list[dict[str, Any]]:
    """What was found, for JSON: a dict per image; bytes of a name that are not UTF-8 are lone surrogates."""
    return [{'query': os.fspath(image), 'rank': rank, 'score': hit.score, 'exists': os.path.exists(hit.path),
             'details': None if hit.match is None else len(hit.match), **asdict(hit.record)}
            for image, hits in zip(images, found, strict=True) for rank, hit in enumerate(hits, 1)]


def write_search_page(
        path: str | os.PathLike,
        index: str | os.PathLike,
        images: Sequence[str],
        found: Sequence[Sequence[Hit]],
        crop: Sequence[float] | None = None,
        class_name: str | None = None,
) -> Path:
    """Write a page with each query, its searched part (x, y, width, height) outlined, and the pictures found for it."""
    return write_page(
        path, 'search.html', title='Search results', index=os.fspath(index), class_name=class_name,
        queries=list(zip(images, found, strict=True)), query_picture=lambda image: _query_picture(image, crop),
        side=SIDE, picture_of=lambda hit, image: _picture_of(hit, image, crop), class_caption=class_caption,
        region_of=_region, same=lambda hit, image: os.path.realpath(hit.path) == os.path.realpath(image))


def write_copies_page(path: str | os.PathLike, copies: Copies, title: str = 'Copies', exif: bool = True) -> Path:
    """Write a page with the groups of copies in pictures, where files are marked, and a list or script is saved."""
    return write_text(path, copies_page(copies, title, exif, path))


def copies_page(
        copies: Copies, title: str = 'Copies', exif: bool = True, path: str | os.PathLike | None = None) -> str:
    """The page of `write_copies_page`; without a path, it has no links to the files."""
    groups = sorted(copies.groups, key=lambda group: -group.surplus_bytes)
    return render_page(
        'copies.html', 'copies.js', path, title=title, summary=copies.summary(), groups=groups[:MAX_GROUPS],
        number=len(groups), bases=BASES, max_files=MAX_FILES, side=SIDE, header=HEADER, footer=FOOTER,
        picture_of=lambda file: read_picture(file, exif, SIDE))


def class_caption(classes: Sequence[tuple[str, float]], number: int = 1) -> str:
    """The most probable classes in words, '' without any: of 'tench, Tinca tinca' the first name, of 298 class 298."""
    return ', '.join(f'{"class " * name.isdecimal()}{printable(name.partition(", ")[0])} {100 * p:.0f} %'
                     for name, p in classes[:number])


def indexed_picture(record: Record, exif: bool = True, size: int = SIDE) -> Image.Image | None:
    """A picture of an index to be looked at, the part that a record is of outlined; None if it cannot be read."""
    image = read_picture(record.path, exif, size)
    return outlined(image, record.box, (record.width, record.height)) if image and record.box else image


def _region(hit: Hit) -> str:
    """Category and box of a part of a picture, '' for a whole one."""
    return f'  {printable(hit.record.category)} {list(hit.record.box)}' if hit.record.box else ''


def _picture_of(hit: Hit, query: str, crop: Sequence[float] | None) -> Image.Image | None:
    """A picture that was found; beside the query where the details of both were compared."""
    if hit.match is None:
        return indexed_picture(hit.record)
    image, asked = (read_picture(path, size=None) for path in (hit.path, query))
    if image is None or asked is None:
        return image
    return draw_matches(asked if crop is None else cut(asked, crop, query), image, hit.match, SIDE)


def _query_picture(path: str, crop: Sequence[float] | None) -> Image.Image | None:
    """A query, the part around the crop dimmed."""
    image = read_picture(path, size=None)
    if image is None or crop is None:
        return image
    inside = cut(image, crop, path)
    dimmed = Image.blend(image, Image.new('RGB', image.size, 'white'), 0.6)
    x, y = max(0, round(crop[0])), max(0, round(crop[1]))
    dimmed.paste(inside, (x, y))
    return outlined(dimmed, (x, y, x + inside.width, y + inside.height), image.size)


def map_layout(vectors: np.ndarray) -> np.ndarray:
    """Places (N, 2) from 0 to 1 of L2-normalised descriptors (N, D): t-SNE (van der Maaten and Hinton, 2008) of up to
    5000, which keeps neighbours together; of more, the two principal components.
    """
    if len(vectors) < 3:
        raise ValueError(f'A map takes three pictures or more, not {len(vectors)}.')
    with extra('metric', 'A map'):
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    near = len(vectors) <= TSNE_UP_TO
    with np.errstate(invalid='ignore'):  # of equal pictures, whose variance is 0
        places = PCA(min(50 if near else 2, *vectors.shape), random_state=0).fit_transform(vectors)
    if near:
        start = 1e-4 * places[:, :2] / max(places[:, 0].std(), 1e-9)  # theirs is not finite for these
        places = TSNE(perplexity=min(30, (len(places) - 1) / 3), init=start, random_state=0).fit_transform(places)
    low, high = places.min(axis=0), places.max(axis=0)
    return (places - low) / np.where(high > low, high - low, 1)


def write_map(path: str | os.PathLike, index: Index, number: int = 2000) -> Path:
    """Write a page with the map of an index, or of so many pictures evenly spread over it."""
    rows = np.unique(np.linspace(0, len(index) - 1, min(max(number, 0), len(index))).round().astype(np.int64))
    places, exif = map_layout(np.asarray(index.vectors[rows], dtype=np.float32)), index.protocol().exif
    records = [index.records(row) for row in rows.tolist()]
    names = [record.classes[0][0] if record.classes else '' for record in records]
    kinds = list(zip((name for name, _ in Counter(filter(None, names)).most_common()), COLORS, strict=False))
    number_of = {name: i for i, (name, _) in enumerate(kinds, 1)}
    dots = [(100 * x, 100 * y, number_of.get(name, 0), record) for (x, y), name, record in zip(
        places.tolist(), names, records, strict=True)]
    return write_page(
        path, 'map.html', title=f'Map of {index.path}', dots=tqdm(dots, 'pictures', disable=None),
        of=len(index), number=len(dots), kinds=kinds, side=MAP_SIDE,
        picture_of=lambda path: read_picture(path, exif, MAP_SIDE), class_caption=class_caption)
