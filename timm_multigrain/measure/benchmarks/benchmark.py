"""What a benchmark is: the images to search among, the images to search with, and how the ranking is judged."""
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from timm_multigrain.images.sources import ImageSource

__all__ = ['Benchmark', 'Figure', 'Scores']

Scores = Iterable[torch.Tensor]


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        metric: 'mAP', 'mP@10', 'N-S', 'uAP', 'recall@P90'.
        value: In the unit it is quoted in: percent, or of 4 for N-S.
        split: Part of the set, such as 'Medium'.
    """
    metric: str
    value: float
    split: str | None = None


@dataclass(frozen=True, eq=False)
class Benchmark(ABC):
    """A set of images with ground truth.

    Attributes:
        title: Name in tables and figures, with what makes it another than the published one.
        database: Images to search among.
        queries: Images to search with; None where they are images of the database.
        query_rows: Which images of the database the queries are, (Q,) integers; None where they are others.
        published: How the public evaluation prepares the images, as arguments of `Protocol.for_model`.
    """
    title: str
    database: ImageSource
    queries: ImageSource | None = None
    query_rows: np.ndarray | None = None

    task: ClassVar[str] = 'retrieval'
    published: ClassVar[dict] = {'exif': False}  # the public evaluators open files as they are stored

    @property
    def num_queries(self) -> int:
        return len(self.query_rows) if self.queries is None else len(self.queries)

    @abstractmethod
    def measure(self, scores: Scores) -> list[Figure]:
        """Judge a ranking.

        Args:
            scores: Similarities as (Q, n) chunks of columns, in the order of the database and then of the
                distractors. It can be iterated more than once.
        """
