"""One writer at a time, through a lock that the system takes back when its process ends, however it ends."""
import os
import threading
from contextlib import contextmanager
from pathlib import Path

from timm_multigrain.files import open_regular

from .errors import IndexInUse

__all__ = ['index_lock']

_held: set[str] = set()  # the system's locks do not keep the threads of one process apart
_guard = threading.Lock()


@contextmanager
def index_lock(folder: Path):
    """Hold the folder's lock; its file is empty and stays.

    Raises:
        IndexInUse: Another process or thread holds it.
    """
    path = folder / 'lock'
    key = os.path.realpath(path)
    with _guard:
        if key in _held:
            raise IndexInUse(f'{folder} is being written to by this process already.')
        _held.add(key)
    try:
        with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
            try:
                _lock(file)
            except OSError as e:
                raise IndexInUse(f'{folder} is being written to by another process: wait until it has ended.') from e
            yield
    finally:
        with _guard:
            _held.discard(key)


def _lock(file) -> None:
    """A POSIX record lock: unlike flock's, forked loader processes that outlive the indexer do not hold it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
