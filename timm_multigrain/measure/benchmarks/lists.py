"""Benchmarks that are lists of images: which of them are queries, which are searched, and which are right.

Of a list of one's own (`Entry`) where none is a query, each image is one among all the others; an image of the
gallery with neither label nor instance is a distractor; where the gallery has categories, a query is searched in its
own only. The published sets (`layouts`) are the same lists, read from the files they come with.
"""
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from timm_multigrain.files import check_json, counted, printable, read_json
from timm_multigrain.images.sources import Entry, ImageFiles, read_entries
from timm_multigrain.measure import metrics
from timm_multigrain.measure.archives import RemoteFile

from .base import Benchmark, Figure, Scores, SetFolder, part_of, some

DISTRACTOR, IGNORED = -1, -2
TRUTH = 'gt.json'
CROP = {'kind': 'crop', 'crop_pct': 0.875, 'exif': False}  # of metric learning: shorter side 256, centre crop 224


class Listing(NamedTuple):
    """Images to search among, and to search with.

    Without the latter these are the images of the gallery whose split is 'query', or all, each among all the others.
    """
    gallery: Sequence[Entry]
    queries: Sequence[Entry] | None = None


@dataclass(frozen=True)
class Layout:
    """A published set: how its files are read and how rankings are judged.

    Attributes:
        name: Name of the published set.
        source: Where it is to be had.
        read: What its files say.
        measures: 'Recall@10', 'mAP', 'mAP@100', 'MAP@R', 'k-NN', or 'N-S' alone: a query is one of its four, and a
            subset has all four of each thing. Or a function of a `ListBenchmark` and scores.
        counts: Queries and images of the gallery that it has, None where that is not known.
        published: As of `Benchmark`.
        prefer: Folder whose images win over others of the same name.
        downloads, task: As of `Benchmark`.
    """
    name: str
    source: str
    read: Callable[[SetFolder], Listing]
    measures: Sequence[str] | Callable[['ListBenchmark', Scores], list[Figure]]
    counts: tuple[int, int] | None = None
    published: dict = field(default_factory=lambda: CROP)
    prefer: str | None = None
    downloads: Sequence[RemoteFile] = ()
    task: str = 'retrieval'

    def load(self, data: str | os.PathLike, subset: bool = False) -> 'ListBenchmark':
        """The set in a folder.

        With `subset` the images that are there, and the queries that have something to find among them.
        """
        folder = SetFolder(data, self)
        return self._build(folder, self.read(folder), subset)

    def _build(self, folder: SetFolder, listing: Listing, subset: bool) -> 'ListBenchmark':
        among, marked = listing.queries is None, any(entry.split == 'query' for entry in listing.gallery)

        def asked(entries: Sequence[Entry]) -> dict[int, Entry]:
            return {row: entry for row, entry in enumerate(entries if among else listing.queries)
                    if not (among and marked) or entry.split == 'query'}

        found = self._find(folder, listing.gallery, asked(listing.gallery).values(), subset)
        gallery = [entry for entry in listing.gallery if entry.path in found]
        four = self.measures == ('N-S',)
        if four:
            there = Counter(entry.wanted for entry in gallery)
            gallery = [entry for entry in gallery if there[entry.wanted] == metrics.UKB_GROUP]
        within = any(entry.category for entry in gallery)
        by_path, by_wanted = defaultdict(list), defaultdict(list)

        def part(entry: Entry) -> str:  # that is searched by itself
            return entry.category if within else ''

        for place, entry in enumerate(gallery):
            by_path[entry.path, part(entry)].append(place)
            by_wanted[entry.wanted, part(entry)].append(place)
        queries, wanted, ignore = {}, [], []
        for row, entry in asked(gallery).items():
            junk = [place for path in entry.junk for place in by_path[path, part(entry)]] + [row] * (among and not four)
            if entry.relevant is not None:
                right = [place for path in entry.relevant for place in by_path[path, part(entry)]]
            else:
                right = by_wanted[entry.wanted, part(entry)] if entry.wanted else []
            if entry.path in found and any(place not in junk for place in right):
                queries[row] = entry
                wanted.append(right)  # shared by all queries of a group, of which there may be a million
                ignore.append(np.array(junk, np.int64))
        if not queries:
            raise ValueError(f'{folder.path} has no query of {self.name} with an image to find: {self.source}.')
        rows, queries = np.array(list(queries)), list(queries.values())
        title = self.name
        if subset and self.counts != (len(queries), len(gallery)):
            title = part_of(title, len(queries), len(gallery))
        return ListBenchmark(
            title, _images(gallery, found), None if among else _images(queries, found), rows if among else None,
            layout=self, gallery=gallery, asked=queries, wanted=wanted, ignore=ignore)

    def _find(self, folder: SetFolder, gallery: Sequence[Entry], queries: Collection[Entry],
              subset: bool) -> dict[str, Path]:
        """The files of all images; in a subset of those that are there."""
        names = list(dict.fromkeys(entry.path for entry in [*gallery, *queries]))
        if subset:
            return folder.find(names, self.prefer)
        found = dict(zip(names, folder.locate(names, self.prefer), strict=True))
        if self.counts not in (None, (len(queries), len(gallery))):
            raise FileNotFoundError(
                f'{folder.path} has {len(queries)} queries and {len(gallery)} images to search among, where '
                f'{self.name} has {self.counts[0]} and {self.counts[1]}: ask for a subset if that is meant; '
                f'{self.source}.')
        return found


