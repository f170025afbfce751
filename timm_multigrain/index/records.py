"""What the index knows of an image besides its descriptor: a record of fixed size, so that a million are one array."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np

__all__ = ['RECORD', 'TOP', 'Record', 'classes_of', 'path_from_text', 'path_to_text', 'record_row', 'top_classes']

TOP = 5  # classes kept of an image

# root is the number of the indexed folder, vector the row of the file of vectors
RECORD = np.dtype([
    ('root', '<u4'), ('vector', '<u8'), ('bytes', '<u8'), ('mtime_ns', '<i8'), ('width', '<u4'), ('height', '<u4'),
    ('sha256', 'u1', 32), ('classes', '<i4', TOP), ('probabilities', '<f4', TOP),
])


@dataclass(frozen=True)
class Record:
    """An indexed image.

    Attributes:
        path: Where it was when it was indexed, as os.fsdecode gives it: bytes that are not UTF-8 are surrogate escapes.
        width: Pixels, as the picture is shown (turned as its EXIF orientation says, where the index does so).
        height: Pixels.
        bytes: Size of the file.
        sha256: Hash of the file, hexadecimal.
        mtime_ns: When the file was last changed, nanoseconds since 1970.
        classes: (name, probability) of the most probable classes, best first; empty for a model without classes.
    """
    path: str
    width: int
    height: int
    bytes: int
    sha256: str
    mtime_ns: int
    classes: tuple[tuple[str, float], ...] = ()


def record_row(
        *, root: int, size: tuple[int, int], bytes: int, mtime_ns: int, sha256: bytes,
        classes: Sequence[int] = (), probabilities: Sequence[float] = (), vector: int = 0,
) -> np.ndarray:
    """The record of an image, () of `RECORD`."""
    row = np.zeros((), dtype=RECORD)
    row['root'] = root
    row['width'], row['height'] = size
    row['bytes'], row['mtime_ns'], row['vector'] = bytes, mtime_ns, vector
    row['sha256'] = np.frombuffer(sha256, dtype=np.uint8)
    row['classes'] = -1
    row['classes'][:len(classes)] = classes
    row['probabilities'][:len(classes)] = probabilities
    return row


def top_classes(logits) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes of (n, K) logits: (n, min(K, TOP)) class numbers and probabilities, best first."""
    probabilities, classes = logits.float().softmax(dim=1).topk(min(TOP, logits.shape[1]), dim=1)
    return classes.cpu().numpy(), probabilities.cpu().numpy()


def classes_of(row: np.ndarray, label_names: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    """(name, probability) of a record's classes; the number stands for a class without a name."""
    return tuple(
        (label_names[number] if label_names else str(number), float(probability))
        for number, probability in zip(row['classes'].tolist(), row['probabilities'].tolist(), strict=True)
        if number >= 0)


_BYTES = 'bytes:'  # marks a path in percent encoding


def path_to_text(path: str) -> str:
    """A path as Unicode that any store takes; one whose bytes are not UTF-8 is percent-encoded, and marked."""
    try:
        path.encode('utf-8')
    except UnicodeEncodeError:
        return _BYTES + quote_from_bytes(os.fsencode(path))
    return _BYTES + quote_from_bytes(os.fsencode(path)) if path.startswith(_BYTES) else path


def path_from_text(text: str) -> str:
    """The path that `path_to_text` was given."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_BYTES))) if text.startswith(_BYTES) else text
