"""Measures of retrieval: of INRIA Holidays, of revisited Oxford and Paris, of UKBench, and of copy detection.

Ties count against the system: among equal scores every wrong item comes before every right one, so that constant scores
earn the worst value rather than a lucky one. Scores are a matrix (Q, N), or (Q, n) chunks of it in database order, from
an object that can be iterated twice; higher is nearer; any real dtype, infinities allowed.
"""
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_multigrain.search.exact import Array, Scores

from .ranks import Indices, outranking, ranks, to_indices
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['CopyResult', 'RetrievalResult', 'RevisitedQuery', 'RevisitedResult', 'UKBScore', 'average_precision',
           'mean_average_precision', 'micro_average_precision', 'revisited_scores', 'ukb_score']

KAPPAS = (1, 5, 10)
PRECISION = 0.9  # at which the recall of copy detection is quoted
UKB_GROUP = 4


@dataclass(frozen=True, eq=False)
class RetrievalResult(Result):
    """Mean average precision over queries.

    Attributes:
        ap: Average precision of each query, (Q,) float64 in [0, 1]; NaN for a query with nothing to find.
        precisions: Where measured, the precision at each k of each query, k: (Q,) float64; NaN as in `ap`.
        name: Protocol, such as 'Hard'.
    """
    ap: np.ndarray = field(repr=False)
    precisions: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False)
    name: str = ''

    @property
    def map(self) -> float:
        """Mean of `ap` over the queries with something to find, in [0, 1]."""
        return float(np.nanmean(self.ap))

    @property
    def mp_at(self) -> dict[int, float]:
        """Mean precision at each k, in [0, 1]."""
        return {k: float(np.nanmean(values)) for k, values in self.precisions.items()}

    @property
    def num_queries(self) -> int:
        """Queries with something to find."""
        return int(np.isfinite(self.ap).sum())

    def to_dict(self) -> dict[str, Any]:
        figures = {'map': self.map, 'num_queries': self.num_queries, 'ap': self.ap}
        return {**figures, 'mp_at': self.mp_at} if self.precisions else figures

    def plot(self, axes: 'Axes') -> None:
        """Average precision of the queries, from the worst to the best."""
        axes.plot(100 * np.sort(self.ap[np.isfinite(self.ap)]), drawstyle='steps-mid',
                  label=f'{self.name} mAP {100 * self.map:.2f} %'.strip())
        axes.set(xlabel='queries, worst first', ylabel='average precision, %', ylim=(-2, 102))
        axes.legend()

    def __str__(self) -> str:
        figures = [f'mAP {100 * self.map:.2f} %', *(f'mP@{k} {100 * mean:.2f} %' for k, mean in self.mp_at.items())]
        name = f'{self.name:6} ' if self.name else ''
        return f'{name}{", ".join(figures)} over {self.num_queries} quer{"y" if self.num_queries == 1 else "ies"}'


def average_precision(ranks_of_relevant: Indices, num_relevant: int) -> float:
    """Average precision as INRIA Holidays defines it: area under the recall-precision curve, by trapezia.

    Each relevant item adds the mean of the precision just before it and at it, times 1 / `num_relevant`; before the
    first item of the list precision is 1.

    Args:
        ranks_of_relevant: 0-based ranks of the relevant items found, in any order, after ignored items (such as the
            query itself) are taken out of the list.
        num_relevant: Number of relevant items, found or not; with none the result is NaN.
    """
    places = np.sort(to_indices(ranks_of_relevant, 'ranks_of_relevant'))
    found = np.arange(len(places))
    before = np.where(places == 0, 1., found / np.maximum(places, 1))
    return float((before + (found + 1) / (places + 1)).sum() / 2 / num_relevant) if num_relevant else np.nan


