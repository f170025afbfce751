"""Lists of images and what is known of them: a CSV file with these names in its first line, or JSON lines with objects.

    path      of the image, below the folder
    split     query, gallery or train
    label     class, for k-NN
    instance  what a query has to find; by default its label
    category  kind of thing, which figures are given for and a search can be kept to
    box       left top right bottom in pixels: the part of the image that is meant

All but the path may be missing or empty.
"""
import csv
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from timm_multigrain.files import check_json, parse_json, printable, read_lines

from .sources import Box


class Entry(NamedTuple):
    """An image of a list, see the module.

    Attributes:
        relevant: As a query: paths in the gallery that it has to find; None for those of its instance or label.
        junk: Paths that are taken out of its ranking.
    """
    path: str
    label: str = ''
    instance: str = ''
    category: str = ''
    split: str = ''
    box: Box | None = None
    relevant: Collection[str] | None = None
    junk: Collection[str] = ()

    @property
    def wanted(self) -> str:
        """What a query of this image has to find."""
        return self.instance or self.label


COLUMNS = Entry._fields[:-2]  # of a list of one's own


def read_entries(path: str | os.PathLike) -> list[Entry]:
    """The images of a list.

    Raises:
        FileNotFoundError: List not found.
        ValueError: A line that cannot be read, without a path, or with a path that leads out of the folder.
    """
    path, entries = Path(path), []
    lines = [line.removeprefix('\ufeff') for line in read_lines(path, 'list of images')]
    rows = map(parse_json, lines) if path.suffix == '.jsonl' else csv.DictReader(lines, strict=True)
    try:
        for row in rows:
            entries.append(_entry(row))
    except (ValueError, csv.Error) as e:
        number = len(entries) + (1 if path.suffix == '.jsonl' else 2)
        raise ValueError(f'{printable(path)}, line {number}: {e}') from e
    if not entries:
        raise ValueError(f'{printable(path)} lists no images.')
    return entries


def _entry(row: dict) -> Entry:
    if isinstance(row, dict) and isinstance(row.get('box'), str):  # of a CSV file
        row = {**row, 'box': [float(side) for side in row['box'].split()] or None}
    check_json(row, {}, 'it')
    if unknown := sorted(map(str, set(row) - set(COLUMNS))):
        raise ValueError(f'{unknown[0]!r} is not one of {", ".join(COLUMNS)}.')
    check_json(row, {'path': str}, 'it')
    check_json(row, dict.fromkeys(set(row) - {'box'}, (str, int, None)) | dict.fromkeys(
        {'box'} & set(row), ([float], None)), 'it')
    texts = {name: '' if row.get(name) is None else str(row[name]).strip() for name in COLUMNS[:-1]}
    name = PurePosixPath(texts['path'])
    if not texts['path'] or name.is_absolute() or '..' in name.parts:
        raise ValueError(f'the path {texts["path"]!r} is not one of a file below the folder.')
    if texts['split'] not in ('', 'query', 'gallery', 'train', 'test'):
        raise ValueError(f'split is {texts["split"]!r}: give query, gallery, train or nothing.')
    box = row.get('box')
    if box and len(box) != 4:
        raise ValueError(f'box is {box}: give left, top, right and bottom.')
    return Entry(**{**texts, 'path': name.as_posix()}, box=tuple(box) if box else None)
