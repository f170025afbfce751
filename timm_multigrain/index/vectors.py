"""The descriptors of an index as one array, whatever was removed in between."""
from collections.abc import Iterator

import numpy as np

from .store import Store

__all__ = ['Vectors']

CHUNK = 1 << 25  # bytes that are read at a time


class Vectors:
    """Read-only (N, D) array, L2-normalised rows, mapped from the disk and checked when first touched.

    Slices of images that lie together on the disk are views of the map; anything else is copied. `numpy.asarray` gives
    all of it.

    Attributes:
        shape: (N, D).
        dtype: float32 or float16.
    """

    def __init__(self, store: Store):
        self._store = store
        self._rows = store.records['vector'].astype(np.int64)
        self.dtype = np.dtype(store.dtype)
        self.shape = (len(self._rows), store.dim)
        self.ndim = 2
        self.contiguous = bool((np.diff(self._rows) == 1).all())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        """Rows by number, slice, list of numbers or mask."""
        if isinstance(key, tuple):
            return self[key[0]][(slice(None), *key[1:]) if np.ndim(key[0]) or isinstance(key[0], slice) else key[1:]]
        rows = self._rows[key]
        if rows.ndim == 0:
            return self._store.vectors(int(rows), int(rows) + 1)[0]
        if not len(rows):
            return np.empty((0, self.shape[1]), dtype=self.dtype)
        first = int(rows[0])
        if int(rows[-1]) - first == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self._store.vectors(first, first + len(rows))
        return self._store.vectors_at(rows)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self[:]
        return array.astype(dtype) if dtype is not None and dtype != array.dtype else array

    def chunks(self, rows: int | None = None) -> Iterator[np.ndarray]:
        """All rows in order, (n, D) at a time; by default 32 MiB."""
        step = rows or max(1, CHUNK // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, len(self), step):
            yield self[start:start + step]
