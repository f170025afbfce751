"""Places of labelled items in rankings, exactly, without sorting the database.

A measure of retrieval needs to know where the few labelled items of a query stand. An item's place follows from the
number of unlabelled items that score at least as much, and those can be counted piece by piece: scores are a matrix or
a stream of pieces, and neither is copied as a whole. Ties count against the system: among equal scores every
unlabelled item stands before every labelled one.
"""
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

__all__ = ['Array', 'Indices', 'Scores', 'outranking', 'outranking_pairs', 'to_indices']

Array = np.ndarray | torch.Tensor
Indices = Sequence[int] | Array
Scores = Array | Iterable[Array]

HELD_BYTES = 32 << 20  # of a stream, kept until the last labelled item has come by
PIECE = 4096  # scores sorted at a time: they stay in the cache


def outranking(scores: Scores, labelled: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each labelled item of each query, how many unlabelled items score at least as much.

    A stream is read once if the scores that come before its last labelled item fit 32 MiB, as they do where
    distractors follow a labelled set. Otherwise it is read twice, and so has to be something that can be iterated
    again (not a generator).

    Args:
        scores: Similarities of Q queries to N items, higher is nearer: (Q, N), or (Q, n) pieces in the order of the
            items. Any real dtype, infinities allowed.
        labelled: Distinct indices of the labelled items of each query, Q int64 arrays; some may be empty.

    Returns:
        Q int64 arrays, in the order of `labelled`.

    Raises:
        ValueError: If shapes or dtypes disagree, a score is NaN, an index is out of range, or a stream would have to
            be read twice and cannot.
    """
    counter = _count(scores, labelled)
    return counter.unlabelled()


def outranking_pairs(scores: Scores, labelled: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """As `outranking` with all pairs of a query and an item in one ranking.

    Args:
        scores: As `outranking` takes them.
        labelled: Likewise; L in all.

    Returns:
        For the labelled pairs, query by query: how many unlabelled pairs, of any query, score at least as much, (L,)
        int64, and their scores, (L,).

    Raises:
        ValueError: As `outranking`.
    """
    counter = _count(scores, labelled, pooled=True)
    return counter.unlabelled()[0], np.concatenate(counter.values)


def to_indices(values: Indices, name: str) -> np.ndarray:
    """Distinct indices as an int64 array.

    Raises:
        ValueError: If they are not integers, negative, or repeat.
    """
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


def _count(scores: Scores, labelled: Sequence[np.ndarray], pooled: bool = False) -> '_Counter':
    """Read the scores, once or twice."""
    last = max((indices.max() for indices in labelled if len(indices)), default=-1)
    picked, held, counter, end = _Picked(labelled), [], None, 0
    for start, block in _blocks(scores, len(labelled)):
        end = start + block.shape[1]
        if counter is not None:
            counter.add(block)
            continue
        picked.add(start, block)
        if held is not None:
            held.append(block if isinstance(scores, Array) else _copy(block))
        if end > last and held is not None:
            counter = _Counter(picked.values, pooled)
            while held:
                counter.add(held.pop())
        elif held and sum(map(_num_bytes, held)) > HELD_BYTES:
            if iter(scores) is scores:
                raise ValueError(f'Item {last} of the scores is labelled, too far into the stream to hold what comes '
                                 'before: pass an object that can be iterated twice, or labelled items first.')
            held = None
    _check_range(labelled, end)
    if counter is None:
        counter, again = _Counter(picked.values, pooled), 0
        for start, block in _blocks(scores, len(labelled)):
            counter.add(block)
            again = start + block.shape[1]
        if again != end:
            raise ValueError(f'The scores had {end} items when read first and {again} when read again.')
    return counter


class _Picked:
    """Scores of the labelled items, as their pieces come by."""

    def __init__(self, labelled: Sequence[np.ndarray]) -> None:
        self.labelled = labelled
        self.values: list[np.ndarray] = []

    def add(self, start: int, block: Array) -> None:
        for query, indices in enumerate(self.labelled):
            here = np.flatnonzero((indices >= start) & (indices < start + block.shape[1]))
            columns = indices[here] - start
            found = _to_numpy(block[query][torch.from_numpy(columns) if isinstance(block, torch.Tensor) else columns])
            if len(self.values) == query:
                self.values.append(np.empty(len(indices), found.dtype))
            self.values[query][here] = found


class _Counter:
    """Number of scores that reach each of the labelled ones: those of the same query, or of any (`pooled`)."""

    def __init__(self, values: Sequence[np.ndarray], pooled: bool) -> None:
        self.values = values
        self.rankings = [np.concatenate(values)] if pooled else values
        self.levels = [np.sort(row) for row in self.rankings]
        self.counts = [np.zeros(len(row), dtype=np.int64) for row in self.rankings]

    def add(self, block: Array) -> None:
        for query in range(len(block)):
            ranking = query % len(self.levels)
            levels, counts = self.levels[ranking], self.counts[ranking]
            for start in range(0, block.shape[1], PIECE):
                scores = np.sort(_to_numpy(block[query, start:start + PIECE]))
                if np.isnan(scores[-1]):  # NaN sorts last
                    raise ValueError(f'scores[{query}] holds NaN.')
                counts += len(scores) - np.searchsorted(scores, levels)

    def unlabelled(self) -> list[np.ndarray]:
        """The counts without the labelled items' own, in the order of the labelled items."""
        return [(counts - len(row) + np.searchsorted(levels, levels))[np.searchsorted(levels, row)]
                for row, levels, counts in zip(self.rankings, self.levels, self.counts, strict=True)]


def _blocks(scores: Scores, num_queries: int) -> Iterator[tuple[int, Array]]:
    """First column and content of each piece, checked; empty ones are left out."""
    start, dtype = 0, None
    for block in [scores] if isinstance(scores, Array) else scores:
        if not isinstance(block, Array) or block.ndim != 2 or not len(block):
            got = tuple(block.shape) if isinstance(block, Array) else type(block).__name__
            raise ValueError(f'scores must have shape (queries, items) with at least one query, got {got}.')
        if len(block) != num_queries:
            raise ValueError(f'{len(block)} rows of scores for {num_queries} queries.')
        if dtype not in (None, block.dtype):
            raise ValueError(f'Pieces of scores are {dtype} and {block.dtype}: they must have one dtype.')
        dtype = block.dtype
        if block.shape[1]:
            yield start, block
        start += block.shape[1]


def _check_range(labelled: Sequence[np.ndarray], num_items: int) -> None:
    for query, indices in enumerate(labelled):
        if len(indices) and indices.max() >= num_items:
            raise ValueError(f'Query {query}: index {indices.max()} is out of range for {num_items} items.')


def _to_numpy(scores: Array) -> np.ndarray:
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu()
        scores = (scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores).numpy()
    if scores.dtype.kind not in 'fiub':
        raise ValueError(f'scores must be real numbers, got {scores.dtype}.')
    return scores


def _copy(block: Array) -> Array:
    return block.clone() if isinstance(block, torch.Tensor) else block.copy()


def _num_bytes(block: Array) -> int:
    return block.nbytes
