"""Copies in a photo collection: identical files, near-duplicates and edited copies, and which file to keep.

Nothing is ever deleted here. Identical files are those of equal SHA-256. For the others, descriptors and small grey
versions propose the nearest pictures (pairs.py, which also says what a group is), and a look at both (detail.py) says
whether they are copies, whether that is certain, and which edit it was; keep.py says which file is kept. Every file of
a group is looked at as it is now before the group counts.
Files of several pictures, such as scans of many pages and animations, are copies only if they are identical:
descriptors know their first picture alone.
"""
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

from timm_multigrain.files import counted, open_regular, write_text
from timm_multigrain.images.copies import EDITS
from timm_multigrain.images.pixels import holds_several, read_image
from timm_multigrain.search.exact import nearest

from . import detail
from .build import sha256_of
from .detail import ALIKE, NO_OPENCV, SIDE, SMALL, Comparison, Picture, compare
from .index import Index
from .keep import Candidate, Rules, look_at
from .model import embed_queries
from .pairs import NEIGHBOURS, NearPairs, Thresholds, find_thresholds, near_pairs, star_groups
from .records import Record
from .vectors import in_chunks

FALSE_POSITIVES = 0.002
KINDS = {'exact': 'identical files', 'near': 'copies and near-duplicates'}
IN_MEMORY = 4096  # pictures to compare, 150 KB each
BASES = {'identical': 'Identical', 'details': 'Certain', 'look': 'Likely', 'descriptor': 'Perhaps'}


@dataclass(frozen=True)
class CopyFile:
    """A file of a group.

    Attributes:
        record: What the index knows of it.
        score: Similarity of its descriptor to that of the file to keep, 1 if identical.
        basis: What says that it is a copy of that file: 'identical' bytes, 'details' of both pictures that agree,
            a 'look' at both, or at the centre of the group, or the 'descriptor' alone.
        edits: What was done to it, in words, as far as that is seen.
        keep: Whether it is kept: the first of a group, and all in a preferred folder.
        reason: Why the first is kept and not this one.
    """
    record: Record
    score: float
    basis: str = 'descriptor'
    edits: tuple[str, ...] = ()
    keep: bool = False
    reason: str = ''

    @property
    def certain(self) -> bool:
        """Whether it is a copy beyond doubt: identical, or the details agree."""
        return self.basis in ('identical', 'details')


