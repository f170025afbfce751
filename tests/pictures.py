"""Pictures for the tests: random ones, and one that claims more than it holds."""
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def noise(size: tuple[int, int] = (40, 40), cells: tuple[int, int] | None = None, seed=0) -> Image.Image:
    """Random colours of each pixel, or of so many cells across and down with what lies between them smooth."""
    width, height = cells or size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def write_noise(root: Path, names, size: tuple[int, int] = (40, 40), cells: tuple[int, int] | None = None) -> Path:
    """Another picture for each of the names below a folder."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(size, cells, rng).save(root / name)
    return root


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
