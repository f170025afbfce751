"""Ranks of labelled items from chunks of scores: the unlabelled items that score at least as much are counted chunk by
chunk, and the database is never ranked. Ties count against the system.
"""
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from timm_multigrain.search.exact import Array, Scores, SimilarityChunks

Indices = Sequence[int] | Array


def count_above(scores: Scores, *labelled: Sequence[Indices]) -> list[np.ndarray]:
    """For each labelled item, the number of unlabelled items that score at least as much for its query.

    Memory is that of a chunk. Chunks are read twice up to the last labelled item, and once beyond it. Many queries are
    taken some at a time.

    Args:
        scores: (Q, N) or chunks.
        labelled: Lists of database indices for each of the Q queries; those of a query have no item in common.

    Returns:
        Per query the numbers for its first list, then its second, and so on, (L,) int64.
    """
    if isinstance(scores, Iterator):
        raise ValueError('scores are a generator, and are read twice: pass a list of the chunks, or SimilarityChunks.')
    if isinstance(scores, SimilarityChunks) and scores.in_blocks:
        return [own for rows, part in scores.blocks() for own in count_above(part, *(own[rows] for own in labelled))]
    items = [np.concatenate([to_indices(own) for own in lists]) for lists in zip(*labelled, strict=True)]
    levels = _scores_of(items, scores)
    above = [-_count_reaching(own, own) for own in levels]  # labelled ones do not count
    for chunk in _chunks(scores, len(items)):
        for count, row, own in zip(above, chunk, levels, strict=True):
            count += _count_reaching(row, own)
    return above


def ranks(above: np.ndarray) -> np.ndarray:
    """Of items with so many unlabelled ones above each, (L,), their 0-based ranks when other labelled ones are out."""
    return np.sort(above) + np.arange(len(above))


def best_pairs(scores: Iterable[Array], limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and scores of the `limit` highest scores over all queries together, best first.

    Memory is a few times the limit and a chunk. Among equal scores at the limit the choice is arbitrary.
    """
    values, pairs, threshold, start = np.empty(0, np.float32), np.empty((2, 0), np.int64), -np.inf, 0
    for chunk in _chunks(scores):
        rows, columns = np.nonzero(chunk >= threshold)
        values = np.concatenate([values, chunk[rows, columns]])
        pairs = np.concatenate([pairs, [rows, columns + start]], axis=1)
        start += chunk.shape[1]
        if len(values) > 2 * limit:
            best = np.argpartition(-values, limit - 1)[:limit]
            values, pairs = values[best], pairs[:, best]
            threshold = values.min()
    order = np.argsort(-values, kind='stable')[:limit]
    return *pairs[:, order], values[order]


def _scores_of(items: list[np.ndarray], scores: Scores) -> list[np.ndarray]:
    """The scores of the labelled items of each query."""
    last, start, levels = max((own.max(initial=-1) for own in items), default=-1), 0, [own[:0] for own in items]
    for chunk in _chunks(scores, len(items)):
        if not start:
            levels = [np.empty(len(own), chunk.dtype) for own in items]
        for own, level, row in zip(items, levels, chunk, strict=True):
            inside = (own >= start) & (own < start + len(row))
            level[inside] = row[own[inside] - start]
        start += chunk.shape[1]
        if start > last:
            return levels
    if start <= last:
        raise ValueError(f'Item {last} is labelled, and there are {start}.')
    return levels


def _count_reaching(scores: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Number of scores that are at least as high as each level."""
    if not len(levels):
        return np.zeros(0, dtype=np.int64)
    scores = scores[scores >= levels.min()]  # few, where the labelled items are near the top
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
        if np.isnan(chunk).any():
            raise ValueError('scores contain NaN.')
        yield chunk.astype(np.float32) if chunk.dtype == np.float16 else chunk


def to_indices(values: Indices) -> np.ndarray:
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if values.size and (values.ndim != 1 or values.dtype.kind not in 'iu' or values.min() < 0):
        raise ValueError(f'Items are integers from 0, not {values.dtype} {values.tolist()!r:.60}.')
    return values.astype(np.int64, copy=False).ravel()
