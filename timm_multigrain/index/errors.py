"""What can be wrong with an index folder, each with a sentence for the user."""
import sqlite3
from contextlib import contextmanager

__all__ = ['DamagedIndex', 'IndexInUse', 'NewerFormat', 'NotWritten', 'OtherModel', 'writing']


class DamagedIndex(ValueError):
    """A file of the index is not what was written. The pictures are not touched by it; the index is made again."""

    def __init__(self, path, what: str):
        super().__init__(f'{path} is damaged ({what}): put a backup of the folder back, or delete the folder and run '
                         'timm-multigrain index again.')


class NewerFormat(ValueError):
    """An index that another version of the package has written."""


class IndexInUse(RuntimeError):
    """Another process is writing to the index."""


class OtherModel(ValueError):
    """A model or preprocessing that the index was not built with, so that its descriptors do not compare."""


class NotWritten(OSError):
    """The disk is full or fails; what was committed is whole."""


@contextmanager
def writing(folder):
    """What the system says of a write becomes a sentence.

    Raises:
        NotWritten: What is inside raises an error of the system or of SQLite.
    """
    try:
        yield
    except NotWritten:
        raise
    except (OSError, sqlite3.Error) as e:
        reason = getattr(e, 'strerror', None) or e
        raise NotWritten(f'{folder} could not be written to ({reason}): what was committed to it before is whole; make '
                         'room on that disk and run the same again.') from e
