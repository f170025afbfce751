"""Measures of retrieval: of Holidays, of revisited Oxford and Paris, of UKBench, of metric learning (Recall@K, mAP@K,
MAP@R, NMI), of k-NN classification and of copy detection.

Scores are a matrix (Q, N), or (Q, n) chunks of it in database order, from an object that can be iterated twice; higher
is nearer; any real dtype, infinities allowed. The database is never ranked: the rank of a labelled item follows from
the number of unlabelled items that score at least as much, counted chunk by chunk. Ties count against the system: among
equal scores every wrong item comes before every right one, and constant scores earn the worst value, not a lucky one.
"""
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from timm_multigrain.extras import extra
from timm_multigrain.files import counted
from timm_multigrain.search.exact import Array, Scores, SimilarityChunks, nearest_of

from .ranks import Indices, count_above, ranks, to_indices

UKB_GROUP = 4
KNN, KNN_TEMPERATURE = 20, 0.07


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Ranks at which queries find what they look for, and the measures that follow from them.

    A query with nothing to find has no ranks and is left out of every mean. Shares are in [0, 1].

    Attributes:
        ranks: 0-based ranks of the relevant items of each query, ascending.
    """
    ranks: Sequence[np.ndarray] = field(repr=False)

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
        """mAP@K of the landmark challenges (Weyand et al., arXiv 2004.01804) and of ILIAS (arXiv 2502.11748): the
        precisions at the relevant items among the first k, summed, over the most there can be of these."""
        return self._map_at(np.full(len(self.ranks), k))

    @property
    def map_at_r(self) -> float:
        """MAP@R (Musgrave et al., arXiv 2003.08505): `map_at` with the number of its relevant items for each query."""
        return self._map_at(np.array([len(own) for own in self.ranks]))

    def _map_at(self, depths: np.ndarray) -> float:
        places, counts = np.concatenate(self.ranks), np.array([len(own) for own in self.ranks])
        queries = np.repeat(np.arange(len(counts)), counts)
        found = np.arange(1, len(places) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
        precisions = np.where(places < depths[queries], found / (places + 1), 0.)
        sums, asked = np.bincount(queries, precisions, minlength=len(counts)), counts > 0
        return float((sums[asked] / np.minimum(counts, depths)[asked]).mean())

    def mp_at(self, k: int) -> float:
        """Mean precision at k, of each query counted to its last relevant item if that comes earlier."""
        return float(np.mean([(own < depth).sum() / depth for own in self.ranks if len(own)
                              for depth in [min(k, own[-1] + 1)]]))

    @property
    def num_queries(self) -> int:
        """Queries with something to find."""
        return sum(len(own) > 0 for own in self.ranks)

    def __str__(self) -> str:
        return f'mAP {100 * self.map:.2f} % over {counted(self.num_queries, "query")}'


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


class RevisitedQuery(NamedTuple):
    """Database indices of the labelled images of a query, in three lists that share none."""
    easy: Indices
    hard: Indices
    junk: Indices = ()


def revisited_scores(scores: Scores, queries: Sequence[RevisitedQuery]) -> dict[str, RetrievalResult]:
    """'Easy', 'Medium' and 'Hard', without those where no query has an image to find.

    `Revisiting Oxford and Paris: large-scale image retrieval benchmarking`, Radenović et al. 2018. Of each query's
    labelled images, Easy looks for the easy ones, Medium for the easy and hard ones, Hard for the hard ones; the other
    labelled images, the junk always among them, are taken out of the ranking.

    Args:
        scores: Similarities, (Q, N) or chunks, distractors last.
        queries: Ground truth of each query.
    """
    if not any(len(query.easy) or len(query.hard) for query in queries):
        raise ValueError('No query has an easy or a hard image: nothing to find.')
    # What a protocol takes out is labelled, so that what is wrong is unlabelled in all three.
    above = count_above(scores, *zip(*queries, strict=True))
    easy, hard, _ = zip(*(np.split(own, [len(query.easy), len(query.easy) + len(query.hard)])
                          for own, query in zip(above, queries, strict=True)), strict=True)
    protocols = {'Easy': easy, 'Medium': map(np.append, easy, hard), 'Hard': hard}
    found = {name: RetrievalResult([ranks(own) for own in above]) for name, above in protocols.items()}
    return {name: result for name, result in found.items() if result.num_queries}


def ukb_score(scores: Scores, groups: Indices) -> float:
    """UKBench score: how many of the four images of an object are among the first four, 4 at best, averaged.

    `Scalable recognition with a vocabulary tree`, Nistér and Stewénius 2006. Every image is a query, and stays in its
    own ranking: it counts as one of its four.

    Args:
        scores: Similarities of N images to each other, (N, N) or chunks.
        groups: Object of each image, (N,) integers, each four times.
    """
    _, places, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if (counts != UKB_GROUP).any():
        raise ValueError(f'groups need {UKB_GROUP} images each, not {counts[counts != UKB_GROUP][0]}: leave those out, '
                         'or the score is not comparable.')
    members = np.argsort(places, kind='stable').reshape(-1, UKB_GROUP)[places]
    return float(np.mean([(ranks(own) < UKB_GROUP).sum() for own in count_above(scores, members)]))


class CopyResult(NamedTuple):
    """Of ranked pairs: micro average precision, the sum of the precisions at the true pairs over their number, and the
    most recall with a precision of 90 % or more, 0 if that is never reached; in [0, 1]."""
    uap: float
    recall_at_p90: float


def micro_average_precision(
        query_ids: Sequence[Hashable] | Array,
        reference_ids: Sequence[Hashable] | Array,
        scores: Sequence[float] | Array,
        true_pairs: Iterable[tuple[Hashable, Hashable]],
) -> CopyResult:
    """Measures of predicted pairs, such as the nearest references of every query, in one ranking over all queries.

    `The 2021 image similarity dataset and challenge`, Douze et al. 2021: a score has to mean the same for every query.

    Args:
        query_ids: Query of each predicted pair, (P,) names or numbers; a pair is predicted once.
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
    correct = np.array([pair in truth for pair in predicted], dtype=bool)
    places = np.flatnonzero(correct[np.lexsort((correct, -scores))])  # false ones first among equal scores
    precisions = np.arange(1, len(places) + 1) / (places + 1)
    most = int((1 + np.flatnonzero(precisions >= 0.9)).max(initial=0))
    return CopyResult(float(precisions.sum() / len(truth)), most / len(truth))


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
        labels: Label of each, (N,) integers.
        seed: Of the first centres.
    """
    with extra('metric', 'NMI'):
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score
    vectors = vectors.cpu().numpy() if isinstance(vectors, torch.Tensor) else vectors
    clusters = KMeans(len(np.unique(labels)), n_init=1, random_state=seed).fit_predict(vectors)
    return float(normalized_mutual_info_score(labels, clusters))


def _to_list(values: Iterable | Array) -> list:
    return values.tolist() if isinstance(values, Array) else list(values)
