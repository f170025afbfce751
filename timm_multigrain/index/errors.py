"""What can be wrong with an index folder, each with a sentence for the user."""
from contextlib import contextmanager

__all__ = ['DamagedIndex', 'IndexInUse', 'NotWritten', 'OtherModel', 'writing']


class DamagedIndex(ValueError):
    """A file of the index is not what was written. The pictures are not touched by it; the index is made again."""

    def __init__(self, path, what: str):
        super().__init__(f'{path} is damaged ({what}): put a backup of the folder back, or delete the folder and run '
                         'timm-multigrain index again.')


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
        NotWritten: The block raises OSError.
    """
    try:
        yield
    except OSError as e:
        raise NotWritten(f'{folder} could not be written to ({e.strerror or e}): what was committed to it before is '
                         'whole; make room on that disk and run the same again.') from e
