"""The UKBench score: how many of the four images of an object are among the first four, 4 at best.

`Scalable recognition with a vocabulary tree`, Nistér and Stewénius 2006. Every image is a query, and stays in its own
ranking: it counts as one of its four.
"""
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .ranking import Indices, Labelled, Scores, outranking, ranks_in_rows
from .result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['UKBScore', 'ukb_score']

GROUP = 4


@dataclass(frozen=True, eq=False)
class UKBScore(Result):
    """Mean number of relevant images among the first four.

    Attributes:
        found: Relevant images among the first four of each query, (Q,) int64, 0 to 4.
    """
    found: np.ndarray = field(repr=False)

    @property
    def score(self) -> float:
        """Mean of `found`, 4 at best."""
        return float(self.found.mean())

    @property
    def num_queries(self) -> int:
        return len(self.found)

    def to_dict(self) -> dict[str, Any]:
        return {'score': self.score, 'num_queries': self.num_queries, 'found': self.found}

    def plot(self, axes: 'Axes') -> None:
        """How many queries found 0, 1, 2, 3 and all 4."""
        axes.bar(range(GROUP + 1), np.bincount(self.found, minlength=GROUP + 1))
        axes.set(xlabel='relevant images among the first four', ylabel='queries', title=str(self))

    def __str__(self) -> str:
        return f'UKB score {self.score:.3f} of {GROUP} over {self.num_queries} queries'


def ukb_score(scores: Scores, groups: Indices) -> UKBScore:
    """UKBench score of N images, each a query, the query itself included.

    Args:
        scores: Similarities, higher is nearer: (N, N), or (N, n) pieces in database order; any real dtype. Ties count
            against the system.
        groups: Object of each image, (N,) integers, each four times.

    Raises:
        ValueError: If shapes disagree, a score is NaN, or a group has not four images.
    """
    groups = np.asarray(groups)
    if groups.ndim != 1 or groups.dtype.kind not in 'iu' or not groups.size:
        raise ValueError(f'groups must be a list of integers, got shape {groups.shape} of {groups.dtype}.')
    names, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if (counts != GROUP).any():
        odd = names[counts != GROUP][0]
        raise ValueError(f'Group {odd} has {counts[counts != GROUP][0]} images, not {GROUP}: leave it out, or the '
                         'score is none of UKBench.')
    members = np.argsort(places, kind='stable').reshape(-1, GROUP)[places]
    labelled = Labelled.of([members], ['group'])
    ranks, _ = ranks_in_rows(outranking(scores, labelled), labelled.rows)
    return UKBScore((ranks < GROUP).reshape(-1, GROUP).sum(1))
