"""The mapped file of descriptors: a chunk is compared with its checksum when it is first touched."""
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from timm_multigrain.files import open_regular

from .records import DamagedIndex

CHUNK = 1 << 25  # bytes that are read at a time


class VectorFile:
    """The committed rows of a file of vectors, read-only; threads may share it. Later rows are not seen.

    Args:
        dim: Components of a vector.
        dtype: float32 or float16.
        chunks: (n, 3) int64, the first row, the number of rows and the CRC-32 of each chunk, without gaps.

    Raises:
        DamagedIndex: The file is missing or shorter than what was committed.
    """

    def __init__(self, path: Path, dim: int, dtype: np.dtype, chunks: np.ndarray):
        rows, mapped = int(chunks[:, 1].sum()), b''
        wanted = rows * dim * dtype.itemsize
        if rows:
            try:
                with open_regular(path) as file:
                    if os.fstat(file.fileno()).st_size < wanted:
                        raise DamagedIndex(path, f'it is shorter than {wanted:,} bytes')
                    mapped = mmap.mmap(file.fileno(), wanted, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                raise DamagedIndex(path, 'it is missing') from None
        self.path, self._rows = path, np.frombuffer(mapped, dtype=dtype).reshape(rows, dim)
        self._starts, self._ends, self._crc32 = chunks[:, 0], chunks[:, 0] + chunks[:, 1], chunks[:, 2]
        self._good = np.zeros(len(chunks), dtype=bool)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows by a slice, or by (n,) int64; those that lie together are a view."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        together = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        chunks = np.searchsorted(self._ends, rows[[0, -1]] if together else rows, side='right')
        for i in range(chunks[0], chunks[1] + 1) if together else np.unique(chunks):
            if not self._good[i]:
                if zlib.crc32(self._rows[self._starts[i]:self._ends[i]]) != self._crc32[i]:
                    where = f'rows {self._starts[i]} to {self._ends[i] - 1}'
                    raise DamagedIndex(self.path, f'the checksum of {where} differs')
                self._good[i] = True
        return self._rows[rows[0]:rows[-1] + 1] if together else self._rows[rows]


class Vectors:
    """Descriptors of an index, a read-only (N, D) array of L2-normalised rows, whatever was removed in between.

    Slices of images that lie together in the file are views of it; anything else is copied. `numpy.asarray` gives all.

    Args:
        rows: (N,) int64, the row of the file that each image has.
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
        return self.file[rows] if rows.ndim else self.file[rows[None]][0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, (n, D), 32 MiB at a time."""
        step = max(1, CHUNK // (self.shape[1] * self.dtype.itemsize))
        return (self[start:start + step] for start in range(0, len(self), step))
