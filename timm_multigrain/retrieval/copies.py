"""Measures of copy detection: one ranking of all pairs of a query and a reference, over all queries.

Micro average precision and recall at 90 % precision as `The 2021 image similarity dataset and challenge`, Douze et al.
2021, defines them: a score has to mean the same for every query. Ties count against the system.
"""
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .ranking import Array
from .result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['CopyResult', 'micro_average_precision']

PRECISION = 0.9


@dataclass(frozen=True, eq=False)
class CopyResult(Result):
    """Micro average precision of ranked pairs.

    Attributes:
        ranks: 0-based ranks of the true pairs that were found, ascending, (T,) int64.
        thresholds: Their scores.
        num_true: True pairs, found or not.
    """
    ranks: np.ndarray = field(repr=False)
    thresholds: np.ndarray = field(repr=False)
    num_true: int

    @property
    def precisions(self) -> np.ndarray:
        """Precision down to each true pair, (T,) float64."""
        return np.arange(1, len(self.ranks) + 1) / (self.ranks + 1)

    @property
    def recalls(self) -> np.ndarray:
        """Recall down to each true pair, (T,) float64."""
        return np.arange(1, len(self.ranks) + 1) / self.num_true

    @property
    def uap(self) -> float:
        """Micro average precision, in [0, 1]: sum of the precisions at the true pairs over their number."""
        return float(self.precisions.sum() / self.num_true)

    @property
    def recall_at_p90(self) -> float:
        """Most recall with a precision of 90 % or more, in [0, 1]; 0 if that precision is never reached."""
        return 0. if self._operating_point is None else float(self.recalls[self._operating_point])

    @property
    def threshold_at_p90(self) -> float | None:
        """Least score to accept for `recall_at_p90`; None if the precision is never reached."""
        return None if self._operating_point is None else float(self.thresholds[self._operating_point])

    @property
    def _operating_point(self) -> int | None:
        reached = np.flatnonzero(self.precisions >= PRECISION)
        return int(reached[-1]) if len(reached) else None

    def to_dict(self) -> dict[str, Any]:
        return {'uap': self.uap, 'recall_at_p90': self.recall_at_p90, 'threshold_at_p90': self.threshold_at_p90,
                'num_true': self.num_true, 'num_found': len(self.ranks)}

    def plot(self, axes: 'Axes') -> None:
        """Precision over recall, with the point at 90 % precision."""
        axes.plot(100 * self.recalls, 100 * self.precisions)
        if self.threshold_at_p90 is not None:
            axes.plot(100 * self.recall_at_p90, 100 * self.precisions[self._operating_point], 'o')
        axes.axhline(100 * PRECISION, color='gray', linestyle='--', linewidth=1)
        axes.set(xlabel='recall, %', ylabel='precision, %', xlim=(-2, 102), ylim=(-2, 102), title=str(self))

    def __str__(self) -> str:
        return (f'uAP {100 * self.uap:.2f} %, recall at 90 % precision {100 * self.recall_at_p90:.2f} % '
                f'of {self.num_true} true pairs')


def micro_average_precision(
        query_ids: Sequence[Hashable] | Array,
        reference_ids: Sequence[Hashable] | Array,
        scores: Sequence[float] | Array,
        true_pairs: Iterable[tuple[Hashable, Hashable]],
) -> CopyResult:
    """Measures of predicted pairs, such as the nearest references of every query.

    Args:
        query_ids: Query of each predicted pair, (P,) names or numbers.
        reference_ids: Reference of each.
        scores: Score of each, higher is more certain.
        true_pairs: (query, reference) of every true pair; those that were not predicted count as missed.

    Raises:
        ValueError: If lengths disagree, a score is NaN, there is no true pair, or a pair occurs twice in either list.
    """
    scores = np.asarray(scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores)
    queries, references = _to_list(query_ids), _to_list(reference_ids)
    if scores.ndim != 1 or not len(scores) == len(queries) == len(references):
        raise ValueError(f'{len(queries)} query_ids, {len(references)} reference_ids and scores of shape '
                         f'{scores.shape}: there must be one of each for a pair.')
    if np.isnan(scores).any():
        raise ValueError(f'scores[{np.flatnonzero(np.isnan(scores))[0]}] is NaN.')
    truth = [(query, reference) for query, reference in _to_list(true_pairs)]
    if not truth:
        raise ValueError('true_pairs is empty: there is nothing to find.')
    if len(distinct := set(truth)) < len(truth):
        raise ValueError('true_pairs holds a pair more than once.')
    seen, correct = set(), np.zeros(len(scores), dtype=bool)
    for place, pair in enumerate(zip(queries, references, strict=True)):
        if pair in seen:
            raise ValueError(f'The pair {pair} is predicted more than once.')
        seen.add(pair)
        correct[place] = pair in distinct
    order = np.lexsort((correct, -scores))  # false ones first among equal scores
    ranks = np.flatnonzero(correct[order])
    return CopyResult(ranks, scores[order][ranks], len(truth))


def _to_list(values: Iterable | Array) -> list:
    return values.tolist() if isinstance(values, Array) else list(values)
