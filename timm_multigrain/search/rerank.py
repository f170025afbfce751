"""What is done after the first ranking: query expansion, database-side augmentation, score normalisation.

Vectors are L2-normalised, scores their inner products; all of it works a chunk of the database at a time, of
``chunk_size`` vectors as of `SimilarityChunks`.
"""
from collections.abc import Iterable, Iterator

import torch

from timm_multigrain.layers import l2_normalize

from .exact import Array, as_vectors, nearest, shards_of

__all__ = ['alpha_query_expansion', 'database_augmentation', 'score_offsets']


def alpha_query_expansion(
        queries: Array,
        database: Array | Iterable[Array],
        k: int = 50,
        alpha: float = 3.0,
        query_rows: torch.Tensor | None = None,
        chunk_size: int | None = None,
) -> torch.Tensor:
    """Replace each query by the weighted sum of itself and its k nearest database vectors.

    `Fine-tuning CNN image retrieval with no human annotation`, Radenović et al. 2018: neighbours weigh their similarity
    to the power alpha, the query weighs 1; alpha = 0 is the average query expansion of `Total recall`, Chum et al.
    2007. Neighbours of negative similarity weigh nothing.

    Args:
        queries: (Q, D), L2-normalised.
        database: (N, D) or shards of it, L2-normalised; read twice.
        k: Neighbours, besides the query.
        alpha: Power, 0 or more.
        query_rows: Where queries are images of the database: their indices, (Q,). A query is not its own neighbour.

    Returns:
        (Q, D) float32, L2-normalised.

    Raises:
        ValueError: If shapes disagree, k is below 1, alpha is negative, the database is empty or a generator, or a
            similarity is NaN.

    Example:
        >>> queries, database = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (2, 100))
        >>> alpha_query_expansion(queries, database, k=3, alpha=3.).shape
        torch.Size([2, 8])
    """
    queries = as_vectors(queries, 'queries')
    if isinstance(database, Iterator):
        raise ValueError('The database is read twice: pass an object that can be iterated again, not a generator.')
    if not alpha >= 0:
        raise ValueError(f'alpha is {alpha}: give 0 or more.')
    if query_rows is None:
        scores, indices = nearest(queries, database, k, chunk_size)
    else:
        rows = torch.as_tensor(query_rows, device=queries.device)
        if rows.shape != queries.shape[:1]:
            raise ValueError(f'query_rows must have shape ({len(queries)},), got {tuple(rows.shape)}.')
        scores, indices = nearest(queries, database, k + 1, chunk_size)
        own = indices == rows[:, None]
        others = own.long().argsort(dim=1, stable=True)[:, :k]  # the row itself last, and it, or the farthest, is out
        scores, indices = scores.masked_fill(own, 0).gather(1, others), indices.gather(1, others)
    weights = scores.clamp(min=0) ** alpha * (scores > 0)
    return l2_normalize(queries + _weighted_sum(weights, indices, database))


def database_augmentation(
        database: Array,
        k: int = 10,
        alpha: float = 3.0,
        chunk_size: int | None = None,
        batch_size: int = 1024,
) -> torch.Tensor:
    """Replace each database vector by the weighted sum of itself and its k nearest other database vectors.

    `Better matching with fewer features`, Turcot and Lowe 2009, and `Three things everyone should know to
    improve object retrieval`, Arandjelović and Zisserman 2012, with the weights of `alpha_query_expansion`. It is done
    once, before any query.

    Args:
        database: (N, D), L2-normalised.
        k: Neighbours, besides the vector itself.
        alpha: Power, 0 or more.
        batch_size: Vectors augmented at a time.

    Returns:
        (N, D) float32, L2-normalised.
    """
    database = as_vectors(database, 'database')
    augmented = torch.empty_like(database)
    for start in range(0, len(database), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(database)))
        augmented[rows] = alpha_query_expansion(database[rows], database, k, alpha, rows, chunk_size)
    return augmented


def score_offsets(
        queries: Array,
        background: Array | Iterable[Array],
        weight: float = 1.0,
        first: int = 0,
        last: int = 2,
        chunk_size: int | None = None,
) -> torch.Tensor:
    """What to add to the scores of each query, so that a score means the same for every query.

    It is -weight times the mean similarity of the query to its neighbours number first to last (0-based, both included)
    in a set of images that are copies of nothing: a query that looks like everything loses more. `A self-supervised
    descriptor for image copy detection`, Pizzi et al. 2022, takes weight 1 and 0 to 2 (the defaults); the baseline of
    `The 2021 image similarity dataset and challenge`, Douze et al. 2021, takes one neighbour (first = last).

    Args:
        queries: (Q, D), L2-normalised.
        background: (M, D) or shards of it, L2-normalised, M above `last`.
        weight: Factor.
        first: First neighbour.
        last: Last neighbour.

    Returns:
        (Q,) float32, as `SimilarityChunks` takes them.
    """
    if not 0 <= first <= last:
        raise ValueError(f'first is {first} and last {last}: 0 <= first <= last is needed.')
    scores, _ = nearest(queries, background, last + 1, chunk_size)
    if scores.shape[1] <= last:
        raise ValueError(f'The background has {scores.shape[1]} vectors, and neighbour {last} is asked for.')
    return -weight * scores[:, first:].mean(1)


def _weighted_sum(weights: torch.Tensor, indices: torch.Tensor, database: Array | Iterable[Array]) -> torch.Tensor:
    """Sum over the neighbours, (Q, D)."""
    start, total = 0, 0
    for shard in shards_of(database):
        shard = torch.as_tensor(shard)
        inside = (indices >= start) & (indices < start + len(shard))
        queries, places = inside.nonzero(as_tuple=True)
        found = shard[(indices[queries, places] - start).to(shard.device)].to(weights.device, torch.float32)
        added = weights.new_zeros(len(weights), shard.shape[1])
        total = total + added.index_add_(0, queries, found * weights[queries, places, None])
        start += len(shard)
    return total
