"""The mapped file of descriptors: a chunk is compared with its checksum when it is first touched."""
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from timm_multigrain.files import open_regular

from .records import DamagedIndex

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
        self.path, self._starts, self._crc32 = path, chunks[:, 0], chunks[:, 2]
        self._good = np.zeros(len(chunks), dtype=bool)
        rows = int(chunks[:, 1].sum())
        wanted = rows * dim * dtype.itemsize
        mapped = b''
        if rows:
            try:
                with open_regular(path) as file:
                    if os.fstat(file.fileno()).st_size < wanted:
                        raise DamagedIndex(path, f'it is shorter than {wanted:,} bytes')
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
            chunks = np.arange(self._chunk_of(start), self._chunk_of(stop - 1) + 1)
        else:
            chunks = np.unique(self._chunk_of(rows))
        for i in chunks[~self._good[chunks]]:
            stop = self._starts[i + 1] if i + 1 < len(self._starts) else len(self)
            if zlib.crc32(self._rows[self._starts[i]:stop]) != self._crc32[i]:
                raise DamagedIndex(self.path, f'the checksum of rows {self._starts[i]} to {stop - 1} differs')
            self._good[i] = True
        return self._rows[rows]

    def _chunk_of(self, rows):
        return np.searchsorted(self._starts, rows, side='right') - 1


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
        self.shape, self.dtype = (len(rows), file[:0].shape[1]), file[:0].dtype

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
        return (self[start:start + step] for start in range(0, len(self), step))