class OwnGroups(Layout):
    """Images of one's own in groups of the same thing; every one of a group of two or more is a query."""

    def load(self, data: str | os.PathLike, ground_truth: str | os.PathLike | None = None,
             subset: bool = False) -> 'ListBenchmark':
        """Images of a folder in groups, which are subfolders, DIR/<group>/<image>, or in a file.

        Args:
            ground_truth: JSON object of paths, relative to the file's own folder, and the numbers of their groups, -1
                for a distractor, -2 for an image to leave out; what lies outside of `data` is passed over. None:
                gt.json of the folder, if there is one, or else the subfolders.
            subset: Leave out images that the file names and that are not there.
        """
        folder = SetFolder(data, self)
        if ground_truth is None and (folder.path / TRUTH).is_file():
            ground_truth = folder.path / TRUTH
        if ground_truth is not None:
            entries = _read_groups(folder.path, Path(ground_truth), subset)
        elif loose := [name for name in folder.names if '/' not in name]:
            raise ValueError(f'{data} holds images outside of groups ({some(loose)}): put each into {data}/<group>/, '
                             f'or say the groups in {TRUTH}.')
        else:
            entries = [Entry(name, instance=name.rpartition('/')[0]) for name in folder.names]
        return replace(self, name=folder.path.resolve().name)._build(folder, Listing(entries), subset)

    def _find(self, folder: SetFolder, gallery: Sequence[Entry], *_) -> dict[str, Path]:
        return {entry.path: folder.path / entry.path for entry in gallery}


def _read_groups(data: Path, path: Path, subset: bool) -> list[Entry]:
    content = read_json(path)
    check_json(content, {str: int}, str(path))
    wrong = next((name for name, group in content.items() if group < IGNORED), None)
    if wrong is not None:
        raise ValueError(f'{path}: the group of {printable(wrong)} is {content[wrong]}, and has to be at least 0, or '
                         f'{DISTRACTOR} for a distractor or {IGNORED} for an image to leave out.')
    inside, base = {}, data.resolve()
    for name, group in content.items():
        image = Path(os.path.normpath(path.resolve().parent / name))
        if group != IGNORED and image.is_relative_to(base):
            inside[image.relative_to(base).as_posix()] = group
    missing = {name: None for name in inside if not (data / name).is_file()}
    if (missing and not subset) or not inside:
        raise FileNotFoundError(f'{data} lacks {len(missing)} of the {len(inside)} images that {path} names there'
                                + (f': {some(list(missing))}.' if missing else '.'))
    return [Entry(name, instance='' if group == DISTRACTOR else str(group)) for name, group in sorted(inside.items())
            if name not in missing]


class OwnList(Layout):
    """A list of one's own."""

    def load(self, data: str | os.PathLike, ground_truth: str | os.PathLike | None = None,
             subset: bool = False) -> 'ListBenchmark':
        """The images of a list.

        Args:
            data: Folder of the images.
            ground_truth: The list, .csv or .jsonl; by default list.csv or list.jsonl of the folder.
            subset: Take the images that are there, and the queries that have something to find among them.
        """
        folder = SetFolder(data, self)
        path = Path(ground_truth) if ground_truth else folder.file('list.csv', 'list.jsonl')
        entries = [entry for entry in read_entries(path) if entry.split != 'train']
        for entry, number in Counter(entries).most_common(1):
            if number > 1:  # it would find itself
                raise ValueError(f'{printable(path)} lists {printable(entry.path)} {number} times: leave one.')
        queries = [entry for entry in entries if entry.split == 'query']
        unclear = [entry.path for entry in entries if entry.split not in ('query', 'gallery')]
        if queries and unclear:
            raise ValueError(f'{printable(path)} has queries, and does not say of {counted(len(unclear), "image")} '
                             f'({some(unclear)}) whether they are of the gallery: give each a split.')
        listing = Listing([entry for entry in entries if entry.split == 'gallery'], queries)
        named = replace(self, name=folder.path.resolve().name)
        return named._build(folder, listing if queries else Listing(entries), subset)


