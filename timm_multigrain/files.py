"""Files that appear whole or not at all."""
import os
import uuid
from pathlib import Path

__all__ = ['fsync', 'write_bytes', 'write_text']


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a UTF-8 file under a temporary name, then rename; its folder is made if missing, an old file replaced."""
    return write_bytes(path, text.encode('utf-8'))


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write a file as `write_text` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}')
    try:
        with open(unfinished, 'xb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def fsync(path: str | os.PathLike) -> None:
    """Flush a finished file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
