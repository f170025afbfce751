"""Files that only grow, with a CRC-32 for every block of 1 MiB.

What was committed is `Extent`: a size and the checksums. Bytes beyond it are the remains of a writer that was killed,
and are cut off by the next one. A reader maps the committed part and checks a block when it is first touched, so that
opening an index of many gigabytes takes no time and a damaged byte is found before it can be used.
"""
import mmap
import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from timm_multigrain.files import open_regular

from .errors import DamagedIndex

__all__ = ['BLOCK', 'CheckedFile', 'Extent', 'GrowingFile', 'extent_of']

BLOCK = 1 << 20


@dataclass(frozen=True)
class Extent:
    """The committed part of a file: bytes, and the CRC-32 of each block of `BLOCK` bytes; the last is shorter."""
    size: int = 0
    crc32: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self):
        if self.size < 0 or len(self.crc32) != -(-self.size // BLOCK):
            raise ValueError(f'{len(self.crc32)} checksums for {self.size} bytes')

    def to_json(self) -> dict:
        return {'size': self.size, 'crc32': ''.join(f'{value:08x}' for value in self.crc32)}

    @classmethod
    def from_json(cls, value: dict) -> 'Extent':
        digits = value['crc32']
        return cls(int(value['size']), tuple(int(digits[i:i + 8], 16) for i in range(0, len(digits), 8)))


class CheckedFile:
    """Read-only map of the committed part of a file; threads may share it.

    Args:
        path: The file.
        extent: What the manifest says of it.

    Raises:
        DamagedIndex: The file is not there or shorter than what was committed.
    """

    def __init__(self, path: Path, extent: Extent):
        self.path, self.extent = path, extent
        self._good = np.zeros(len(extent.crc32), dtype=bool)
        self._lock = threading.Lock()
        self._map = np.empty(0, dtype=np.uint8)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size >= extent.size > 0:
                    buffer = mmap.mmap(file.fileno(), extent.size, access=mmap.ACCESS_READ)
                    self._map = np.frombuffer(buffer, dtype=np.uint8)
        except FileNotFoundError:
            raise DamagedIndex(path, 'it is missing') from None
        if size < extent.size:
            raise DamagedIndex(path, f'it has {size:,} bytes of {extent.size:,}')

    def view(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes start to stop, uint8, once the blocks they lie in are checked.

        Raises:
            DamagedIndex: A block is not what was committed.
        """
        stop = self.extent.size if stop is None else stop
        if not 0 <= start <= stop <= self.extent.size:
            raise DamagedIndex(self.path, f'bytes {start:,} to {stop:,} of {self.extent.size:,} are asked for')
        if stop > start:
            self._check(np.arange(start // BLOCK, (stop - 1) // BLOCK + 1))
        return self._map[start:stop]

    def rows(self, rows: np.ndarray, dtype: np.dtype, dim: int) -> np.ndarray:
        """A copy of some rows, (n, dim), of a file that is an array of them; only their blocks are checked.

        Raises:
            DamagedIndex: A block is not what was committed.
        """
        width = dim * dtype.itemsize
        blocks = np.concatenate([rows * width // BLOCK, (rows * width + width - 1) // BLOCK])
        self._check(np.unique(blocks))
        return self._map.view(dtype).reshape(-1, dim)[rows]

    def _check(self, blocks: np.ndarray) -> None:
        if self._good[blocks].all():
            return
        with self._lock:
            for block in blocks[~self._good[blocks]]:
                if zlib.crc32(self._map[block * BLOCK:(block + 1) * BLOCK]) != self.extent.crc32[block]:
                    raise DamagedIndex(self.path, f'the checksum of block {block} differs')
                self._good[block] = True


class GrowingFile:
    """Writer's end of such a file. What a killed writer left beyond the committed part is cut off at once.

    Args:
        path: The file, made if nothing of it is committed.
        extent: What the manifest says of it.

    Raises:
        DamagedIndex: The file is not there or shorter than what was committed.
    """

    def __init__(self, path: Path, extent: Extent):
        self.path = path
        self._committed = extent
        try:
            self._file = open_regular(path, os.O_RDWR | (0 if extent.size else os.O_CREAT))
        except FileNotFoundError:
            raise DamagedIndex(path, 'it is missing') from None
        size = os.fstat(self._file.fileno()).st_size
        if size < extent.size:
            self.close()
            raise DamagedIndex(path, f'it has {size:,} bytes of {extent.size:,}')
        self.rollback()

    @property
    def extent(self) -> Extent:
        """What is written so far, committed or not."""
        return Extent(self._size, tuple(self._crc32))

    @property
    def size(self) -> int:
        return self._size

    def append(self, data: bytes | np.ndarray) -> None:
        """Write at the end.

        Raises:
            OSError: No room, or another failure of the disk; `rollback` brings the committed state back.
        """
        data = memoryview(data).cast('B') if len(data) else b''
        while len(data):
            room = BLOCK - self._size % BLOCK
            written = self._file.write(data[:room])
            before = self._crc32.pop() if room < BLOCK else 0
            self._crc32.append(zlib.crc32(data[:written], before))
            self._size += written
            data = data[written:]

    def sync(self) -> Extent:
        """Flush to the disk whatever is not committed; it may be named in a manifest then."""
        if self.extent != self._committed:
            os.fsync(self._file.fileno())
        return self.extent

    def committed(self) -> None:
        """The manifest names what is written."""
        self._committed = self.extent

    def rollback(self) -> None:
        """Forget what is not committed."""
        self._size, self._crc32 = self._committed.size, list(self._committed.crc32)
        self._file.truncate(self._size)
        self._file.seek(self._size)

    def close(self) -> None:
        self._file.close()


def extent_of(path: Path) -> Extent:
    """Extent of a file that is finished."""
    checksums, size = [], 0
    with open_regular(path) as file:
        while chunk := file.read(BLOCK):
            checksums.append(zlib.crc32(chunk))
            size += len(chunk)
    return Extent(size, tuple(checksums))
