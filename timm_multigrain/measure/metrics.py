"""Measures of retrieval: of Holidays, of revisited Oxford and Paris, of UKBench, of metric learning (Recall@K, mAP@K,
MAP@R, NMI), of k-NN classification and of copy detection.

Scores are a matrix (Q, N), or (Q, n) chunks of it in database order, from an object that can be iterated twice; higher
is nearer; any real dtype, infinities allowed. The database is never ranked: the rank of a labelled item follows from
the number of unlabelled items that score at least as much, counted chunk by chunk. Ties count against the system: among
equal scores every wrong item comes before every right one, and constant scores earn the worst value, not a lucky one.
"""
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from timm_multigrain.search.exact import Array, Scores, SimilarityChunks, nearest_of

from .ranks import Indices, count_above, ranks, to_indices
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KAPPAS = (1, 5, 10)
PRECISION = 0.9  # at which the recall of copy detection is quoted
UKB_GROUP = 4
KNN, KNN_TEMPERATURE = 20, 0.07


@dataclass(frozen=True, eq=False)
class RetrievalResult(Result):
    """Ranks at which queries find what they look for, and the measures that follow from them.

    A query with nothing to find has no ranks and is left out of every mean. Shares are in [0, 1].

    Attributes:
        ranks: 0-based ranks of the relevant items of each query, ascending.
        name: Protocol, such as 'Hard'.
        kappas: The k of `mp_at`.
    """
    ranks: Sequence[np.ndarray] = field(repr=False)
    name: str = ''
    kappas: Sequence[int] = ()

    @cached_property
    def ap(self) -> np.ndarray:
        """Average precision of each query (`average_precision`), (Q,) float64; NaN for one with nothing to find."""
        return np.array([average_precision(own, len(own)) for own in self.ranks])

    @property
    def map(self) -> float:
        """Mean of `ap`."""
        return float(np.nanmean(self.ap))

    def recall_at(self, k: int) -> float:
        """Recall@K of metric learning: share of the queries with a relevant item among the first k."""
        return float(np.mean([own[0] < k for own in self.ranks if len(own)]))

    def map_at(self, k: int) -> float:
        """mAP@K of the landmark challenges (Weyand et al., arXiv 2004.01804) and of ILIAS (arXiv 2502.11748).

        The precisions at the relevant items among the first k, summed, over the most there can be of these.
        """
        return self._map_at(np.full(len(self.ranks), k))

    @property
    def map_at_r(self) -> float:
        """MAP@R (Musgrave et al., arXiv 2003.08505): `map_at` with the number of its relevant items for each query."""
        return self._map_at(self._counts)

    def _map_at(self, depths: np.ndarray) -> float:
        places, counts = np.concatenate(self.ranks), self._counts
        queries = np.repeat(np.arange(len(counts)), counts)
        found = np.arange(1, len(places) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
        precisions = np.where(places < depths[queries], found / (places + 1), 0.)
        sums, asked = np.bincount(queries, precisions, minlength=len(counts)), counts > 0
        return float((sums[asked] / np.minimum(counts, depths)[asked]).mean())

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.array([len(own) for own in self.ranks])

    @cached_property
    def precisions(self) -> dict[int, np.ndarray]:
        """Precision at each k of each query, (Q,) float64, counted to its last relevant item if that comes earlier."""
        last = np.array([own[-1] + 1 if len(own) else np.nan for own in self.ranks])
        return {k: np.array([(own < depth).sum() for own, depth in zip(self.ranks, np.minimum(k, last), strict=True)])
                / np.minimum(k, last) for k in self.kappas}

    @property
    def mp_at(self) -> dict[int, float]:
        """Mean precision at each k."""
        return {k: float(np.nanmean(values)) for k, values in self.precisions.items()}

    @property
    def num_queries(self) -> int:
        """Queries with something to find."""
        return int((self._counts > 0).sum())

    def to_dict(self) -> dict[str, Any]:
        figures = {'map': self.map, 'num_queries': self.num_queries, 'ap': self.ap}
        return {**figures, 'mp_at': self.mp_at} if self.kappas else figures

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
    places = np.sort(to_indices(ranks_of_relevant))
    found = np.arange(len(places))
    before = np.where(places == 0, 1., found / np.maximum(places, 1))
    return float((before + (found + 1) / (places + 1)).sum() / 2 / num_relevant) if num_relevant else np.nan


def mean_average_precision(
        scores: Scores,
        relevant: Sequence[Indices],
        ignore: Sequence[Indices] | None = None,
) -> RetrievalResult:
    """Mean average precision of Q queries over N database items, and the other measures of `RetrievalResult`.

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
    above = count_above(scores, relevant, *([] if ignore is None else [ignore]))
    return RetrievalResult([ranks(own[:len(items)]) for own, items in zip(above, relevant, strict=True)])


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
        """The protocols that were measured."""
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
    # What a protocol takes out is labelled, so that what is wrong is unlabelled in all three.
    above = count_above(scores, *([getattr(query, name) for query in queries] for name in ('easy', 'hard', 'junk')))
    split = [np.split(own, [len(query.easy), len(query.easy) + len(query.hard)])
             for own, query in zip(above, queries, strict=True)]
    return RevisitedResult(
        _protocol('Easy', [easy for easy, _, _ in split], kappas),
        _protocol('Medium', [np.concatenate([easy, hard]) for easy, hard, _ in split], kappas),
        _protocol('Hard', [hard for _, hard, _ in split], kappas))


def _protocol(name: str, above: Sequence[np.ndarray], kappas: Sequence[int]) -> RetrievalResult | None:
    return RetrievalResult([ranks(own) for own in above], name, kappas) if any(map(len, above)) else None


@dataclass(frozen=True, eq=False)
class UKBScore(Result):
    """Relevant images `found` among the first four of each query, (Q,) int64, 0 to 4."""
    found: np.ndarray = field(repr=False)

    @property
    def score(self) -> float:
        """Mean of `found`, 4 at best."""
        return float(self.found.mean())

    def to_dict(self) -> dict[str, Any]:
        return {'score': self.score, 'num_queries': len(self.found), 'found': self.found}

    def plot(self, axes: 'Axes') -> None:
        """How many queries found 0, 1, 2, 3 and all 4."""
        axes.bar(range(UKB_GROUP + 1), np.bincount(self.found, minlength=UKB_GROUP + 1))
        axes.set(xlabel='relevant images among the first four', ylabel='queries', title=str(self))

    def __str__(self) -> str:
        return f'UKB score {self.score:.3f} of {UKB_GROUP} over {len(self.found)} queries'


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
    return UKBScore(np.array([(ranks(own) < UKB_GROUP).sum() for own in count_above(scores, members)]))


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


def knn_accuracy(
        scores: Scores,
        query_labels: Indices,
        labels: Indices,
        k: int = KNN,
        own: Indices | None = None,
) -> float:
    """Top-1 of weighted k-NN classification, in [0, 1].

    Each of the k nearest votes by exp(score / 0.07) for its label: `Unsupervised feature learning via non-parametric
    instance discrimination`, Wu et al. 2018, arXiv 1805.01978.

    Args:
        scores: Cosine similarities, (Q, N) or chunks.
        query_labels: Label of each query, (Q,) integers.
        labels: Label of each item, (N,) or fewer, where further ones are distractors with a label of no query.
        k: Neighbours that vote.
        own: Place of each query in the database, (Q,), where it does not vote; None where it is not there.
    """
    query_labels, right = np.asarray(query_labels), []
    for rows, part in scores.blocks() if isinstance(scores, SimilarityChunks) else [(slice(None), scores)]:
        values, items = (found.cpu().numpy() for found in nearest_of(part, k + (own is not None)))
        votes = np.exp((values - values[:, :1]) / KNN_TEMPERATURE, dtype=np.float64)  # the same winner, no overflow
        if own is not None:
            votes[items == np.asarray(own)[rows, None]] = 0
            votes[(votes > 0).all(1), -1] = 0  # it was not among the nearest: one neighbour too many
        voted = np.append(labels, np.full(1 + max(0, items.max() - len(labels)), -1))[items]
        same = voted[:, :, None] == voted[:, None]
        for_label = (same * votes[:, None]).sum(2)
        mine = voted == query_labels[rows, None]
        right.append((for_label * mine).max(1) > (for_label * ~mine).max(1))  # ties count against the system
    return float(np.concatenate(right).mean())


def clustering_nmi(vectors: Array, labels: Indices, seed: int = 0) -> float:
    """Normalised mutual information, in [0, 1], of labels and a k-means clustering into as many clusters as labels.

    It needs scikit-learn, and takes long for thousands of labels.

    Args:
        vectors: Descriptors, (N, D).
        labels: Label of each, (N,) integers.
        seed: Of the first centres.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score
    except ImportError as e:
        raise ImportError("NMI needs scikit-learn: pip install 'timm_multigrain[metric]'.") from e
    vectors = vectors.cpu().numpy() if isinstance(vectors, torch.Tensor) else vectors
    clusters = KMeans(len(np.unique(labels)), n_init=1, random_state=seed).fit_predict(vectors)
    return float(normalized_mutual_info_score(labels, clusters))


def _to_list(values: Iterable | Array) -> list:
    return values.tolist() if isinstance(values, Array) else list(values)
