"""What an index knows of an image besides its descriptor, and what can be wrong with an index."""
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

TOP = 5  # classes kept per image

# of a fixed size, so that a million are one array; root numbers the indexed folders, vector the rows of their file
RECORD = np.dtype([
    ('root', '<u4'), ('vector', '<u8'), ('bytes', '<u8'), ('mtime_ns', '<i8'), ('width', '<u4'), ('height', '<u4'),
    ('sha256', 'u1', 32), ('classes', '<i4', TOP), ('probabilities', '<f4', TOP)])
# a part of an image that has a descriptor of its own: left, top, right, bottom in pixels; the category in UTF-8
REGION = np.dtype([('box', '<i4', 4), ('category', 'S64'), ('vector', '<u8')])


@dataclass(frozen=True)
class Record:
    """An indexed image as it was then: its pixels as the picture is shown, its bytes and time as those of the file.

    Attributes:
        path: As os.fsdecode gives it: bytes that are not UTF-8 are surrogate escapes.
        sha256: Hexadecimal.
        mtime_ns: When the file was last changed, nanoseconds since 1970.
        classes: (name, probability) of the most probable classes, best first; empty for a model without classes.
        box: Of a part of the image: left, top, right, bottom in pixels; None for the whole.
        category: What the part shows, as whoever gave the box says.
    """
    path: str
    width: int
    height: int
    bytes: int
    sha256: str
    mtime_ns: int
    classes: tuple[tuple[str, float], ...] = ()
    box: tuple[int, int, int, int] | None = None
    category: str = ''


def top_classes(logits) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes of (n, K) logits: (n, min(K, TOP)) class numbers and probabilities, best first."""
    probabilities, classes = logits.float().softmax(dim=1).topk(min(TOP, logits.shape[1]), dim=1)
    return classes.cpu().numpy(), probabilities.cpu().numpy()


class DamagedIndex(ValueError):
    """A file of the index is not what was written. The pictures are not touched by it; the index is made again."""

    def __init__(self, path, what: str):
        super().__init__(f'{path} is damaged ({what}): put a backup of the folder back, or delete the folder and run '
                         'timm-multigrain index again.')


class NewerFormat(RuntimeError):
    """An index that another version of the package has written."""


class IndexInUse(RuntimeError):
    """Another process is writing to the index."""


class OtherModel(ValueError):
    """A model or preprocessing that the index was not built with, so that its descriptors do not compare."""


class NotWritten(OSError):
    """The disk is full or fails; what was committed is whole."""


@contextmanager
def writing(folder):
    """Errors of the system and of SQLite become a `NotWritten` with a sentence."""
    try:
        yield
    except NotWritten:
        raise
    except (OSError, sqlite3.Error) as e:
        raise NotWritten(f'{folder} could not be written to ({getattr(e, "strerror", None) or e}): what was committed '
                         'to it before is whole; make room there, or take the right to write, and run it again.') from e
