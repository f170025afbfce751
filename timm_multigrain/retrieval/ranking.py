"""Places of labelled items in rankings, exactly, without sorting the database.

A measure of retrieval needs to know where the few labelled items of a query stand. An item's place follows from the
number of unlabelled items that score at least as much, and those can be counted piece by piece: scores are a matrix or
a stream of pieces, and neither is copied as a whole. Ties count against the system: among equal scores every
unlabelled item stands before every labelled one.
"""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .counting import Array, count_reaching, to_numpy

__all__ = ['Array', 'Indices', 'Labelled', 'Scores', 'outranking', 'ranks_in_rows', 'to_indices']

Indices = Sequence[int] | Array
Scores = Array | Iterable[Array]

HELD_BYTES = 32 << 20  # of a stream, kept until the last labelled item has come by


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled items of Q queries, one after the other.

    Attributes:
        items: Database indices, (L,) int64.
        rows: Query of each, (L,) int64, ascending.
        kinds: Which list of the query each is from, (L,) int64, ascending within a query.
        num_queries: Q.
    """
    items: np.ndarray
    rows: np.ndarray
    kinds: np.ndarray
    num_queries: int

    @classmethod
    def of(cls, lists: Sequence[Sequence[Indices]], names: Sequence[str]) -> 'Labelled':
        """From one list or several for each query, such as the relevant and the ignored items, laid one after another.

        Args:
            lists: For each name a sequence of Q lists.
            names: Name of each in errors.

        Raises:
            ValueError: If there are not as many lists of each name, or the items of a query are no integers, negative
                or repeat.
        """
        counts = ', '.join(f'{len(queries)} lists of {name} items' for name, queries in zip(names, lists, strict=True))
        if len({len(queries) for queries in lists}) > 1:
            raise ValueError(f'There are {counts}: one of each is needed for a query.')
        arrays = [_to_array(items, f'{name}[{query}]') for query, group in enumerate(zip(*lists, strict=True))
                  for name, items in zip(names, group, strict=True)]
        sizes = np.array([len(items) for items in arrays], dtype=np.int64).reshape(-1, len(names))
        items = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
        rows = np.repeat(np.arange(len(sizes)), sizes.sum(1))
        kinds = np.repeat(np.tile(np.arange(len(names)), len(sizes)), sizes.ravel())
        pairs = np.sort(items + rows * (items.max(initial=0) + 1))
        repeated = pairs[1:][pairs[1:] == pairs[:-1]]
        if len(repeated) or (items < 0).any():
            for array, (query, name) in zip(arrays, ((q, n) for q in range(len(sizes)) for n in names), strict=True):
                to_indices(array, f'{name}[{query}]')
            query, item = divmod(repeated[0], items.max() + 1)
            raise ValueError(f'Query {query}: item {item} is in more than one list of {", ".join(names)}.')
        return cls(items, rows, kinds, len(sizes))


def outranking(scores: Scores, labelled: Labelled) -> np.ndarray:
    """For each labelled item, how many unlabelled items score at least as much for its query.

    A stream is read once if the scores that come before its last labelled item fit 32 MiB, as they do where
    distractors follow a labelled set. Otherwise it is read twice, and so has to be something that can be iterated
    again (not a generator).

    Args:
        scores: Similarities of Q queries to N items, higher is nearer: (Q, N), or (Q, n) pieces in the order of the
            items. Any real dtype, infinities allowed.
        labelled: The items.

    Returns:
        (L,) int64.

    Raises:
        ValueError: If shapes or dtypes disagree, a score is NaN, an index is out of range, or a stream would have to
            be read twice and cannot.
    """
    return _count(scores, labelled).unlabelled()


def ranks_in_rows(above: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks of the items that are looked for, in rankings without the other labelled ones.

    Args:
        above: Of those items, what `outranking` gives, (L,).
        rows: Query of each, ascending.

    Returns:
        Ranks, ascending within a query, and how many of the items stand before each; both (L,) int64.
    """
    found = np.arange(len(rows)) - np.searchsorted(rows, rows)
    offsets = rows * (above.max(initial=0) + 1)
    return np.sort(above + offsets) - offsets + found, found


def to_indices(values: Indices, name: str) -> np.ndarray:
    """Distinct indices as an int64 array.

    Raises:
        ValueError: If they are not integers, negative, or repeat.
    """
    values = _to_array(values, name)
    if len(values) and values.min() < 0:
        raise ValueError(f'{name} holds the negative value {values.min()}.')
    if len(np.unique(values)) < len(values):
        raise ValueError(f'{name} holds a value more than once.')
    return values


def _to_array(values: Indices, name: str) -> np.ndarray:
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if not values.size:
        return np.empty(0, dtype=np.int64)
    if values.ndim != 1 or values.dtype.kind not in 'iu':
        raise ValueError(f'{name} must be a list of integers, got shape {values.shape} of {values.dtype}.')
    return values.astype(np.int64, copy=False)


