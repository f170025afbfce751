"""Ranks of labelled items, without ranking the database; the best pairs of a whole set.

A measure of retrieval needs the ranks of the few labelled items of a query. The rank of an item follows from the number
of unlabelled items that score at least as much, and those are counted chunk by chunk. Only one query's scores of one
chunk are sorted at a time, as plain numbers, which numpy does about ten times faster than an argsort. Ties count
against the system: among equal scores every unlabelled item comes before every labelled one.
"""
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from timm_multigrain.search.exact import Array, Scores

__all__ = ['Indices', 'best_pairs', 'outranking', 'ranks', 'to_indices']

Indices = Sequence[int] | Array


def outranking(scores: Scores, **labelled: Sequence[Indices]) -> list[np.ndarray]:
    """For each labelled item, the number of unlabelled items that score at least as much for its query.

    Chunks are read twice up to the last labelled item, and once beyond it.

    Args:
        scores: Similarities of Q queries to N items, higher is nearer: (Q, N), or (Q, n) chunks in the order of the
            items, from an object that can be iterated twice. Any real dtype, infinities allowed.
        labelled: By name, such as relevant and ignore, the database indices for each of the Q queries. The lists of a
            query have no item in common.

    Returns:
        Per query the numbers for its first list, then its second, and so on, (L,) int64.
    """
    if isinstance(scores, Iterator):
        raise ValueError('scores are a generator, and are read twice: pass a list of the chunks, or SimilarityChunks.')
    items = _join(labelled)
    levels = _scores_of(items, scores)
    counts = [-_count_reaching(own, own, query) for query, own in enumerate(levels)]  # labelled ones do not count
    for chunk in _chunks(scores, len(items)):
        for query, own in enumerate(levels):
            counts[query] += _count_reaching(chunk[query], own, query)
    return counts


def ranks(above: np.ndarray) -> np.ndarray:
    """0-based ranks of the items that are looked for, ascending, where all other labelled items are left out.

    Args:
        above: The number of unlabelled items above each, as `outranking` counts them, (L,).
    """
    return np.sort(above) + np.arange(len(above))


def best_pairs(scores: Iterable[torch.Tensor], limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `limit` highest scores over all queries together.

    Memory is a few times the limit and a chunk. Among equal scores at the limit the choice is arbitrary.

    Args:
        scores: (Q, n) chunks of columns, in the order of the database.
        limit: Pairs to keep at most.

    Returns:
        Rows, columns and scores of the pairs, best first.
    """
    values, pairs, threshold, start = np.empty(0, np.float32), np.empty((2, 0), np.int64), -np.inf, 0
    for chunk in _chunks(scores):
        rows, columns = np.nonzero(~(chunk <= threshold))  # NaN too
        values = np.concatenate([values, chunk[rows, columns]])
        pairs = np.concatenate([pairs, [rows, columns + start]], axis=1)
        start += chunk.shape[1]
        if np.isnan(values[-len(rows):]).any():
            raise ValueError('scores contain NaN.')
        if len(values) > 2 * limit:
            best = np.argpartition(-values, limit - 1)[:limit]
            values, pairs = values[best], pairs[:, best]
            threshold = values.min()
    order = np.argsort(-values, kind='stable')[:limit]
    return *pairs[:, order], values[order]


def to_indices(values: Indices, name: str) -> np.ndarray:
    """Indices as an int64 array."""
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if not values.size:
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in 'iu' or values.min() < 0:
        raise ValueError(f'{name} must be a list of integers from 0, not {values.dtype} {values.tolist()!r:.60}.')
    return values.astype(np.int64, copy=False)


def _join(labelled: dict[str, Sequence[Indices]]) -> list[np.ndarray]:
    """All labelled items of each query."""
    if len({len(lists) for lists in labelled.values()}) > 1:
        counts = ', '.join(f'{len(lists)} lists of {name} items' for name, lists in labelled.items())
        raise ValueError(f'There are {counts}: one of each is needed per query.')
    joined = []
    for query, lists in enumerate(zip(*labelled.values(), strict=True)):
        own = np.concatenate([
            to_indices(items, f'{name}[{query}]') for name, items in zip(labelled, lists, strict=True)])
        found, times = np.unique(own, return_counts=True)
        if (times > 1).any():
            raise ValueError(f'Query {query}: item {found[times > 1][0]} is more than once in {", ".join(labelled)}.')
        joined.append(own)
    return joined


def _scores_of(items: list[np.ndarray], scores: Scores) -> list[np.ndarray]:
    """The scores of the labelled items of each query."""
    sizes = [len(own) for own in items]
    columns, rows = np.concatenate([np.empty(0, np.int64), *items]), np.repeat(np.arange(len(items)), sizes)
    last, end, values, places = columns.max(initial=-1), 0, [], []
    for chunk in _chunks(scores, len(items)):
        start, end = end, end + chunk.shape[1]
        inside = np.flatnonzero((columns >= start) & (columns < end))
        values.append(chunk[rows[inside], columns[inside] - start])
        places.append(inside)
        if end > last:
            break
    if end <= last:
        raise ValueError(f'Query {rows[columns.argmax()]}: index {last} is out of range for {end} items.')
    order = np.argsort(np.concatenate([np.empty(0, np.int64), *places]))
    return np.split(np.concatenate([*values, columns[:0]])[order], np.cumsum(sizes)[:-1])


def _count_reaching(scores: np.ndarray, levels: np.ndarray, query: int) -> np.ndarray:
    """Number of scores that are at least as high as each level."""
    if np.isnan(scores).any():
        raise ValueError(f'scores[{query}] contains NaN.')
    if len(levels) <= 8:  # comparing with each takes less time than sorting
        return np.array([np.count_nonzero(scores >= level) for level in levels], dtype=np.int64)
    return len(scores) - np.searchsorted(np.sort(scores), levels)


def _chunks(scores: Scores, num_queries: int | None = None) -> Iterator[np.ndarray]:
    """The chunks as numpy arrays, half precision as float32."""
    for chunk in [scores] if isinstance(scores, Array) else scores:
        if isinstance(chunk, torch.Tensor):
            chunk = chunk.detach().cpu()
            chunk = (chunk.float() if chunk.dtype in (torch.bfloat16, torch.float16) else chunk).numpy()
        if chunk.ndim != 2 or chunk.dtype.kind not in 'fiub' or num_queries not in (None, len(chunk)):
            raise ValueError(f'scores have shape {chunk.shape} and dtype {chunk.dtype}: give real numbers, '
                             f'({"queries" if num_queries is None else num_queries}, items).')
        yield chunk.astype(np.float32) if chunk.dtype == np.float16 else chunk