@dataclass(frozen=True)
class CopyGroup:
    """Files that are copies of each other, of kind 'exact' (identical) or 'near'.

    The first is the one to keep; the others follow by falling similarity to it. Of identical files only one is in a
    'near' group.
    """
    kind: str
    files: tuple[CopyFile, ...]

    @property
    def keep(self) -> str:
        """Path of the file that is best kept."""
        return self.files[0].record.path

    @property
    def others(self) -> tuple[CopyFile, ...]:
        """The files that are surplus."""
        return tuple(file for file in self.files if not file.keep)

    @property
    def certain(self) -> bool:
        """Whether all its surplus files are certain copies."""
        return all(file.certain for file in self.others)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the first file is kept and not the others."""
        return tuple(dict.fromkeys(file.reason for file in self.others))

    @property
    def surplus_bytes(self) -> int:
        return sum(file.record.bytes for file in self.others)


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

    def surplus(self, likely: bool = False) -> list[tuple[CopyFile, CopyFile]]:
        """Each surplus file once, with the file that is kept for it: of certain copies, and with `likely` of all.

        A file that is kept for one and surplus to another comes after the first.
        """
        return [(file, group.files[0]) for group in self.groups for file in group.others if likely or file.certain]

    def surplus_bytes(self, likely: bool = False) -> int:
        """Size of the surplus files."""
        return sum(file.record.bytes for file, _ in self.surplus(likely))

    def to_dict(self) -> dict:
        """In JSON's kinds of values; paths as os.fsdecode gives them."""
        groups = [{'kind': group.kind, 'keep': group.keep, 'reasons': list(group.reasons), 'files': [
            {'path': file.record.path, 'score': round(file.score, 4), 'basis': file.basis, 'certain': file.certain,
             'edits': list(file.edits), 'keep': file.keep, 'reason': file.reason, 'width': file.record.width,
             'height': file.record.height, 'bytes': file.record.bytes, 'sha256': file.record.sha256}
            for file in group.files]} for group in self.groups]
        return {'images': self.images, 'thresholds': self.thresholds and asdict(self.thresholds),
                'complete': self.complete, 'unreadable': self.unreadable, 'several': self.several,
                'changed': list(self.changed), 'left_out': self.left_out, 'groups': groups}

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to a file."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + '\n')

    def __str__(self) -> str:
        return '\n'.join(self.summary())

    def summary(self) -> list[str]:
        """How many there are, in sentences."""
        lines = [counted(self.images, 'image')]
        for kind, what in KINDS.items():
            groups = self.of_kind(kind)
            files = counted(sum(len(group.files) for group in groups), 'file')
            lines.append(f'{files} in {counted(len(groups), "group")} of {what}')
        certain, every = len(self.surplus()), len(self.surplus(likely=True))
        lines.append(f'{counted(certain, "surplus file")} for certain, {self.surplus_bytes() / 1e6:,.1f} MB')
        if every > certain:
            likely = self.surplus_bytes(likely=True) - self.surplus_bytes()
            lines.append(f'{every - certain:,} more that are likely copies, {likely / 1e6:,.1f} MB: look at them')
        return [*lines, *self.notes()]

    def notes(self) -> Iterator[str]:
        """What could not be seen, in sentences."""
        if self.unreadable:
            yield f'{counted(self.unreadable, "picture")} could not be read to look at them'
        if self.several:
            yield (f'{counted(self.several, "file")} of several pictures (pages, animations) left out of the near '
                   'copies: only identical ones count')
        if self.changed:
            yield (f'{counted(self.left_out, "group")} left out: {counted(len(self.changed), "file")} changed since '
                   'indexing')
        if not self.complete:
            yield 'some pairs just above the threshold may have been missed'


def find_copies(
        index: Index,
        threshold: float | None = None,
        *,
        false_positives: float = FALSE_POSITIVES,
        look: bool = True,
        exact_only: bool = False,
        keep: str = 'largest',
        prefer: Sequence[str | os.PathLike] = (),
        progress: bool | Callable[[str], None] = False,
) -> Copies:
    """Find copies in an index. The same index of the same files gives the same groups.

    Args:
        threshold: Similarity of descriptors from which two pictures are copies; None: those are that look the
            same, or without a look, from the threshold of `find_thresholds` on.
        false_positives: Share of the images that may have a different picture above that threshold.
        look: Look at the nearest pictures, however similar, and at all that are found; without, no picture is decoded,
            real copies in the collection push the threshold up, and only identical files are certain.
        exact_only: Look for identical files only.
        keep: Which file of a group to keep, one of `KEEP`; see keep.py.
        prefer: Folders whose files are never surplus.
        progress: Show bars; or a function that is told in words how far it is.

    Raises:
        ValueError: A threshold or share out of range, or so many pairs that the threshold cannot be meant.
        FileNotFoundError: A folder to prefer was not found.
        DamagedIndex: The index cannot be read.
    """
    search = CopySearch(index, threshold, false_positives, look, exact_only, Rules(keep, prefer), progress)
    groups = [search.identical_group(rows) for rows in search.identical]
    if not exact_only:
        pairs = search.pairs()
        order = np.zeros(len(index), dtype=np.int64)  # by path, so that the order of indexing decides nothing
        rows = sorted(pairs.rows().tolist(), key=lambda row: os.fsencode(index.path_of(row)))
        order[rows] = np.arange(len(rows))
        groups += search.groups(star_groups(pairs, order))
    return search.result(groups)


def told(items: Iterable, what: str, number: int, progress: bool | Callable[[str], None]) -> Iterable:
    """The items, while `progress`, see `find_copies`, is told how many of the number are done."""
    if not callable(progress):
        return tqdm(items, what, number, leave=False, disable=None if progress else True)
    file = SimpleNamespace(write=lambda text: text.strip() and progress(text.strip()), flush=lambda: None)
    return tqdm(items, what, number, leave=False, file=file, bar_format='{desc}: {n:,} of {total:,}')