def _count(scores: Scores, labelled: Labelled) -> '_Counter':
    """Read the scores, once or twice."""
    last = labelled.items.max(initial=-1)
    counter, held, end = _Counter(labelled), [], 0
    for start, block in _blocks(scores, labelled.num_queries):
        end = start + block.shape[1]
        if counter.complete:
            counter.count(block)
            continue
        counter.pick(start, block)
        if held is None:
            continue
        held.append(block if isinstance(scores, Array) else _copy(block))
        if end > last:
            counter.complete = True
            while held:
                counter.count(held.pop())
        elif sum(block.nbytes for block in held) > HELD_BYTES:
            if isinstance(scores, Iterator):
                raise ValueError(f'Item {last} of the scores is labelled, too far into the stream to hold what comes '
                                 'before: pass an object that can be iterated twice, or labelled items first.')
            held = None
    if end <= last:
        query = labelled.rows[labelled.items.argmax()]
        raise ValueError(f'Query {query}: index {last} is out of range for {end} items.')
    return counter if counter.complete else _count_again(scores, counter, end)


def _count_again(scores: Scores, counter: '_Counter', num_items: int) -> '_Counter':
    end = 0
    counter.complete = True
    for start, block in _blocks(scores, counter.labelled.num_queries):
        counter.count(block)
        end = start + block.shape[1]
    if end != num_items:
        raise ValueError(f'The scores had {num_items} items when read first and {end} when read again.')
    return counter


class _Counter:
    """Number of scores that reach those of the labelled items: of the same query.

    Attributes:
        complete: Whether the scores of all labelled items have been picked.
        values: Those scores, (L,).
    """

    def __init__(self, labelled: Labelled) -> None:
        self.labelled = labelled
        self.complete = False
        self.values: np.ndarray | None = None
        self.order: np.ndarray | None = None
        self.counts = np.zeros(len(labelled.items), dtype=np.int64)

    def pick(self, start: int, block: Array) -> None:
        inside = (self.labelled.items >= start) & (self.labelled.items < start + block.shape[1])
        rows, columns = self.labelled.rows[inside], self.labelled.items[inside] - start
        if isinstance(block, torch.Tensor):
            rows, columns = torch.from_numpy(rows), torch.from_numpy(columns)
        found = to_numpy(block[rows, columns])
        if self.values is None:
            self.values = np.empty(len(inside), found.dtype)
        self.values[inside] = found

    def count(self, block: Array) -> None:
        if self.order is None:
            self._sort_levels()
        self.counts += count_reaching(block, self.levels, self.rows)

    def unlabelled(self) -> np.ndarray:
        """The counts without the labelled items' own, in the order of the labelled items."""
        if self.order is None:
            self._sort_levels()
        ends = np.searchsorted(self.rows, self.rows, side='right')
        new = (self.levels[1:] != self.levels[:-1]) | (self.rows[1:] != self.rows[:-1])
        firsts = np.concatenate([[True], new])[:len(self.levels)]
        same = np.maximum.accumulate(np.where(firsts, np.arange(len(firsts)), 0))  # first of the equal levels
        unlabelled = np.empty_like(self.counts)
        unlabelled[self.order] = self.counts - (ends - same)
        return unlabelled

    def _sort_levels(self) -> None:
        if np.isnan(self.values).any():
            raise ValueError(f'scores[{self.labelled.rows[np.isnan(self.values)][0]}] holds NaN.')
        rows = self.labelled.rows
        places = np.empty(len(rows), dtype=np.int64)
        places[np.argsort(self.values)] = np.arange(len(rows))
        self.order = np.argsort(places + rows * len(rows))  # by row, then score: np.lexsort takes several times longer
        self.levels, self.rows = self.values[self.order], rows[self.order]


def _blocks(scores: Scores, num_queries: int) -> Iterator[tuple[int, Array]]:
    """First column and content of each piece, checked; empty ones are left out."""
    start, dtype = 0, None
    for block in [scores] if isinstance(scores, Array) else scores:
        if not isinstance(block, Array) or block.ndim != 2 or not len(block):
            got = tuple(block.shape) if isinstance(block, Array) else type(block).__name__
            raise ValueError(f'scores must have shape (queries, items) with at least one query, got {got}.')
        if len(block) != num_queries:
            raise ValueError(f'There are {len(block)} rows of scores for {num_queries} queries.')
        if dtype is not None and dtype != block.dtype:
            raise ValueError(f'Pieces of scores are {dtype} and {block.dtype}: they must have one dtype.')
        dtype = block.dtype
        if block.shape[1]:
            yield start, block
        start += block.shape[1]


def _copy(block: Array) -> Array:
    return block.clone() if isinstance(block, torch.Tensor) else block.copy()
