"""Copies in a photo collection: identical files, near-duplicates and edited copies, and which file to keep.

Nothing is ever deleted here. Identical files are those of equal SHA-256. The others are found by descriptors whitened
by the collection and thresholds that the collection sets, and a look at the pictures where the descriptors leave it
open (looks.py); pairs.py says what a group is. Every file of a group is looked at as it is now before the group counts.
Files of several pictures, such as scans of many pages and animations, are copies only if they are identical:
descriptors know their first picture alone.
"""
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from timm_multigrain.files import open_regular, write_text
from timm_multigrain.images import copies as edited
from timm_multigrain.images.sources import holds_several, read_image

from .build import sha256_of
from .index import Index
from .looks import ALIKE, Looks, likeness, small_grey
from .model import embed_queries
from .pairs import CollectionWhitening, NearPairs, Thresholds, find_thresholds, near_pairs, star_groups
from .records import Record

__all__ = [
    'EDITS', 'FALSE_POSITIVES', 'KINDS', 'Copies', 'CopyFile', 'CopyGroup', 'EditRecall', 'find_copies',
    'measure_recall']

FALSE_POSITIVES = 0.002
KINDS = {'exact': 'identical files', 'near': 'copies and near-duplicates'}


@dataclass(frozen=True)
class CopyFile:
    """A file of a group; score is its similarity to the file to keep (of whitened descriptors), 1 if identical."""
    record: Record
    score: float


@dataclass(frozen=True)
class CopyGroup:
    """Files that are copies of each other, of kind 'exact' (identical) or 'near'.

    The one to keep is the first, that is the one of most pixels, then most bytes (least compressed), then shortest
    name; the others follow by falling similarity to it. Of identical files only one is in a 'near' group.
    """
    kind: str
    files: tuple[CopyFile, ...]

    @property
    def keep(self) -> str:
        """Path of the file that is best kept."""
        return self.files[0].record.path

    @property
    def others(self) -> tuple[str, ...]:
        """Paths of the other files."""
        return tuple(file.record.path for file in self.files[1:])


@dataclass(frozen=True)
class Copies:
    """What was found.

    Attributes:
        groups: 'exact' groups, then 'near' ones, each kind by the path of the first file kept.
        thresholds: Similarities that decided; None if only identical files were looked for.
        images: Images in the index.
        complete: Whether all pairs above the threshold were certainly found.
        unreadable: Pictures that should have been looked at and could no longer be read.
        several: Files of several pictures that would be copies if the first picture were all.
        changed: Paths of files that have changed since they were indexed; no group with one of them is in `groups`.
        left_out: How many groups that are.
    """
    groups: tuple[CopyGroup, ...]
    thresholds: Thresholds | None
    images: int
    complete: bool = True
    unreadable: int = 0
    several: int = 0
    changed: tuple[str, ...] = ()
    left_out: int = 0

    def of_kind(self, kind: str) -> tuple[CopyGroup, ...]:
        return tuple(group for group in self.groups if group.kind == kind)

    @property
    def surplus(self) -> list[str]:
        """Every path that is in a group and not the one to keep there, once."""
        return list(dict.fromkeys(path for group in self.groups for path in group.others))

    @property
    def surplus_bytes(self) -> int:
        """Size of the surplus files."""
        return sum({file.record.path: file.record.bytes for group in self.groups for file in group.files[1:]}.values())

    def to_dict(self) -> dict:
        """In JSON's kinds of values; paths as os.fsdecode gives them."""
        groups = [{'kind': group.kind, 'keep': group.keep, 'files': [
            {'path': file.record.path, 'score': round(file.score, 4), 'width': file.record.width,
             'height': file.record.height, 'bytes': file.record.bytes, 'sha256': file.record.sha256}
            for file in group.files]} for group in self.groups]
        return {'images': self.images, 'thresholds': self.thresholds and asdict(self.thresholds),
                'complete': self.complete, 'unreadable': self.unreadable, 'several': self.several,
                'changed': list(self.changed), 'left_out': self.left_out, 'groups': groups}

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to a file."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + '\n')

    def __str__(self) -> str:
        lines = [f'{self.images:,} images']
        for kind, what in KINDS.items():
            groups = self.of_kind(kind)
            groups_of = f'{len(groups):,} {"group" if len(groups) == 1 else "groups"} of {what}'
            lines.append(f'{sum(len(group.files) for group in groups):,} files in {groups_of}')
        lines.append(f'{len(self.surplus):,} surplus files, {self.surplus_bytes / 1e6:,.1f} MB')
        if self.thresholds:
            lines.append(f'threshold {self.thresholds.certain:.3f}, {self.thresholds.possible:.3f} where the pictures '
                         'look the same')
        if self.unreadable:
            lines.append(f'{self.unreadable:,} pictures could not be read to look at them')
        if self.several:
            lines.append(f'{self.several:,} files of several pictures (pages, animations) are not among the near '
                         'copies: only identical ones count')
        if self.changed:
            lines.append(f'{self.left_out:,} groups left out: {len(self.changed):,} of their files are not what was '
                         'indexed any more')
        if not self.complete:
            lines.append('some pairs just above the threshold may have been missed')
        return '\n'.join(lines)


