"""Average precision of a ranked list as INRIA Holidays defines it: area under the recall-precision curve, by trapezia.

Positions are exact and found without sorting the database. Ties count against the system: among equal scores every
irrelevant item stands before every relevant one, so that constant scores earn the worst value rather than a lucky one.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

__all__ = ['RetrievalResult', 'average_precision', 'mean_average_precision']

Array = np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class RetrievalResult:
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

    def __str__(self) -> str:
        return f'mAP {100 * self.map:.2f} % over {self.num_queries} quer{"y" if self.num_queries == 1 else "ies"}'


def average_precision(ranks_of_relevant: Sequence[int] | Array, num_relevant: int) -> float:
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
    ranks = np.sort(_to_indices(ranks_of_relevant, 'ranks_of_relevant'))
    if num_relevant < max(1, len(ranks)):
        raise ValueError(f'num_relevant is {num_relevant} with {len(ranks)} relevant ranks.')
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1., found / np.maximum(ranks, 1))
    return float((before + (found + 1) / (ranks + 1)).sum() / (2 * num_relevant))


def mean_average_precision(
        scores: Array,
        relevant: Sequence[Sequence[int] | Array],
        ignore: Sequence[Sequence[int] | Array] | None = None,
) -> RetrievalResult:
    """Mean average precision of Q queries over N database items, in O(N log R) a query with R relevant items.

    The rank of a relevant item is the number of relevant items before it plus the number of irrelevant items that
    score at least as much.

    Args:
        scores: Similarities, (Q, N), higher is nearer; any real dtype, infinities allowed.
        relevant: Database indices of the relevant items of each query, at least one each.
        ignore: Database indices to leave out of each query's list (such as the query itself), or None.

    Raises:
        ValueError: If shapes disagree, a score is NaN, a query has no relevant item, or indices are not integers,
            repeat, lie outside 0 to N - 1, or are both relevant and ignored.
    """
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f'scores must have shape (queries, items) with at least one query, got {tuple(scores.shape)}.')
    ignore = [()] * len(scores) if ignore is None else ignore
    if not len(scores) == len(relevant) == len(ignore):
        raise ValueError(f'{len(scores)} rows of scores, {len(relevant)} relevant lists, {len(ignore)} ignore lists.')
    return RetrievalResult(np.array([_query_ap(i, scores[i], relevant[i], ignore[i]) for i in range(len(scores))]))


def _query_ap(query: int, scores: Array, relevant: Sequence[int] | Array, ignore: Sequence[int] | Array) -> float:
    scores = _to_row(scores, query)
    relevant, ignore = _to_indices(relevant, f'relevant[{query}]'), _to_indices(ignore, f'ignore[{query}]')
    if not len(relevant):
        raise ValueError(f'relevant[{query}] is empty: leave queries without a relevant item out.')
    left_out = np.concatenate([relevant, ignore])
    if left_out.max() >= len(scores):
        raise ValueError(f'Query {query}: index {left_out.max()} is out of range for {len(scores)} items.')
    if len(np.unique(left_out)) < len(left_out):
        raise ValueError(f'Query {query}: items {np.intersect1d(relevant, ignore)} are both relevant and ignored.')
    levels = np.sort(scores[relevant])
    count = _count_levels(levels, scores) - _count_levels(levels, scores[left_out])
    irrelevant_before = count[::-1].cumsum()[:-1]  # items scoring at least the highest level, the next one, ...
    return average_precision(irrelevant_before + np.arange(len(levels)), len(levels))


def _count_levels(levels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Number of scores that reach exactly k of the ascending levels, for k = 0 to len(levels)."""
    return np.bincount(np.searchsorted(levels, scores, side='right'), minlength=len(levels) + 1)


def _to_row(scores: Array, query: int) -> np.ndarray:
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu()
        scores = (scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores).numpy()
    if np.isnan(scores).any():
        raise ValueError(f'scores[{query}] holds NaN.')
    return scores


def _to_indices(values: Sequence[int] | Array, name: str) -> np.ndarray:
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if not values.size:
        return np.empty(0, dtype=np.int64)
    if values.ndim != 1 or values.dtype.kind not in 'iu':
        raise ValueError(f'{name} must be a list of integers, got shape {values.shape} of {values.dtype}.')
    if values.min() < 0:
        raise ValueError(f'{name} holds the negative value {values.min()}.')
    if len(np.unique(values)) < len(values):
        raise ValueError(f'{name} holds a value more than once.')
    return values.astype(np.int64)
