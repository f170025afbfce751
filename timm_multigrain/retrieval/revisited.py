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

from .metrics import average_precisions
from .ranking import Indices, Labelled, Scores, outranking, ranks_in_rows
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
    names = ('easy', 'hard', 'junk')
    labelled = Labelled.of([[getattr(query, name) for query in queries] for name in names], names)
    if not (labelled.kinds < 2).any():
        raise ValueError('No query has an easy or a hard image: there is nothing to find.')
    if min(kappas, default=1) < 1:
        raise ValueError(f'kappas are {list(kappas)}, and have to be 1 or more.')
    # Each protocol takes out the images that are labelled otherwise, so that what is wrong is unlabelled in all three.
    above = outranking(scores, labelled)
    wanted = {'Easy': labelled.kinds == 0, 'Medium': labelled.kinds < 2, 'Hard': labelled.kinds == 1}
    return RevisitedResult(*(
        _part(name, above[images], labelled.rows[images], len(queries), kappas) for name, images in wanted.items()))


def _part(name: str, above: np.ndarray, rows: np.ndarray, num_queries: int,
          kappas: Sequence[int]) -> RevisitedPart | None:
    if not len(rows):
        return None
    ranks, found = ranks_in_rows(above, rows)
    ap = average_precisions(ranks, found, rows, num_queries)
    end = np.zeros(num_queries)
    end[rows] = ranks + 1  # the last one of a query stays
    precisions = {}
    for k in kappas:
        depth = np.where(np.isnan(ap), np.nan, np.minimum(k, end))
        precisions[k] = np.bincount(rows, ranks < depth[rows], num_queries) / depth
    return RevisitedPart(name, ap, precisions)