def find_copies(
        index: Index,
        threshold: float | None = None,
        *,
        false_positives: float = FALSE_POSITIVES,
        look: bool = True,
        exact_only: bool = False,
) -> Copies:
    """Find copies in an index. The same index of the same files gives the same groups.

    Args:
        index: The index.
        threshold: Similarity of whitened descriptors from which two pictures are copies; None: found from the
            collection, see `find_thresholds`.
        false_positives: Share of the images that may have a different picture above that threshold.
        look: Look at the pictures where the similarity leaves it open; without, no picture is decoded, and real copies
            in the collection push the threshold up.
        exact_only: Look for identical files only.

    Raises:
        ValueError: A threshold or share out of range, or so many pairs that the threshold cannot be meant.
        DamagedIndex: The index cannot be read.
    """
    groups, found = [_group(index, rows) for rows in _identical(index)], Copies((), None, len(index))
    if not exact_only:
        search = _CopySearch(index, threshold, false_positives, look)
        pairs = search.pairs()
        rows = pairs.rows().tolist()
        several = [row for row in rows if holds_several(index.path_of(row))]
        pairs = pairs.where(~(np.isin(pairs.first, several) | np.isin(pairs.second, several)))
        order = np.zeros(len(index), dtype=np.int64)  # by path, so that the order of indexing decides nothing
        order[sorted(rows, key=lambda row: os.fsencode(index.path_of(row)))] = np.arange(len(rows))
        groups += [_group(index, rows, search.vectors) for rows in star_groups(pairs, order)]
        found = replace(found, thresholds=search.thresholds, complete=pairs.complete, several=len(several),
                        unreadable=search.looks.unreadable)
    groups.sort(key=lambda group: (group.kind, os.fsencode(group.keep)))  # 'exact' before 'near'
    verified, changed = _verify(groups)
    left_out = sum(any(file.record.path in changed for file in group.files) for group in groups)
    return replace(found, groups=verified, changed=tuple(changed), left_out=left_out)