def mean_average_precision(
        scores: Scores,
        relevant: Sequence[Indices],
        ignore: Sequence[Indices] | None = None,
) -> RetrievalResult:
    """Mean average precision (`average_precision`) of Q queries over N database items.

    Args:
        scores: Similarities, (Q, N) or chunks.
        relevant: Database indices of the relevant items of each query, at least one each.
        ignore: Database indices to leave out of each query's list (such as the query itself), or None.

    Example:
        >>> scores = torch.tensor([[.9, .1, .5, .3]])  # one query, four images
        >>> round(mean_average_precision(scores, relevant=[[0, 3]]).map, 3)
        0.792
    """
    for query, items in enumerate(relevant):
        if not len(items):
            raise ValueError(f'relevant[{query}] is empty: leave queries without a relevant item out.')
    above = outranking(scores, relevant=relevant, ignore=[()] * len(relevant) if ignore is None else ignore)
    return RetrievalResult(np.array([
        average_precision(ranks(own[:len(items)]), len(items)) for own, items in zip(above, relevant, strict=True)]))


@dataclass(frozen=True, eq=False)
class RevisitedQuery:
    """Database indices of the labelled images of a query, in three lists that share none."""
    easy: Indices
    hard: Indices
    junk: Indices = ()


@dataclass(frozen=True, eq=False)
class RevisitedResult(Result):
    """The three protocols; None where no query has an image to find."""
    easy: RetrievalResult | None
    medium: RetrievalResult | None
    hard: RetrievalResult | None

    @property
    def parts(self) -> list[RetrievalResult]:
        """Those that were measured."""
        return [part for part in (self.easy, self.medium, self.hard) if part is not None]

    def to_dict(self) -> dict[str, Any]:
        return {part.name.lower(): part.to_dict() for part in self.parts}

    def plot(self, axes: 'Axes') -> None:
        """Average precision of the queries, a curve per protocol."""
        for part in self.parts:
            part.plot(axes)

    def __str__(self) -> str:
        return '\n'.join(map(str, self.parts))


def revisited_scores(
        scores: Scores,
        queries: Sequence[RevisitedQuery],
        kappas: Sequence[int] = KAPPAS,
) -> RevisitedResult:
    """Easy, Medium and Hard mean average precision and mean precision at k.

    `Revisiting Oxford and Paris: large-scale image retrieval benchmarking`, Radenović et al. 2018. Of each query's
    labelled images, Easy looks for the easy ones, Medium for the easy and hard ones, Hard for the hard ones; the other
    labelled images, the junk always among them, are taken out of the ranking. A query without an image to find is left
    out of a mean. Precision at k counts to the last relevant image if that comes earlier than k.

    Args:
        scores: Similarities, (Q, N) or chunks, distractors last.
        queries: Ground truth of each query.
        kappas: The k of the precisions.
    """
    if not any(len(query.easy) or len(query.hard) for query in queries):
        raise ValueError('No query has an easy or a hard image: nothing to find.')
    # Each protocol takes out the images that are labelled otherwise, so that what is wrong is unlabelled in all three.
    above = outranking(scores, **{name: [getattr(query, name) for query in queries]
                                  for name in ('easy', 'hard', 'junk')})
    split = [(own, len(query.easy), len(query.easy) + len(query.hard))
             for own, query in zip(above, queries, strict=True)]
    return RevisitedResult(
        _protocol('Easy', [own[:hard] for own, hard, _ in split], kappas),
        _protocol('Medium', [own[:junk] for own, _, junk in split], kappas),
        _protocol('Hard', [own[hard:junk] for own, hard, junk in split], kappas))


def _protocol(name: str, above: Sequence[np.ndarray], kappas: Sequence[int]) -> RetrievalResult | None:
    if not any(map(len, above)):
        return None
    places = [ranks(own) for own in above]
    ap = np.array([average_precision(own, len(own)) for own in places])
    return RetrievalResult(ap, {k: np.array([_precision_at(own, k) for own in places]) for k in kappas}, name)


def _precision_at(places: np.ndarray, k: int) -> float:
    """Precision at k, or at the last relevant image if that comes earlier; NaN without images."""
    depth = min(k, places[-1] + 1) if len(places) else np.nan
    return np.count_nonzero(places < depth) / depth


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
        axes.bar(range(UKB_GROUP + 1), np.bincount(self.found, minlength=UKB_GROUP + 1))
        axes.set(xlabel='relevant images among the first four', ylabel='queries', title=str(self))

    def __str__(self) -> str:
        return f'UKB score {self.score:.3f} of {UKB_GROUP} over {self.num_queries} queries'


