"""Measures of the revisited Oxford and Paris benchmarks, and of any set with easy, hard and junk images.

`Revisiting Oxford and Paris: large-scale image retrieval benchmarking`, Radenović et al. 2018. Of each query's labelled
images, Easy looks for the easy ones, Medium for the easy and hard ones, Hard for the hard ones; the other labelled
images, the junk always among them, are taken out of the ranking. A query without an image to find is left out of a
mean. Precision at k counts to the last relevant image if that comes earlier than k.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import average_precision
from .ranking import Indices, Scores, outranking, to_indices
from .result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['RevisitedPart', 'RevisitedQuery', 'RevisitedResult', 'revisited_scores']

KAPPAS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class RevisitedQuery:
    """Database indices of the labelled images of a query, in three lists that share none."""
    easy: Indices
    hard: Indices
    junk: Indices = ()


@dataclass(frozen=True, eq=False)
class RevisitedPart(Result):
    """One of the three protocols.

    Attributes:
        name: 'Easy', 'Medium' or 'Hard'.
        ap: Average precision of each query, (Q,) float64 in [0, 1]; NaN for a query without an image to find.
        precisions: Precision at each k of each query, k: (Q,) float64 in [0, 1], NaN likewise.
    """
    name: str
    ap: np.ndarray = field(repr=False)
    precisions: Mapping[int, np.ndarray] = field(repr=False)

    @property
    def map(self) -> float:
        """Mean of `ap` over the queries with an image to find, in [0, 1]."""
        return float(np.nanmean(self.ap))

    @property
    def mp_at(self) -> dict[int, float]:
        """Mean precision at each k, in [0, 1]."""
        return {k: float(np.nanmean(values)) for k, values in self.precisions.items()}

    @property
    def num_queries(self) -> int:
        """Queries with an image to find."""
        return int(np.isfinite(self.ap).sum())

    def to_dict(self) -> dict[str, Any]:
        return {'map': self.map, 'mp_at': self.mp_at, 'num_queries': self.num_queries, 'ap': self.ap}

    def plot(self, axes: 'Axes') -> None:
        """Average precision of the queries, from the worst to the best."""
        axes.plot(100 * np.sort(self.ap[np.isfinite(self.ap)]), drawstyle='steps-mid',
                  label=f'{self.name}, mAP {100 * self.map:.2f} %')
        axes.set(xlabel='queries, worst first', ylabel='average precision, %', ylim=(-2, 102))

    def __str__(self) -> str:
        precisions = ', '.join(f'mP@{k} {100 * value:.2f} %' for k, value in self.mp_at.items())
        return f'{self.name:6} mAP {100 * self.map:.2f} %, {precisions} over {self.num_queries} queries'


@dataclass(frozen=True, eq=False)
class RevisitedResult(Result):
    """The three protocols; None where no query has an image to find."""
    easy: RevisitedPart | None
    medium: RevisitedPart | None
    hard: RevisitedPart | None

    @property
    def parts(self) -> list[RevisitedPart]:
        """Those that were measured."""
        return [part for part in (self.easy, self.medium, self.hard) if part is not None]

    def to_dict(self) -> dict[str, Any]:
        return {part.name.lower(): part.to_dict() for part in self.parts}

    def plot(self, axes: 'Axes') -> None:
        """Average precision of the queries, a curve for each protocol."""
        for part in self.parts:
            part.plot(axes)
        axes.legend()

    def __str__(self) -> str:
        return '\n'.join(map(str, self.parts))


def revisited_scores(
        scores: Scores,
        queries: Sequence[RevisitedQuery],
        kappas: Sequence[int] = KAPPAS,
) -> RevisitedResult:
    """Easy, Medium and Hard mean average precision and mean precision at k.

    Args:
        scores: Similarities, higher is nearer: (Q, N), or (Q, n) pieces in database order, distractors last
            (`ranking.outranking` says when a stream is read twice); any real dtype, infinities allowed. Ties count
            against the system.
        queries: Ground truth of each query.
        kappas: The k of the precisions.

    Raises:
        ValueError: If shapes disagree, a score is NaN, no query has an image to find, or indices are not integers,
            repeat or lie outside 0 to N - 1.
    """
    labelled = [_labelled(number, query) for number, query in enumerate(queries)]
    if not any(len(query.easy) or len(query.hard) for query in queries):
        raise ValueError('No query has an easy or a hard image: there is nothing to find.')
    if min(kappas, default=1) < 1:
        raise ValueError(f'kappas are {list(kappas)}, and have to be 1 or more.')
    # In each protocol the images labelled otherwise are taken out, so that the unlabelled ones are all that is wrong.
    above = outranking(scores, labelled)
    easy, medium, hard = [], [], []
    for row, query in zip(above, queries, strict=True):
        first, both = len(query.easy), len(query.easy) + len(query.hard)
        easy.append(row[:first])
        medium.append(row[:both])
        hard.append(row[first:both])
    return RevisitedResult(_part('Easy', easy, kappas), _part('Medium', medium, kappas), _part('Hard', hard, kappas))


def _labelled(number: int, query: RevisitedQuery) -> np.ndarray:
    """Easy, then hard, then junk images."""
    indices = np.concatenate([
        to_indices(getattr(query, name), f'{name} of query {number}') for name in ('easy', 'hard', 'junk')])
    values, counts = np.unique(indices, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f'Query {number}: images {values[counts > 1]} are in more than one of easy, hard and junk.')
    return indices


def _part(name: str, above: Sequence[np.ndarray], kappas: Sequence[int]) -> RevisitedPart | None:
    if not any(map(len, above)):
        return None
    ap = np.full(len(above), np.nan)
    precisions = {k: np.full(len(above), np.nan) for k in kappas}
    for query, row in enumerate(above):
        if len(row):
            ranks = np.sort(row) + np.arange(len(row))
            ap[query] = average_precision(ranks, len(row))
            for k, values in precisions.items():
                depth = min(k, ranks[-1] + 1)
                values[query] = (ranks < depth).sum() / depth
    return RevisitedPart(name, ap, precisions)