class _CopySearch:
    """Whitened descriptors of an index, and the thresholds that decide; arguments as of `find_copies`."""

    def __init__(self, index: Index, threshold: float | None, false_positives: float, look: bool):
        if threshold is not None and not -1 < threshold <= 1:
            raise ValueError(f'The threshold is a similarity above -1 and at most 1, got {threshold}.')
        kept = np.ones(len(index), bool)  # of identical files the one to keep
        for rows in _identical(index):
            kept[_ranked(index, rows)[1:]] = False
        self.rows, self.look, exif = np.flatnonzero(kept), look, index.protocol().exif
        self.looks = Looks(lambda i: read_image(index.path_of(i), exif=exif))
        self.whitening = CollectionWhitening(index.vectors)
        self.vectors = self.whitening.all(index.vectors)
        self.thresholds = Thresholds(threshold, threshold) if threshold is not None else find_thresholds(
            self.vectors, self.rows, self._alike, false_positives)

    def _alike(self, i: int, j: int) -> bool:
        return self.look and self.looks.alike(i, j)

    def pairs(self) -> NearPairs:
        """The pairs above the threshold, and of those that are possible the ones that look the same."""
        limits = self.thresholds
        pairs = near_pairs(self.vectors, limits.possible if self.look else limits.certain, self.rows)
        good = pairs.scores >= limits.certain
        for i in np.flatnonzero(~good):
            good[i] = self._alike(int(pairs.first[i]), int(pairs.second[i]))
        return pairs.where(good)


def _identical(index: Index) -> list[np.ndarray]:
    """Rows of each set of identical files."""
    hashes = np.ascontiguousarray(index.columns['sha256']).view('>u8').reshape(len(index), 4)
    order = np.lexsort(hashes.T)
    same = (hashes[order][1:] == hashes[order][:-1]).all(1)
    return [rows for rows in np.split(order, np.flatnonzero(~same) + 1) if len(rows) > 1]


def _ranked(index: Index, rows: np.ndarray) -> list[int]:
    """Rows, the one that is best kept first."""
    def key(row: int) -> tuple:
        record, path = index.columns[row], os.fsencode(index.path_of(row))
        return (-int(record['width']) * int(record['height']), -int(record['bytes']),
                len(os.path.basename(path)), path)
    return sorted(rows.tolist(), key=key)


def _group(index: Index, rows: np.ndarray, vectors: np.ndarray | None = None) -> CopyGroup:
    """A group of identical files, or of near copies by their whitened descriptors."""
    rows = np.array(_ranked(index, rows))
    scores = np.ones(len(rows))
    if vectors is not None:
        scores[1:] = np.asarray(vectors[rows[1:]], dtype=np.float64) @ np.asarray(vectors[rows[0]], dtype=np.float64)
        order = np.append(0, 1 + np.argsort(-scores[1:], kind='stable'))
        rows, scores = rows[order], scores[order]
    ranked = zip(rows.tolist(), scores.tolist(), strict=True)
    return CopyGroup('exact' if vectors is None else 'near', tuple(CopyFile(index.records(i), s) for i, s in ranked))


def _verify(groups: Sequence[CopyGroup]) -> tuple[tuple[CopyGroup, ...], dict[str, None]]:
    """Groups whose files are all what was indexed, and the paths of the files that are not.

    An index is as old as its last update, and nobody is to delete by what it remembers. A group stays only if every
    file of it exists now with the size and time that were indexed, identical files with the same SHA-256, and no file
    is surplus to itself under another name.
    """
    records = {file.record.path: file.record for group in groups for file in group.files}
    identical = {file.record.path for group in groups if group.kind == 'exact' for file in group.files}
    with ThreadPoolExecutor(4) as pool:
        looks = pool.map(lambda record: _identity(record, record.path in identical), records.values())
        looks = tqdm(looks, 'Checking files', len(records), leave=False, disable=None)
        seen = dict(zip(records, looks, strict=True))
    groups = [group for group in groups if all(seen[file.record.path] for file in group.files)]
    surplus = {path for group in groups for path in group.others}
    kept = {seen[group.keep] for group in groups if group.keep not in surplus}
    verified = []
    for group in groups:
        names, files = {seen[group.keep]} | kept, [group.files[0]]
        for file in group.files[1:]:
            if seen[file.record.path] not in names:  # of a file that is in the group, or to be kept by another one
                names.add(seen[file.record.path])
                files.append(file)
        if len(files) > 1:
            verified.append(replace(group, files=tuple(files)))
    return tuple(verified), {path: None for path, identity in seen.items() if identity is None}


