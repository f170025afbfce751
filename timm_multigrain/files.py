"""Files that appear whole or not at all, their hash, and JSON files that anybody may have written."""
import hashlib
import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ['file_sha256', 'fsync', 'open_regular', 'parse_json', 'read_json', 'write_bytes', 'write_text']

MAX_JSON = 256 << 20  # bytes


def read_json(path: str | os.PathLike, what: str = '') -> Any:
    """Content of a JSON file.

    Args:
        path: The file.
        what: What it is, for the error.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not JSON, or larger than any that this package reads.
    """
    try:
        with open(path, 'rb') as file:
            return parse_json(file.read(MAX_JSON + 1))
    except FileNotFoundError:
        raise FileNotFoundError(f'{_shown(path)}: {what or "file"} not found.') from None
    except ValueError as e:
        raise ValueError(f'{_shown(path)} is not a JSON file: {e}.') from e


def parse_json(text: bytes | str) -> Any:
    """The value of JSON text, in which NaN and infinities are none.

    Raises:
        ValueError: It is not JSON.
    """
    def refuse(name: str) -> None:
        raise ValueError(f'{name} is not a number in JSON')

    if len(text) > MAX_JSON:
        raise ValueError(f'it has more than {MAX_JSON >> 20} MB')
    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError('it is nested too deep') from None


def _shown(path: str | os.PathLike) -> str:
    from timm_multigrain.images.sources import printable
    return printable(path)


def open_regular(path: str | bytes | os.PathLike, flags: int = os.O_RDONLY, *, follow_links: bool = False) -> BinaryIO:
    """Open a file that must be a regular one, unbuffered: no FIFO to wait for, no device, by default no link.

    Args:
        path: File.
        flags: As of `os.open`.
        follow_links: Take a link to a regular file, too.

    Raises:
        OSError: It is none, or cannot be opened.
    """
    flags |= getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_CLOEXEC', 0) | getattr(os, 'O_BINARY', 0)
    if not follow_links:
        flags |= getattr(os, 'O_NOFOLLOW', 0)
        if os.path.islink(path):
            raise OSError(f'{os.fsdecode(path)!r} is a link, not a file')
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f'{os.fsdecode(path)!r} is not a regular file')
    return os.fdopen(descriptor, 'r+b' if flags & (os.O_RDWR | os.O_WRONLY) else 'rb', buffering=0)


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


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
