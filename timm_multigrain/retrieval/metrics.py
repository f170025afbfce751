"""Average precision of a ranked list as INRIA Holidays defines it: area under the recall-precision curve, by trapezia.

Ties count against the system: among equal scores every irrelevant item stands before every relevant one, so that
constant scores earn the worst value rather than a lucky one.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .ranking import Indices, Labelled, Scores, outranking, ranks_in_rows, to_indices
from .result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['RetrievalResult', 'average_precision', 'average_precisions', 'mean_average_precision']


@dataclass(frozen=True, eq=False)
class RetrievalResult(Result):
    """Mean average precision over queries.

    Attributes:
        ap: Average precision of each query, (Q,) float64 in [0, 1].
    """
    ap: np.ndarray = field(repr=False)

    @property
    def map(self) -> float:
        """Mean of `ap`, in [0, 1]."""
        return float(self.ap.mean())

    @property
    def num_queries(self) -> int:
        return len(self.ap)

    def to_dict(self) -> dict[str, Any]:
        return {'map': self.map, 'num_queries': self.num_queries, 'ap': self.ap}

    def plot(self, axes: 'Axes') -> None:
        """Average precision of the queries, from the worst to the best."""
        axes.plot(np.sort(100 * self.ap), drawstyle='steps-mid')
        axes.axhline(100 * self.map, color='gray', linestyle='--', linewidth=1)
        axes.set(xlabel='queries, worst first', ylabel='average precision, %', ylim=(-2, 102), title=str(self))

    def __str__(self) -> str:
        return f'mAP {100 * self.map:.2f} % over {self.num_queries} quer{"y" if self.num_queries == 1 else "ies"}'


def average_precision(ranks_of_relevant: Indices, num_relevant: int) -> float:
    """Trapezoidal average precision of one ranked list.

    Each relevant item adds the mean of the precision just before it and at it, times 1 / `num_relevant`; before the
    first item of the list precision is 1.

    Args:
        ranks_of_relevant: 0-based ranks of the relevant items found, in any order, after ignored items (such as the
            query itself) are taken out of the list.
        num_relevant: Number of relevant items, found or not.

    Raises:
        ValueError: If ranks repeat or are negative, or there are no or fewer than `len(ranks_of_relevant)` items.
    """
    ranks = np.sort(to_indices(ranks_of_relevant, 'ranks_of_relevant'))
    if num_relevant < max(1, len(ranks)):
        raise ValueError(f'num_relevant is {num_relevant} with {len(ranks)} relevant ranks.')
    return float(_trapezia(ranks, np.arange(len(ranks))).sum() / num_relevant)


def average_precisions(ranks: np.ndarray, found: np.ndarray, rows: np.ndarray, num_queries: int) -> np.ndarray:
    """Trapezoidal average precision of many ranked lists, all of whose relevant items were found.

    Args:
        ranks: 0-based ranks of the relevant items, (L,), ascending within a query.
        found: How many relevant items of the query stand before each.
        rows: Query of each, ascending.
        num_queries: Number of queries.

    Returns:
        (num_queries,) float64; NaN for a query without relevant items.
    """
    sums = np.bincount(rows, _trapezia(ranks, found), num_queries)
    counts = np.bincount(rows, minlength=num_queries)
    return np.where(counts == 0, np.nan, sums / np.maximum(counts, 1))


def mean_average_precision(
        scores: Scores,
        relevant: Sequence[Indices],
        ignore: Sequence[Indices] | None = None,
) -> RetrievalResult:
    """Mean average precision of Q queries over N database items, without sorting the database.

    Args:
        scores: Similarities, higher is nearer: (Q, N), or (Q, n) pieces in database order (`ranking.outranking` says
            when a stream of them is read twice); any real dtype, infinities allowed.
        relevant: Database indices of the relevant items of each query, at least one each.
        ignore: Database indices to leave out of each query's list (such as the query itself), or None.

    Raises:
        ValueError: If shapes disagree, a score is NaN, a query has no relevant item, or indices are not integers,
            repeat, lie outside 0 to N - 1, or are both relevant and ignored.
    """
    ignore = [()] * len(relevant) if ignore is None else ignore
    labelled = Labelled.of((relevant, ignore), ('relevant', 'ignore'))
    for query, items in enumerate(relevant):
        if not len(items):
            raise ValueError(f'relevant[{query}] is empty: leave queries without a relevant item out.')
    above, wanted = outranking(scores, labelled), labelled.kinds == 0
    rows = labelled.rows[wanted]
    return RetrievalResult(average_precisions(*ranks_in_rows(above[wanted], rows), rows, len(relevant)))


def _trapezia(ranks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Mean of the precision just before each relevant item and at it."""
    before = np.where(ranks == 0, 1., found / np.maximum(ranks, 1))
    return (before + (found + 1) / (ranks + 1)) / 2
