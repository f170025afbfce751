"""Ranks of labelled items, without ranking the database; the best pairs of a whole set.

A measure of retrieval needs the ranks of the few labelled items of a query. The rank of an item follows from the number
of unlabelled items that score at least as much, and those are counted chunk by chunk: scores are a matrix, or chunks of
columns in the order of the database. Only one query's scores of one chunk are sorted at a time, as plain numbers, which
numpy does about ten times faster than an argsort. Ties count against the system: among equal scores every unlabelled
item comes before every labelled one.
"""
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import chain

import numpy as np
import torch

from timm_multigrain.search.exact import Array, Scores

__all__ = ['Indices', 'best_pairs', 'outranking', 'ranks', 'to_indices']

Indices = Sequence[int] | Array

HELD_BYTES = 32 << 20  # of chunks, kept until the last labelled item has come by


def outranking(scores: Scores, **labelled: Sequence[Indices]) -> list[np.ndarray]:
    """For each labelled item, the number of unlabelled items that score at least as much for its query.

    Chunks are read once if those up to the last labelled item fit 32 MiB, as they do where distractors follow a
    labelled set. Otherwise they are read twice, and have to come from something that can be (not a generator).

    Args:
        scores: Similarities of Q queries to N items, higher is nearer: (Q, N), or (Q, n) chunks in the order of the
            items. Any real dtype, infinities allowed.
        labelled: By name, such as relevant and ignore, the database indices for each of the Q queries. The lists of a
            query have no item in common.

    Returns:
        Per query the numbers for its first list, then its second, and so on, (L,) int64.
    """
    items = _join(labelled)
    values, chunks = _pick(scores, items)
    counts = [-_count_reaching(own, own, query) for query, own in enumerate(values)]  # labelled ones do not count
    for chunk in chunks:
        for query, own in enumerate(values):
            counts[query] += _count_reaching(_to_numpy(chunk[query]), own, query)
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
    for chunk in scores:
        chunk = _to_numpy(chunk)
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
    """Indices as an int64 array.
    """
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if not values.size:
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in 'iu':
        raise ValueError(f'{name} must be a list of integers, got shape {values.shape} of {values.dtype}.')
    if values.min() < 0:
        raise ValueError(f'{name} contains the negative value {values.min()}.')
    return values.astype(np.int64, copy=False)


def _join(labelled: dict[str, Sequence[Indices]]) -> list[np.ndarray]:
    """All labelled items of each query."""
    if len({len(lists) for lists in labelled.values()}) > 1:
        counts = ', '.join(f'{len(lists)} lists of {name} items' for name, lists in labelled.items())
        raise ValueError(f'There are {counts}: one of each is needed per query.')
    joined = []
    for query, lists in enumerate(zip(*labelled.values(), strict=True)):
        joined.append(np.concatenate([
            to_indices(items, f'{name}[{query}]') for name, items in zip(labelled, lists, strict=True)]))
        items = np.sort(joined[-1])
        if (repeated := items[1:][items[1:] == items[:-1]]).size:
            raise ValueError(f'Query {query}: item {repeated[0]} is more than once in {", ".join(labelled)}.')
    return joined


def _pick(scores: Scores, items: list[np.ndarray]) -> tuple[list[np.ndarray], Iterable[Array]]:
    """The scores of the labelled items of each query, and all chunks."""
    sizes = [len(own) for own in items]
    columns, rows = np.concatenate([np.empty(0, np.int64), *items]), np.repeat(np.arange(len(items)), sizes)
    last, end, values, held, chunks = columns.max(initial=-1), 0, None, [], _chunks(scores, len(items))
    for chunk in chunks:
        start, end = end, end + chunk.shape[1]
        inside = (columns >= start) & (columns < end)
        found = _to_numpy(chunk[rows[inside], columns[inside] - start])
        values = np.empty(len(columns), found.dtype) if values is None else values
        values[inside] = found
        if held is not None:
            held.append(chunk if isinstance(scores, Array) else deepcopy(chunk))  # its buffer may be used again
        if end > last:
            break
        if held is not None and sum(chunk.nbytes for chunk in held) > HELD_BYTES:
            if isinstance(scores, Iterator):
                raise ValueError(f'Item {last} is labelled, too far into the scores to hold what comes before: pass '
                                 'an object that can be iterated twice, or the labelled items first.')
            held = None
    if end <= last:
        raise ValueError(f'Query {rows[columns.argmax()]}: index {last} is out of range for {end} items.')
    values = np.split(columns if values is None else values, np.cumsum(sizes)[:-1])
    return values, _chunks(scores, len(items), at_least=end) if held is None else chain(held, chunks)


def _count_reaching(scores: np.ndarray, levels: np.ndarray, query: int) -> np.ndarray:
    """Number of scores that are at least as high as each level."""
    if np.isnan(scores).any():
        raise ValueError(f'scores[{query}] contains NaN.')
    if len(levels) <= 8:  # comparing with each takes less time than sorting
        return np.array([np.count_nonzero(scores >= level) for level in levels], dtype=np.int64)
    return len(scores) - np.searchsorted(np.sort(scores), levels)


def _chunks(scores: Scores, num_queries: int, at_least: int = 0) -> Iterator[Array]:
    """The chunks, checked; empty ones are left out."""
    dtype, read = None, 0
    for chunk in [scores] if isinstance(scores, Array) else scores:
        if not isinstance(chunk, Array) or chunk.ndim != 2 or not len(chunk):
            got = tuple(chunk.shape) if isinstance(chunk, Array) else type(chunk).__name__
            raise ValueError(f'scores must have shape (queries, items) with at least one query, got {got}.')
        if len(chunk) != num_queries:
            raise ValueError(f'There are {len(chunk)} rows of scores for {num_queries} queries.')
        if dtype is not None and dtype != chunk.dtype:
            raise ValueError(f'Chunks of scores are {dtype} and {chunk.dtype}: they must have one dtype.')
        dtype, read = chunk.dtype, read + chunk.shape[1]
        if chunk.shape[1]:
            yield chunk.detach() if isinstance(chunk, torch.Tensor) else chunk
    if read < at_least:
        raise ValueError(f'The scores had at least {at_least} items when read first and {read} when read again.')


def _to_numpy(scores: Array) -> np.ndarray:
    """The scores on the CPU, half precision as float32."""
    if isinstance(scores, torch.Tensor):
        scores = scores.cpu()
        scores = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()
    if scores.dtype.kind not in 'fiub':
        raise ValueError(f'scores must be real numbers, got {scores.dtype}.')
    return scores.astype(np.float32) if scores.dtype == np.float16 else scores
