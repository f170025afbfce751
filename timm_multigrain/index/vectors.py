"""The mapped file of descriptors: a chunk is compared with its checksum when it is first touched."""
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from timm_multigrain.files import open_regular

from .errors import DamagedIndex

__all__ = ['VectorFile', 'Vectors']

CHUNK = 1 << 25  # bytes that are read at a time


class VectorFile:
    """The committed rows of a file of vectors, read-only; threads may share it. Later rows are not seen.

    Args:
        path: The file.
        dim: Components of a vector.
        dtype: float32 or float16.
        chunks: (n, 3) int64, the first row, the number of rows and the CRC-32 of each chunk, without gaps.

    Raises:
        DamagedIndex: The file is missing or shorter than what was committed.
    """

    def __init__(self, path: Path, dim: int, dtype: np.dtype, chunks: np.ndarray):
        self.path = path
        self._starts, self._crc32 = chunks[:, 0], chunks[:, 2]
        self._good = np.zeros(len(chunks), dtype=bool)
        self._lock = threading.Lock()
        rows = int(chunks[:, 1].sum())
        self._rows = np.empty((0, dim), dtype=dtype)
        if not rows:
            return
        wanted = rows * dim * dtype.itemsize
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < wanted:
                    raise DamagedIndex(path, f'it has {size:,} bytes of {wanted:,}')
                mapped = mmap.mmap(file.fileno(), wanted, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DamagedIndex(path, 'it is missing') from None
        self._rows = np.frombuffer(mapped, dtype=dtype).reshape(rows, dim)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows by a slice without step, as a view, or by (n,) int64, as a copy.

        Raises:
            DamagedIndex: A chunk that they are in is not what was committed.
        """
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            if start >= stop:
                return self._rows[:0]
            first, last = np.searchsorted(self._starts, [start, stop - 1], side='right') - 1
            chunks = np.arange(first, last + 1)
        else:
            chunks = np.unique(np.searchsorted(self._starts, rows, side='right') - 1)
        if not self._good[chunks].all():
            self._check(chunks[~self._good[chunks]])
        return self._rows[rows]

    def _check(self, chunks: np.ndarray) -> None:
        ends = np.append(self._starts[1:], len(self))
        with self._lock:
            for i in chunks:
                if zlib.crc32(self._rows[self._starts[i]:ends[i]]) != self._crc32[i]:
                    raise DamagedIndex(self.path, f'the checksum of rows {self._starts[i]} to {ends[i] - 1} differs')
                self._good[i] = True


class Vectors:
    """Descriptors of an index, a read-only (N, D) array of L2-normalised rows, whatever was removed in between.

    Slices of images that lie together in the file are views of it; anything else is copied. `numpy.asarray` gives all.

    Args:
        file: The file.
        rows: (N,) int64, the row of the file that each image has.

    Attributes:
        shape: (N, D).
        dtype: float32 or float16.
    """
    ndim = 2

    def __init__(self, file: VectorFile, rows: np.ndarray):
        self.file, self._rows = file, rows
        self.dtype, dim = file[:0].dtype, file[:0].shape[1]
        self.shape = len(rows), dim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        """Rows by number, slice, list of numbers or mask."""
        rows = self._rows[key]
        if rows.ndim == 0:
            return self.file[int(rows):int(rows) + 1][0]
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self.file[int(rows[0]):int(rows[-1]) + 1]
        return self.file[rows]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self[:]
        return array.astype(dtype) if dtype is not None and dtype != array.dtype else array

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, (n, D), 32 MiB at a time."""
        step = max(1, CHUNK // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, len(self), step):
            yield self[start:start + step]