class CopySearch:
    """Descriptors and looks of an index, and the thresholds that decide; arguments as of `find_copies`."""

    def __init__(self, index: Index, threshold: float | None = None, false_positives: float = FALSE_POSITIVES,
                 look: bool = True, exact_only: bool = False, rules: Rules | None = None,
                 progress: bool | Callable[[str], None] = False):
        if threshold is not None and not -1 < threshold <= 1:
            raise ValueError(f'The threshold is a similarity above -1 and at most 1, got {threshold}.')
        self.index, self.rules, self.progress = index, rules or Rules(), progress
        self.vectors, self.look, self.exif, self.given = index.vectors, look, index.protocol().exif, threshold
        self.thresholds, self.complete, self.several, self.unreadable = None, True, 0, set()
        self.picture = lru_cache(IN_MEMORY)(self._picture)
        self.alike = lru_cache(1 << 20)(lambda i, j: self.compare(i, j).alike)
        # rows of each set of identical files, the one to keep first; they are compared by that one only
        self.identical = [sorted(rows.tolist(), key=lambda row: self.rules.key(self.candidate(row)))
                          for rows in identical_rows(index)]
        self.rows = np.setdiff1d(np.arange(len(index)), [row for rows in self.identical for row in rows[1:]])
        if not exact_only:
            if look and detail.cv2 is None:
                warnings.warn(NO_OPENCV, stacklevel=3)
            self.thresholds = Thresholds(threshold, threshold) if threshold is not None else find_thresholds(
                self.vectors, self.rows, false_positives)

    def candidate(self, row: int) -> Candidate:
        return Candidate(self.index.records(row), int(self.index.columns['root'][row]))

    def compare(self, original: int, copy: int) -> Comparison:
        """Two images by their rows, each file read once or, of many, as often as it has to."""
        pictures = self.picture(original), self.picture(copy)
        return Comparison() if None in pictures else compare(*pictures)

    def _picture(self, row: int) -> Picture | None:
        record = self.index.records(row)
        try:
            return Picture(read_image(record.path, exif=self.exif, size=SIDE), (record.width, record.height))
        except (ValueError, OSError):
            self.unreadable.add(row)
            return None

    def _score(self, i: int, j: int) -> float:
        return float(np.asarray(self.vectors[np.array([i, j])], dtype=np.float64).prod(0).sum())

    def _alike(self, i: int, j: int) -> bool:
        return self.look and self.alike(min(i, j), max(i, j))

    def _small(self) -> np.ndarray:
        """(N, 256) float16, `Picture.upright` of the rows that are compared, zeros elsewhere."""
        small = np.zeros((len(self.index), SMALL ** 2 // 4), dtype=np.float16)
        for row in told(self.rows.tolist(), 'Reading pictures', len(self.rows), self.progress):
            if picture := self.picture(row):
                small[row] = picture.upright
        return small

    def pairs(self, sides: np.ndarray | None = None) -> NearPairs:
        """The pairs above the threshold; if none was given, of those that are possible the ones that look the same.

        Args:
            sides: (N,) bool; only pairs of one image from either side.
        """
        if self.given is not None or not self.look:
            pairs = near_pairs(self.vectors, self.thresholds.certain, self.rows)
        else:
            pairs = near_pairs(self.vectors, self.thresholds.possible, self.rows, neighbours=NEIGHBOURS)
            small = self._small()
            more = near_pairs(small, ALIKE, np.flatnonzero(small.any(1)), neighbours=NEIGHBOURS)  # blurred, turned
            more = more.where(more.missing_in(pairs))
            scores = [self._score(i, j) for i, j in zip(more.first, more.second, strict=True)]
            pairs = NearPairs(*(np.append(a, b) for a, b in zip((pairs.first, pairs.second, pairs.scores), (
                more.first, more.second, scores), strict=True)), pairs.complete)
            looks = told(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), 'Looking at pictures',
                         len(pairs.first), self.progress)
            pairs = pairs.where(np.array([self._alike(i, j) for i, j in looks], dtype=bool))
        if sides is not None:
            pairs = pairs.where(sides[pairs.first] != sides[pairs.second])
        several = [row for row in pairs.rows().tolist() if holds_several(self.index.path_of(row))]
        self.complete, self.several = pairs.complete, len(several)
        return pairs.where(~(np.isin(pairs.first, several) | np.isin(pairs.second, several)))

    def identical_group(self, rows: Sequence[int]) -> CopyGroup:
        """The group of these identical files, the one to keep first."""
        kept, *others = map(self.candidate, rows)
        return CopyGroup('exact', (CopyFile(kept.record, 1., 'identical', keep=True), *(
            CopyFile(c.record, 1., 'identical', (), self.rules.is_preferred(c.record), self.rules.reason(kept, c))
            for c in others)))

    def groups(self, stars: Sequence[np.ndarray]) -> Iterator[CopyGroup]:
        """The groups of near copies of these rows each, the first one being the centre."""
        return map(self.group, told(stars, 'Comparing pictures', len(stars), self.progress))

    def group(self, rows: np.ndarray) -> CopyGroup:
        candidates, pictures = {row: self.candidate(row) for row in rows.tolist()}, {}
        if self.look:
            candidates = dict(zip(candidates, look_at(list(candidates.values()), self.exif), strict=True))
            pictures = {row: picture for row in candidates if (picture := self.picture(row))}
            candidates |= {row: replace(candidates[row], grey=picture.is_grey) for row, picture in pictures.items()}
        ranked = sorted(candidates, key=lambda row: self.rules.key(candidates[row]))
        while pictures and not candidates[ranked[0]].around and any(
                'inset' in self.compare(row, ranked[0]).edits for row in ranked[1:]):
            candidates[ranked[0]] = replace(candidates[ranked[0]], around=True)
            ranked.sort(key=lambda row: self.rules.key(candidates[row]))
        kept = candidates[ranked[0]]
        files = [CopyFile(kept.record, 1., keep=True)]
        for row in ranked[1:]:
            compared = self.compare(ranked[0], row) if pictures else Comparison()
            score, record = self._score(ranked[0], row), candidates[row].record
            look = self._alike(ranked[0], row) or self._alike(int(rows[0]), row)
            basis = 'details' if compared.certain else 'look' if look else 'descriptor'
            reason = self.rules.reason(kept, candidates[row])
            edits = compared.edits
            if compared.certain and not edits:
                edits = ('same pixels' if kept.pixels and kept.pixels == candidates[row].pixels else 'recompressed',)
            files.append(CopyFile(record, score, basis, edits, self.rules.is_preferred(record), reason))
        return CopyGroup('near', (files[0], *sorted(files[1:], key=lambda file: -file.score)))

    def result(self, groups: Iterable[CopyGroup], kind: type[Copies] = Copies, **options) -> Copies:
        """What is left of groups once their files have been checked, with the options of `verify`."""
        groups = [group for group in groups if group.others]  # not so where all are in folders that are preferred
        groups.sort(key=lambda group: (group.kind, os.fsencode(group.keep)))  # 'exact' before 'near'
        verified, changed = verify(groups, self.progress, **options)
        left_out = sum(any(file.record.path in changed for file in group.files) for group in groups)
        return kind(verified, self.thresholds, len(self.index), self.complete, len(self.unreadable), self.several,
                    tuple(changed), left_out)


def identical_rows(index: Index) -> list[np.ndarray]:
    """Rows of each set of identical files."""
    hashes = np.ascontiguousarray(index.columns['sha256']).view('>u8').reshape(len(index), 4)
    order = np.lexsort(hashes.T)
    same = (hashes[order][1:] == hashes[order][:-1]).all(1)
    return [rows for rows in np.split(order, np.flatnonzero(~same) + 1) if len(rows) > 1]


def verify(
        groups: Sequence[CopyGroup], progress: bool | Callable[[str], None], itself: bool = False,
) -> tuple[tuple[CopyGroup, ...], dict[str, None]]:
    """Groups whose files are all what was indexed, and the paths of the files that are not.

    An index is as old as its last update, and nobody is to delete by what it remembers. A group stays only if every
    file of it exists now with the size and time that were indexed, identical files with the same SHA-256, and no file
    is surplus to itself under another name, unless `itself`.
    """
    records = {file.record.path: file.record for group in groups for file in group.files}
    identical = {file.record.path for group in groups if group.kind == 'exact' for file in group.files}
    with ThreadPoolExecutor(4) as pool:
        looks = pool.map(lambda record: _identity(record, record.path in identical), records.values())
        seen = dict(zip(records, told(looks, 'Checking files', len(records), progress), strict=True))
    groups = [group for group in groups if all(seen[file.record.path] for file in group.files)]
    surplus = {file.record.path for group in groups for file in group.others}
    kept = {seen[group.keep] for group in groups if group.keep not in surplus}
    verified = []
    for group in groups:
        names, files = {seen[group.keep]} | kept, [group.files[0]]
        for file in group.files[1:]:
            # not that of a file that is in the group, or to be kept by another one
            if itself or seen[file.record.path] not in names:
                names.add(seen[file.record.path])
                files.append(file)
        group = replace(group, files=tuple(files))
        if group.others:
            verified.append(group)
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


@dataclass(frozen=True)
class EditRecall:
    """Shares of the copies found, and found for certain, by edit, and of how many pictures copies were made."""
    recall: Mapping[str, float]
    certain: Mapping[str, float]
    images: int

    def __str__(self) -> str:
        title, number = f'copies of {counted(self.images, "picture")}', max(1, len(self.recall))
        width = max(map(len, [title, *self.recall]))
        rows = [*((name, self.recall[name], self.certain[name]) for name in self.recall),
                ('mean', sum(self.recall.values()) / number, sum(self.certain.values()) / number)]
        return '\n'.join([f'{title:{width}}    found  certain', *(
            f'{name:{width}}  {100 * found:5.1f} %  {100 * certain:5.1f} %' for name, found, certain in rows)])


def measure_recall(
        index: Index,
        images: int = 50,
        threshold: float | None = None,
        *,
        false_positives: float = FALSE_POSITIVES,
        look: bool = True,
        edits: Mapping[str, Callable[[Image.Image], Image.Image]] = EDITS,
        progress: bool = False,
) -> EditRecall:
    """Make copies of pictures of an index in memory, embed them, and see which `find_copies` would find.

    Arguments are those of `find_copies`; images are how many to make copies of, drawn from a fixed seed, and edits the
    functions that make them, by name. UnreadableImage is raised where a picture was deleted.
    """
    if images < 1 or not len(index):
        raise ValueError(f'{images} of {counted(len(index), "image")} is nothing to measure on: take one at least.')
    search, model, protocol = CopySearch(index, threshold, false_positives, look), index.model(), index.protocol()
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:images])
    found, certain = dict.fromkeys(edits, 0), dict.fromkeys(edits, 0)
    chunks = np.split(rows, range(16, len(rows), 16))
    for chunk in told(chunks, 'Making copies, 16 pictures at a time', len(chunks), progress):
        images = [read_image(index.path_of(int(row)), exif=protocol.exif) for row in chunk]
        pictures = [Picture(image) for image in images]
        for name, edit in edits.items():
            copies = [edit(image) for image in images]
            vectors = embed_queries(model, protocol, copies).vectors.numpy()
            scores = (np.asarray(search.vectors[chunk], dtype=np.float32) * vectors).sum(1)
            if threshold is not None or not look:
                found[name] += int((scores >= search.thresholds.certain).sum())
                continue
            last = nearest(vectors, in_chunks(index.vectors), NEIGHBOURS)[0][:, -1].numpy() - 1e-5
            near = scores >= np.maximum(last, search.thresholds.possible)
            for picture, copy, is_near in zip(pictures, map(Picture, copies), near, strict=True):
                if is_near or picture.upright @ copy.upright >= ALIKE:
                    compared = compare(picture, copy)
                    found[name] += compared.alike
                    certain[name] += compared.certain
    return EditRecall(*({name: number / len(rows) for name, number in counts.items()} for counts in (found, certain)),
                      len(rows))