@dataclass(frozen=True, eq=False)
class ListBenchmark(Benchmark):
    """A set that is a list.

    Attributes:
        layout: What it was read by.
        gallery: What the list says of each image of the database.
        asked: What it says of each query.
        wanted: Places in the database of what each query looks for, those of `ignore` perhaps among them.
        ignore: Places that are taken out of its ranking.
    """
    layout: Layout = None
    gallery: Sequence[Entry] = ()
    asked: Sequence[Entry] = ()
    wanted: Sequence[Sequence[int]] = ()
    ignore: Sequence[np.ndarray] = ()

    @property
    def published(self) -> dict:
        return self.layout.published

    @property
    def task(self) -> str:
        return self.layout.task

    @cached_property
    def relevant(self) -> list[np.ndarray]:
        """Places in the database that each query has to find."""
        return [np.setdiff1d(np.array(own, np.int64), junk) for own, junk in zip(self.wanted, self.ignore, strict=True)]

    @property
    def groups(self) -> np.ndarray:
        """What each image of the database shows, (N,) integers, -1 for nothing that is known."""
        return self._numbers('wanted')[0]

    @property
    def query_groups(self) -> np.ndarray:
        """What each query looks for, (Q,) integers."""
        return self._numbers('wanted')[1]

    def _numbers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A field of the images of the database, and of the queries, as integers, -1 where it is empty."""
        texts = [getattr(entry, name) for entry in [*self.gallery, *self.asked]]
        numbers = {text: number for number, text in enumerate(sorted({*texts} - {''}))}
        found = np.array([numbers.get(text, -1) for text in texts])
        return found[:len(self.gallery)], found[len(self.gallery):]

    def measure(self, scores: Scores) -> list[Figure]:
        if callable(self.layout.measures):
            return self.layout.measures(self, scores)
        if self.layout.measures == ('N-S',):
            return [Figure('N-S', metrics.ukb_score(scores, self.groups))]
        items, queries = self._numbers('category')
        if (items >= 0).any():
            scores = _Within(scores, queries, items)
        found = metrics.mean_average_precision(scores, self.relevant, self.ignore)
        parts = defaultdict(list)
        for row, entry in enumerate(self.asked):
            parts[entry.category].append(row)
        parts = {name: parts[name] for name in sorted(parts) if name}
        parts = {**parts, 'all': range(self.num_queries)} if len(parts) > 1 else {None: range(self.num_queries)}
        results = {part: metrics.RetrievalResult([found.ranks[row] for row in rows]) for part, rows in parts.items()}
        figures = [Figure(measure, 100 * _figure(result, measure), part)
                   for part, result in results.items() for measure in self.layout.measures if measure != 'k-NN']
        labels, query_labels = self._numbers('label')
        if 'k-NN' in self.layout.measures and min(query_labels) >= 0:
            figures.append(Figure('k-NN', 100 * metrics.knn_accuracy(
                scores, query_labels, labels, own=self.query_rows)))
        return figures


def _figure(result: metrics.RetrievalResult, measure: str) -> float:
    name, _, k = measure.partition('@')
    if k.isdecimal():
        return {'Recall': result.recall_at, 'mAP': result.map_at}[name](int(k))
    return {'mAP': result.map, 'MAP@R': result.map_at_r}[measure]


class _Within:
    """Scores in which images of another category than the query's come last; distractors are of every category."""

    def __init__(self, scores: Scores, queries: np.ndarray, items: np.ndarray):
        self.scores, self.queries, self.items = scores, torch.from_numpy(queries), torch.from_numpy(items)

    def __iter__(self) -> Iterator[torch.Tensor]:
        start = 0
        for chunk in self.scores:
            items = self.items[start:start + chunk.shape[1]]
            other = torch.zeros(chunk.shape, dtype=torch.bool)
            other[:, :len(items)] = self.queries[:, None] != items
            start += chunk.shape[1]
            yield chunk.masked_fill(other.to(chunk.device), -torch.inf)


def _images(entries: Sequence[Entry], found: dict[str, Path]) -> ImageFiles:
    boxes = [entry.box for entry in entries]
    return ImageFiles([found[entry.path] for entry in entries], names=[entry.path for entry in entries],
                      boxes=boxes if any(boxes) else None)