def ukb_score(scores: Scores, groups: Indices) -> UKBScore:
    """UKBench score: how many of the four images of an object are among the first four, 4 at best.

    `Scalable recognition with a vocabulary tree`, Nistér and Stewénius 2006. Every image is a query, and stays in its
    own ranking: it counts as one of its four.

    Args:
        scores: Similarities of N images to each other, (N, N) or chunks.
        groups: Object of each image, (N,) integers, each four times.
    """
    names, places, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if not len(names) or (counts != UKB_GROUP).any():
        odd = dict(zip(names[counts != UKB_GROUP].tolist(), counts[counts != UKB_GROUP].tolist(), strict=True))
        raise ValueError(f'groups need {UKB_GROUP} images each; other numbers are {odd or 0!r:.60}: leave those out, '
                         'or the score is not comparable.')
    members = np.argsort(places, kind='stable').reshape(-1, UKB_GROUP)[places]
    above = outranking(scores, group=members)
    return UKBScore(np.array([(ranks(own) < UKB_GROUP).sum() for own in above]))


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
        return float(self.recalls[self.precisions >= PRECISION].max(initial=0))

    @property
    def threshold_at_p90(self) -> float | None:
        """Least score to accept for `recall_at_p90`; None if the precision is never reached."""
        reached = self.thresholds[self.precisions >= PRECISION]
        return float(reached[-1]) if len(reached) else None

    def to_dict(self) -> dict[str, Any]:
        return {'uap': self.uap, 'recall_at_p90': self.recall_at_p90, 'threshold_at_p90': self.threshold_at_p90,
                'num_true': self.num_true, 'num_found': len(self.ranks)}

    def plot(self, axes: 'Axes') -> None:
        """Precision over recall, with the most recall at 90 % precision."""
        axes.plot(100 * self.recalls, 100 * self.precisions)
        axes.axhline(100 * PRECISION, color='gray', linestyle='--', linewidth=1)
        axes.axvline(100 * self.recall_at_p90, color='gray', linestyle='--', linewidth=1)
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
    """Measures of predicted pairs, such as the nearest references of every query, in one ranking over all queries.

    Micro average precision and recall at 90 % precision as `The 2021 image similarity dataset and challenge`, Douze et
    al. 2021, defines them: a score has to mean the same for every query.

    Args:
        query_ids: Query of each predicted pair, (P,) names or numbers.
        reference_ids: Reference of each.
        scores: Score of each, higher is more certain.
        true_pairs: (query, reference) of every true pair, each once; those that were not predicted count as missed.

    Example:
        >>> micro_average_precision(['q', 'q'], ['a', 'b'], [.9, .4], true_pairs=[('q', 'a')]).uap
        1.0
    """
    scores = np.array(_to_list(scores), dtype=np.float64)
    predicted = list(zip(_to_list(query_ids), _to_list(reference_ids), strict=True))
    if scores.shape != (len(predicted),) or np.isnan(scores).any():
        raise ValueError(f'scores of shape {scores.shape} for {len(predicted)} pairs: one number is needed per pair.')
    truth = {(query, reference) for query, reference in _to_list(true_pairs)}
    if not truth:
        raise ValueError('true_pairs is empty: nothing to find.')
    if repeated := [pair for pair, count in Counter(predicted).items() if count > 1]:
        raise ValueError(f'The pair {repeated[0]} is predicted more than once.')
    correct = np.array([pair in truth for pair in predicted], dtype=bool)
    order = np.lexsort((correct, -scores))  # false ones first among equal scores
    places = np.flatnonzero(correct[order])
    return CopyResult(places, scores[order][places], len(truth))


def _to_list(values: Iterable | Array) -> list:
    return values.tolist() if isinstance(values, Array) else list(values)
