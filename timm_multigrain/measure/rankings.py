"""Similarities of a benchmark's queries to its database, streamed, with what may be done before they are judged."""
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from timm_multigrain.images.sources import ImageSource
from timm_multigrain.search.exact import SimilarityChunks, similarity_chunks
from timm_multigrain.search.rerank import (
    alpha_query_expansion,
    database_augmentation,
    normalize_scores,
    score_offsets,
)

from .benchmark_vectors import BenchmarkVectors

__all__ = ['AfterRanking', 'normalize', 'rank']

NORM_NEIGHBOR, NORM_WEIGHT = 10, 2.0  # of the organisers of DISC21


@dataclass(frozen=True)
class AfterRanking:
    """What is done with the descriptors after the first ranking; see `timm_multigrain.search.rerank`.

    Attributes:
        qe: Neighbours k and alpha of the query expansion, None without.
        dba: Neighbours k and alpha of the database-side augmentation, None without.
        score_norm: Images whose similarity to a query is taken off its scores, True for the training images that the
            benchmark has, None without. The figures of copy detection are then given both ways.
    """
    qe: tuple[int, float] | None = None
    dba: tuple[int, float] | None = None
    score_norm: ImageSource | str | os.PathLike | bool | None = None

    def __str__(self) -> str:
        both = ('query expansion', self.qe), ('database augmentation', self.dba)
        return ', '.join(f'{name} k={value[0]} alpha={value[1]:g}' for name, value in both if value)


class Shards:
    """A database that is read anew each time it is iterated."""

    def __init__(self, read: Callable[[], Iterator[torch.Tensor]]):
        self.read = read

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.read()


def rank(vectors: BenchmarkVectors, system: int, after: AfterRanking, query_rows: np.ndarray | None = None,
         device: str | torch.device = 'cpu') -> SimilarityChunks:
    """Similarities of the queries to the database and the distractors, piece by piece, as often as they are iterated.

    Args:
        vectors: Descriptors of the benchmark.
        system: Which of its systems.
        after: What to do before they are judged; database-side augmentation reads the whole database into memory.
        query_rows: Where queries are images of the database: which.
        device: Where to multiply.
    """
    queries = vectors.queries(system).to(device)
    database = Shards(lambda: vectors.database(system))
    if after.dba:
        k, alpha = after.dba
        database = database_augmentation(torch.cat(list(database)).to(device), k, alpha)
        if query_rows is not None:
            queries = database[torch.from_numpy(query_rows)]
    if after.qe:
        k, alpha = after.qe
        rows = None if query_rows is None else torch.from_numpy(query_rows)
        queries = alpha_query_expansion(queries, database, k, alpha, rows)
    return similarity_chunks(queries, database)


def normalize(scores: SimilarityChunks, vectors: BenchmarkVectors, system: int) -> Iterable[torch.Tensor]:
    """The same with the similarity of each query to the training images taken off, as the organisers of DISC21 do."""
    background = Shards(lambda: vectors.training(system))
    place = NORM_NEIGHBOR - 1
    return normalize_scores(scores, score_offsets(scores.queries, background, NORM_WEIGHT, place, place))
