"""What a benchmark is (images to search among, images to search with, how the ranking is judged), and its files."""
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from timm_multigrain.files import printable
from timm_multigrain.images.sources import ImageFiles, ImageSource, image_names
from timm_multigrain.measure.archives import RemoteFile

__all__ = ['Benchmark', 'Figure', 'Scores', 'SetFolder', 'some']

Scores = Iterable[torch.Tensor]


class Figure(NamedTuple):
    """One measured value, in percent, or of 4 for 'N-S'; `split` is a part of the set."""
    metric: str
    value: float
    split: str | None = None


@dataclass(frozen=True, eq=False)
class Benchmark(ABC):
    """A set of images with ground truth, made by its `load(data, ...)` from the layout it is published in.

    Attributes:
        title: Name in tables and figures, with what makes it another than the published one.
        database: Images to search among.
        queries: Images to search with; None where they are images of the database.
        query_rows: Which images of the database the queries are, (Q,) integers; None where they are others.
        name: Name of the published set.
        source: Where it is to be had.
        downloads: Its files, where they have a public address.
        task: 'retrieval' or 'copy-detection'.
        published: How the public evaluation prepares the images, as arguments of `Protocol.for_model`.
    """
    title: str
    database: ImageSource
    queries: ImageSource | None = None
    query_rows: np.ndarray | None = None

    name: ClassVar[str]
    source: ClassVar[str]
    downloads: ClassVar[Sequence[RemoteFile]] = ()
    task: ClassVar[str] = 'retrieval'
    published: ClassVar[dict] = {'exif': False}  # the public evaluators open files as they are stored

    @property
    def num_queries(self) -> int:
        return len(self.query_rows) if self.queries is None else len(self.queries)

    @abstractmethod
    def measure(self, scores: Scores) -> list[Figure]:
        """Judge similarities, (Q, n) chunks of columns in the order of the database and then of the distractors."""


class SetFolder:
    """The folder of a set, whose images are found by name wherever an archive put them."""

    def __init__(self, folder: str | os.PathLike, benchmark: type[Benchmark]):
        self.path, self.benchmark = Path(folder), benchmark
        if not self.path.is_dir():
            raise FileNotFoundError(f'{benchmark.name} not found: {folder} is not a folder; {benchmark.source}.')
        self.names = image_names(self.path)

    def files(self, names: Iterable[str]) -> ImageFiles:
        """Images by path relative to the folder."""
        names = list(names)
        return ImageFiles([self.path / name for name in names], names=names)

    def locate(self, names: Sequence[str], prefer: str | None = None) -> list[Path]:
        """Files of these names (with or without suffix), in their order, wherever they are below the folder.

        A file in a folder named `prefer` wins over files of the same name elsewhere.
        """
        wanted, found = set(names), {}
        for path in self.names:
            base = path.rpartition('/')[2]
            for key in wanted.intersection((base, os.path.splitext(base)[0])):
                found.setdefault(key, []).append(path)
        missing = [name for name in names if name not in found]
        if missing:
            raise FileNotFoundError(f'{self.path} lacks {len(missing)} of the {len(names)} images of '
                                    f'{self.benchmark.name}: {some(missing)}; {self.benchmark.source}.')
        for name, paths in found.items():
            inside = [path for path in paths if prefer in path.split('/')[:-1]]
            found[name] = inside if len(inside) == 1 else paths
            if len(found[name]) > 1:
                raise ValueError(f'{self.path} has the image {name} more than once ({some(paths)}): leave one.')
        return [self.path / found[name][0] for name in names]


def some(names: Sequence[str], number: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - number} more' if len(names) > number else ''
    return ', '.join(map(printable, names[:number])) + more
