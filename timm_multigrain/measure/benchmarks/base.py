"""What a benchmark is (images to search among, images to search with, how the ranking is judged), and its files."""
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from timm_multigrain.files import counted, printable
from timm_multigrain.images.sources import ImageSource, image_names
from timm_multigrain.measure.archives import RemoteFile

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
    """The folder of a set, whose images are found by name wherever an archive put them.

    Args:
        benchmark: What has the `name` and the `source` of the set.
    """

    def __init__(self, folder: str | os.PathLike, benchmark: Any):
        self.path, self.benchmark = Path(folder), benchmark
        if not self.path.is_dir():
            raise FileNotFoundError(f'{benchmark.name} not found: {folder} is not a folder; {benchmark.source}.')
        self.names = image_names(self.path)

    def find(self, names: Iterable[str], prefer: str | None = None) -> dict[str, Path]:
        """Those of these files that are below the folder, wherever an archive put them.

        Args:
            names: Paths, or ends of paths such as 'a.jpg' or 'birds/a.jpg', with or without suffix.
            prefer: A file in a folder of this name wins over files of the same name elsewhere.
        """
        wanted, found = set(names), {}
        for path in self.names:
            ends = [path.split('/', skip)[skip] for skip in range(path.count('/') + 1)]
            for key in wanted.intersection(ends + [os.path.splitext(end)[0] for end in ends]):
                found.setdefault(key, []).append(path)
        found.update({name: [name] for name in wanted.intersection(self.names) if '/' in name})  # a whole path
        for name, paths in found.items():
            inside = [path for path in paths if prefer in path.split('/')[:-1]]
            found[name] = inside if len(inside) == 1 else paths
            if len(found[name]) > 1:
                raise ValueError(f'{self.path} has the image {name} more than once ({some(paths)}): leave one.')
        return {name: self.path / paths[0] for name, paths in found.items()}

    def locate(self, names: Sequence[str], prefer: str | None = None) -> list[Path]:
        """All of these files, as of `find`, in their order."""
        found = self.find(names, prefer)
        missing = [name for name in names if name not in found]
        if missing:
            raise FileNotFoundError(f'{self.path} lacks {len(missing)} of the {len(names)} images of '
                                    f'{self.benchmark.name}: {some(missing)}; {self.benchmark.source}.')
        return [found[name] for name in names]

    def file(self, *names: str) -> Path:
        """The one file of such a name in the folder or below it, of several names the first that is found."""
        for name in names:
            found = sorted(self.path.rglob(name))
            if len(found) > 1:
                raise FileNotFoundError(f'{self.path} has {name} more than once ({some(list(map(str, found)))}): leave '
                                        'one.')
            if found:
                return found[0]
        raise FileNotFoundError(f'{self.path} has no {" or ".join(names)} of {self.benchmark.name}; '
                                f'{self.benchmark.source}.')


def some(names: Sequence[str], number: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - number} more' if len(names) > number else ''
    return ', '.join(map(printable, names[:number])) + more


def part_of(title: str, queries: int, images: int) -> str:
    """Title of a part of a set, with so many queries and images to search among."""
    return f'{title} ({counted(queries, "query")}, {counted(images, "image")})'
