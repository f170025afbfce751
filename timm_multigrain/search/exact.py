"""Exact nearest neighbours by inner product, a chunk of the database at a time.

Memory holds the queries, one chunk of the database and its scores, whatever the size of the database.
"""
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

Array = np.ndarray | torch.Tensor
Scores = Array | Iterable[Array]
CHUNK_BYTES = 32 << 20
LEAST_CHUNK = 256
BLOCK_BYTES = 28 << 20  # glibc's malloc takes 32 MiB and more from the system each time, which costs a tenth of all
LEAST_ROWS, MOST_QUERIES = 64, 4096


class SimilarityChunks:
    """Similarities (inner products) of Q queries to a database as (Q, n) float32 chunks, in its order.

    It can be iterated again if the database can: a tensor, a list or an object with `__iter__`, not a generator.

    Args:
        queries: (Q, D) vectors; their device is where the work is done.
        database: (N, D) vectors, or shards (n, D) of them in order.
        chunk_size: Database vectors at a time, by default as many as fit 32 MiB (256 at least).
        offsets: (Q,) to add to the scores of each query, see `rerank.score_offsets`.
    """

    def __init__(self, queries: Array, database: Array | Iterable[Array], chunk_size: int | None = None,
                 offsets: torch.Tensor | None = None) -> None:
        self.queries, self.database, self.offsets = as_vectors(queries, 'queries'), database, offsets
        fitting = max(LEAST_CHUNK, CHUNK_BYTES // (4 * max(1, *self.queries.shape)))
        self.chunk_size = fitting if chunk_size is None else chunk_size
        rows = BLOCK_BYTES // (4 * max(1, len(database))) if isinstance(database, Array) else 0
        self.in_rows = rows >= LEAST_ROWS and len(database) > 0
        self.block = min(rows, MOST_QUERIES) if self.in_rows else MOST_QUERIES
        self._used = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._used and isinstance(self.database, Iterator):
            raise ValueError('The database is a generator that was read already: pass an object that can be iterated '
                             'again, such as a list of shards.')
        self._used = True
        for shard in shards_of(self.database):
            shard = as_vectors(shard, 'database', self.queries.shape[1])
            for start in range(0, len(shard), self.chunk_size):
                chunk = shard[start:start + self.chunk_size]
                scores = self.queries @ chunk.to(self.queries.device, torch.float32).T
                yield scores if self.offsets is None else scores + self.offsets[:, None]

    @property
    def in_blocks(self) -> bool:
        """Whether there are more queries than one of `blocks` has."""
        return len(self.queries) > self.block

    def blocks(self) -> Iterator[tuple[slice, Scores]]:
        """Scores of some queries at a time, with the slice that these are.

        Where the database is in memory, and not too large, they are whole rows, (q, N), of 28 MiB; else chunks.
        """
        for start in range(0, len(self.queries), self.block):
            rows = slice(start, start + self.block)
            offsets = None if self.offsets is None else self.offsets[rows]
            if self.in_rows:
                part, = SimilarityChunks(self.queries[rows], self.database, len(self.database), offsets)
            else:
                part = SimilarityChunks(self.queries[rows], self.database, offsets=offsets)
            yield rows, part


def nearest(queries: Array, database: Array | Iterable[Array], k: int,
            chunk_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k database vectors with the largest inner products, exactly.

    Args:
        queries: As of `SimilarityChunks`, as are `database` and `chunk_size`.
        k: How many; all N if there are fewer.

    Returns:
        Scores (Q, k) float32, highest first, and database indices (Q, k) int64; equal scores by index.

    Example:
        >>> nearest(torch.tensor([[1., 0.]]), torch.tensor([[0., 1.], [1., 0.], [.6, .8]]), k=2)
        (tensor([[1.0000, 0.6000]]), tensor([[1, 2]]))
    """
    return nearest_of(SimilarityChunks(queries, database, chunk_size), k)


def nearest_of(scores: Scores, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of each row of scores, as `nearest`.

    Args:
        scores: (Q, N), or (Q, n) chunks in database order.
    """
    if k < 1:
        raise ValueError(f'k is {k}: give 1 or more.')
    best, start = None, 0
    for chunk in map(torch.as_tensor, shards_of(scores)):
        if chunk.isnan().any():
            raise ValueError('A similarity is NaN: the vectors hold NaN or infinity.')
        values, indices = _top(chunk, k)
        indices += start
        start += chunk.shape[1]
        if best is not None:  # its indices are lower, so that equal scores stay in order
            values, indices = torch.cat([best[0], values], 1), torch.cat([best[1], indices], 1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            values, indices = values[:, :k], indices.gather(1, order[:, :k])
        best = values, indices
    if best is None:
        raise ValueError('The database is empty.')
    return best


def _top(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of each row with their columns, equal ones by column (torch.topk leaves their order open)."""
    if k >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)
    values, columns = scores.topk(k + 1)
    shared, columns = (values[:, k - 1] == values[:, k]).nonzero()[:, 0], columns[:, :k]  # two for the last place
    columns[shared] = scores[shared].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def shards_of(database: Array | Iterable[Array]) -> Iterable[Array]:
    """A whole as its only shard."""
    return [database] if isinstance(database, Array) else database


def as_vectors(vectors: Array, name: str, dim: int | None = None) -> torch.Tensor:
    """(n, dim) tensor, float32 if it is of queries (`dim` None); ValueError for another shape."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # of arrays that are read-only, such as mapped files
        vectors = torch.as_tensor(vectors).detach()
    if vectors.ndim != 2 or dim not in (None, vectors.shape[1]):
        wanted = '(vectors, dimensions)' if dim is None else f'(vectors, {dim}), the dimensions of the queries'
        raise ValueError(f'{name} must have shape {wanted}, got {tuple(vectors.shape)}.')
    return vectors.float() if dim is None else vectors