def _identity(record: Record, whole: bool) -> tuple[int, int] | None:
    """Identity of a file, whatever its name; None if its size or time, or its `whole` content, is not what was indexed.
    """
    try:
        with open_regular(record.path, follow_links=True) as file:
            status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    if (status.st_size, status.st_mtime_ns) != (record.bytes, record.mtime_ns):
        return None
    if whole and sha256_of(record.path) != bytes.fromhex(record.sha256):
        return None
    return status.st_dev, status.st_ino


def _resize(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.LANCZOS)


# Every edit takes an RGB picture and gives one, mild and strong; nothing is random.
EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    'resize 1/2': partial(_resize, scale=0.5),
    'resize 1/4': partial(_resize, scale=0.25),
    'resize x2': partial(_resize, scale=2),
    **{f'crop {share} %': partial(edited.crop, area=share / 100) for share in (90, 70, 50)},
    **{f'jpeg {quality}': partial(edited.jpeg, quality=quality) for quality in (90, 50, 20, 10, 5)},
    'rotate 5': partial(edited.rotate, degrees=5),
    'rotate 15': partial(edited.rotate, degrees=15),
    'rotate 90': partial(Image.Image.transpose, method=Image.Transpose.ROTATE_90),
    'blur 1 %': partial(edited.blur, share=0.01),
    'blur 2 %': partial(edited.blur, share=0.02),
    'text': edited.text,
    'colour': edited.colour,
    'grey': lambda image: ImageOps.grayscale(image).convert('RGB'),
    'mirror': ImageOps.mirror,
}


@dataclass(frozen=True)
class EditRecall:
    """Share of the copies found by each edit, of how many pictures copies were made, and the thresholds."""
    recall: Mapping[str, float]
    images: int
    thresholds: Thresholds

    def __str__(self) -> str:
        width = max(map(len, self.recall))
        lines = [f'{name:{width}}  {100 * share:5.1f} %' for name, share in self.recall.items()]
        mean = 100 * sum(self.recall.values()) / len(self.recall)
        return '\n'.join([f'Copies found of {self.images} pictures', *lines, f'{"mean":{width}}  {mean:5.1f} %'])


def measure_recall(
        index: Index,
        images: int = 50,
        threshold: float | None = None,
        *,
        false_positives: float = FALSE_POSITIVES,
        look: bool = True,
        edits: Mapping[str, Callable[[Image.Image], Image.Image]] = EDITS,
) -> EditRecall:
    """Make copies of pictures of an index in memory, embed them, and see which `find_copies` would find.

    Args:
        index: The index.
        images: Pictures to make copies of, drawn from a fixed seed.
        threshold: As for `find_copies`, as `false_positives` and `look`.
        edits: Name to function.

    Raises:
        ValueError: Fewer than one image, or as `find_copies`.
        UnreadableImage: A picture was deleted.
    """
    if images < 1 or not len(index):
        raise ValueError(f'{images} of {len(index)} images is nothing to measure on: take one at least.')
    search, model, protocol = _CopySearch(index, threshold, false_positives, look), index.model(), index.protocol()
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:images])
    found = dict.fromkeys(edits, 0)
    for start in range(0, len(rows), 16):
        chunk = rows[start:start + 16]
        pictures = [read_image(index.path_of(int(row)), exif=protocol.exif) for row in chunk]
        for name, edit in edits.items():
            edited = [edit(picture) for picture in pictures]
            vectors = search.whitening(embed_queries(model, protocol, edited).vectors.numpy())
            for score, picture, copy in zip((search.vectors[chunk] * vectors).sum(1), pictures, edited, strict=True):
                found[name] += bool(score >= search.thresholds.certain or (
                    look and score >= search.thresholds.possible
                    and likeness(small_grey(picture), small_grey(copy)) >= ALIKE))
    return EditRecall({name: number / len(rows) for name, number in found.items()}, len(rows), search.thresholds)
