"""The mapped file of descriptors: a chunk is compared with its checksum when it is first touched."""
import copy
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from timm_multigrain.files import open_regular

from .records import DamagedIndex

CHUNK = 1 << 25  # bytes that are read at a time


class Vectors:
    """L2-normalised descriptors, a read-only (N, D) array: the committed rows of a file, or some of them.

    Slices of rows that lie together in the file are views of it; anything else is copied. `numpy.asarray` gives all.
    Threads may share it. Later rows are not seen.

    Args:
        dtype: float32 or float16.
        chunks: (n, 3) int64, the first row, the number of rows and the CRC-32 of each chunk, without gaps.

    Raises:
        DamagedIndex: The file is missing or shorter than what was committed; or, when read, has other bytes.
    """
    ndim = 2

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
        self.path, self.dtype, self._rows = path, dtype, np.arange(rows)
        self._file = np.frombuffer(mapped, dtype=dtype).reshape(rows, dim)
        self._starts, self._ends, self._crc32 = chunks[:, 0], chunks[:, 0] + chunks[:, 1], chunks[:, 2]
        self._good = np.zeros(len(chunks), dtype=bool)

    def take(self, rows: np.ndarray) -> 'Vectors':
        """Those of (N,) int64 rows of the file, whatever was removed in between."""
        other = copy.copy(self)
        other._rows = rows
        return other

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._file.shape[1]

    def __getitem__(self, key) -> np.ndarray:
        """Rows by number, slice, numbers or mask."""
        rows = self._rows[key]
        if not rows.ndim:
            return self._read(rows[None])[0]
        return self._read(rows)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        together = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        chunks = np.searchsorted(self._ends, rows[[0, -1]] if together else rows, side='right')
        for i in range(chunks[0], chunks[1] + 1) if together else np.unique(chunks):
            if not self._good[i]:
                if zlib.crc32(self._file[self._starts[i]:self._ends[i]]) != self._crc32[i]:
                    where = f'rows {self._starts[i]} to {self._ends[i] - 1}'
                    raise DamagedIndex(self.path, f'the checksum of {where} differs')
                self._good[i] = True
        return self._file[rows[0]:rows[-1] + 1] if together else self._file[rows]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def in_chunks(vectors: Vectors | np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """All of (N, D) vectors, or these rows, in order, 32 MiB of float32 at a time."""
    step = max(1, CHUNK // (4 * vectors.shape[1]))
    for start in range(0, len(vectors if rows is None else rows), step):
        part = slice(start, start + step)
        yield vectors[part if rows is None else rows[part]]
