"""Benchmarks that are lists of images: which of them are queries, which are searched, and which are right.

Of a list of one's own (`Entry`) where none is a query, each image is one among all the others; an image of the
gallery with neither label nor instance is a distractor; where the gallery has categories, a query is searched in its
own only. The published sets (`layouts`) are the same lists, read from the files they come with.
"""
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from timm_multigrain.files import counted, printable
from timm_multigrain.images.sources import Entry, ImageFiles, read_entries
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import RetrievalResult, knn_accuracy, mean_average_precision

from .base import Benchmark, Figure, Scores, SetFolder, part_of, some

CROP = {'kind': 'crop', 'crop_pct': 0.875, 'exif': False}  # of metric learning: shorter side 256, centre crop 224


class Listing(NamedTuple):
    """Images to search among, and to search with: None where each of the gallery is searched among all the others."""
    gallery: Sequence[Entry]
    queries: Sequence[Entry] | None = None


@dataclass(frozen=True)
class Layout:
    """A published set: how its files are read and how rankings are judged.

    Attributes:
        name: Name of the published set.
        source: Where it is to be had.
        read: What its files say.
        measures: 'Recall@10', 'mAP', 'mAP@100', 'MAP@R', 'k-NN'.
        counts: Queries and images of the gallery that it has, None where that is not known.
        published: As of `Benchmark`.
        prefer: Folder whose images win over others of the same name.
        downloads: As of `Benchmark`.
    """
    name: str
    source: str
    read: Callable[[SetFolder], Listing]
    measures: Sequence[str]
    counts: tuple[int, int] | None = None
    published: dict = field(default_factory=lambda: CROP)
    prefer: str | None = None
    downloads: Sequence[RemoteFile] = ()

    def load(self, data: str | os.PathLike, subset: bool = False) -> 'ListBenchmark':
        """The set in a folder.

        With `subset` the images that are there, and the queries that have something to find among them.
        """
        folder = SetFolder(data, self)
        return self._build(folder, self.read(folder), subset)

    def _build(self, folder: SetFolder, listing: Listing, subset: bool) -> 'ListBenchmark':
        alone = listing.queries is not None
        asked = listing.queries if alone else [e._replace(junk=[e.path]) for e in listing.gallery]
        found = self._find(folder, listing.gallery, asked, subset)
        gallery = [entry for entry in listing.gallery if entry.path in found]
        within = any(entry.category for entry in gallery)

        def part(entry: Entry) -> str:  # that is searched by itself
            return entry.category if within else ''

        by_path, by_wanted = {}, defaultdict(list)
        for place, entry in enumerate(gallery):
            by_path[entry.path, part(entry)] = place
            by_wanted[entry.wanted, part(entry)].append(place)

        def places(query: Entry, paths: Iterable[str]) -> np.ndarray:
            known = [by_path.get((path, part(query))) for path in paths]
            return np.array([place for place in known if place is not None], dtype=np.int64)

        queries, relevant, ignore = [], [], []
        for entry in asked:
            junk = places(entry, entry.junk)
            if entry.relevant is not None:
                right = places(entry, entry.relevant)
            else:
                right = by_wanted[entry.wanted, part(entry)] if entry.wanted else []
            right = np.setdiff1d(right, junk)
            if entry.path in found and len(right):
                queries.append(entry)
                relevant.append(right)
                ignore.append(junk)
        if not queries:
            raise ValueError(f'{folder.path} has no query of {self.name} with an image to find.')
        title = self.name
        if subset and self.counts != (len(queries), len(gallery)):
            title = part_of(title, len(queries), len(gallery))
        known = sorted({entry.label for entry in [*gallery, *queries]} - {''})
        numbers = {label: number for number, label in enumerate(known)}
        return ListBenchmark(
            title, _images(gallery, found), _images(queries, found) if alone else None,
            None if alone else np.concatenate([places(entry, [entry.path]) for entry in queries]),
            layout=self, relevant=relevant, ignore=ignore,
            parts=np.array([entry.category for entry in queries]),
            categories=np.array([entry.category for entry in gallery]) if within else None,
            query_groups=np.unique([entry.wanted for entry in queries], return_inverse=True)[1],
            query_labels=np.array([numbers.get(entry.label, -1) for entry in queries]),
            labels=np.array([numbers.get(entry.label, -2) for entry in gallery]))

    def _find(self, folder: SetFolder, gallery: Sequence[Entry], queries: Sequence[Entry],
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
        relevant: Places in the database that each query has to find.
        ignore: Places that are taken out of its ranking.
        parts: Category of each query, (Q,) texts; figures are given for each.
        categories: Category of each image of the database, where a query is searched in its own only.
        query_groups: What each query looks for, (Q,) integers.
        query_labels: Label of each query, (Q,) integers, -1 for none.
        labels: Label of each image of the database.
    """
    layout: Layout = None
    relevant: Sequence[np.ndarray] = ()
    ignore: Sequence[np.ndarray] = ()
    parts: np.ndarray = None
    categories: np.ndarray | None = None
    query_groups: np.ndarray = None
    query_labels: np.ndarray = None
    labels: np.ndarray = None

    @property
    def published(self) -> dict:
        return self.layout.published

    def measure(self, scores: Scores) -> list[Figure]:
        if self.categories is not None:
            scores = _Within(scores, self.parts, self.categories)
        found = mean_average_precision(scores, self.relevant, self.ignore)
        names = [name for name in dict.fromkeys(self.parts) if name]
        parts = {name: np.flatnonzero(self.parts == name) for name in sorted(names)}
        parts = {**parts, 'all': range(self.num_queries)} if len(parts) > 1 else {None: range(self.num_queries)}
        figures = [Figure(measure, 100 * _figure(RetrievalResult([found.ranks[row] for row in rows]), measure), part)
                   for part, rows in parts.items() for measure in self.layout.measures if measure != 'k-NN']
        if 'k-NN' in self.layout.measures and (self.query_labels >= 0).all():
            own = self.query_rows
            figures.append(Figure('k-NN', 100 * knn_accuracy(scores, self.query_labels, self.labels, own=own)))
        return figures


def _figure(result: RetrievalResult, measure: str) -> float:
    name, _, k = measure.partition('@')
    if k.isdecimal():
        return {'Recall': result.recall_at, 'mAP': result.map_at}[name](int(k))
    return {'mAP': result.map, 'MAP@R': result.map_at_r}[measure]


class _Within:
    """Scores in which images of another category than the query's come last; distractors are of every category."""

    def __init__(self, scores: Scores, queries: np.ndarray, items: np.ndarray):
        _, numbers = np.unique(np.concatenate([queries, items]), return_inverse=True)
        self.scores, self.queries, self.items = scores, *np.split(torch.from_numpy(numbers), [len(queries)])

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
