"""Files that appear whole or not at all, their hash, and JSON files that anybody may have written."""
import errno
import hashlib
import json
import math
import os
import reprlib
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON = 256 << 20  # bytes
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_WORDS = {str: 'a text', bool: 'true or false', int: 'an integer', float: 'a number', None: 'null'}


def read_json(path: str | os.PathLike, what: str = 'file') -> Any:
    """Content of a JSON file; `what` it is, for the error.

    Raises:
        FileNotFoundError: File not found.
        ValueError: It is not JSON, or larger than any that this package reads.
    """
    try:
        with open(path, 'rb') as file:
            return parse_json(file.read(MAX_JSON + 1))
    except FileNotFoundError:
        raise FileNotFoundError(f'{printable(path)}: {what} not found.') from None
    except ValueError as e:
        raise ValueError(f'{printable(path)} is not JSON: {e}.') from e


def parse_json(text: bytes | str) -> Any:
    """The value of JSON text; ValueError if it is not JSON, which NaN and infinities are not."""
    def refuse(name: str) -> None:
        raise ValueError(f'{name} is not a number in JSON')

    if len(text) > MAX_JSON:
        raise ValueError(f'it has more than {MAX_JSON >> 20} MB')
    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError('it is nested too deep') from None


def json_p(p: float | list[float] | None) -> float | str | list[float] | None:
    """An exponent p as strict JSON can hold it."""
    if isinstance(p, list):
        return [json_p(value) for value in p]
    return 'inf' if p == math.inf else p


def check_json(value: Any, form: Any, where: str) -> None:
    """Refuse a value of another form than the one expected, before anything is done with it.

    Args:
        value: What `read_json` gave.
        form: str, bool, int (of 64 bits), float (any finite number), None for null, [form] for a list, {str: form} for
            an object of any names, {'name': form, ...} for an object with at least these, or a tuple of forms.
        where: Name of the value, for the error.
    """
    forms = form if isinstance(form, tuple) else (form,)
    form = next((one for one in forms if _fits(value, one)), ...)
    if form is ...:
        words = ' or '.join('a list' if isinstance(one, list) else 'an object' if isinstance(one, dict) else _WORDS[one]
                            for one in forms)
        raise ValueError(f'{where} has to be {words}, not {printable(reprlib.repr(value))}.')
    if isinstance(form, list):
        for number, inner in enumerate(value):
            check_json(inner, form[0], f'{where}[{number}]')
    elif isinstance(form, dict):
        missing = [name for name in form if name is not str and name not in value]
        if missing:
            raise ValueError(f'{where} lacks {", ".join(missing)}.')
        for name in value if str in form else form:
            check_json(value[name], form[str if str in form else name], f'{where}.{printable(name)}')


def _fits(value: Any, form: Any) -> bool:
    if form is int or form is float:
        number = isinstance(value, (int, form)) and not isinstance(value, bool)
        return number and (-2 ** 63 <= value < 2 ** 63 if isinstance(value, int) else math.isfinite(value))
    return value is None if form is None else isinstance(value, form if isinstance(form, type) else type(form))


def counted(number: int, noun: str) -> str:
    """'1 image', '1,000 images', '2 queries'."""
    if number != 1:
        noun = f'{noun[:-1]}ies' if noun.endswith('y') else f'{noun}s'
    return f'{number:,} {noun}'


def printable(name: str | os.PathLike) -> str:
    """A file name on one line in characters that every terminal and UTF-8 file can hold."""
    text = os.fsdecode(name).encode('utf-8', 'backslashreplace').decode('utf-8')
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text)


def read_lines(path: str | os.PathLike, what: str) -> list[str]:
    """Lines of a UTF-8 text, stripped, without blank ones; FileNotFoundError, or ValueError if it is not text."""
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f'{what} {printable(path)} not found.') from None
    except UnicodeDecodeError as e:
        raise ValueError(f'{what} {printable(path)} is not a UTF-8 text file: {e.reason}.') from e
    return [line.strip() for line in lines if line.strip()]


def open_regular(path: str | bytes | os.PathLike, flags: int = os.O_RDONLY, *, follow_links: bool = False) -> BinaryIO:
    """Open a file that must be a regular one, unbuffered: no FIFO to wait for, no device, by default no link.

    To be written to (`flags` O_RDWR), it must not have another name elsewhere either.

    Raises:
        OSError: Not such a file, or it cannot be opened.
    """
    flags |= getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_CLOEXEC', 0) | getattr(os, 'O_BINARY', 0)
    if not follow_links:
        flags |= getattr(os, 'O_NOFOLLOW', 0)
        if os.path.islink(path):
            raise OSError(f'{os.fsdecode(path)!r} is a link, not a file')
    descriptor, written_to = os.open(path, flags, 0o666), flags & os.O_RDWR
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (written_to and status.st_nlink > 1):
        os.close(descriptor)
        kind = 'is a hard link to a file elsewhere' if stat.S_ISREG(status.st_mode) else 'is not a regular file'
        raise OSError(f'{os.fsdecode(path)!r} {kind}')
    return os.fdopen(descriptor, 'r+b' if written_to else 'rb', buffering=0)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a UTF-8 file under a temporary name, then rename; its folder is made if missing, an old file replaced."""
    return write_bytes(path, text.encode('utf-8'))


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write a file as `write_text` does."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)
    return Path(path)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name in the same folder, which is made if missing; what the block wrote there then takes the place of
    the file, flushed to the disk, unless it ends with an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}')
    try:
        yield unfinished
        fsync(unfinished)
        os.replace(unfinished, path)
    except OSError as e:
        if e.errno in _FULL and not e.filename:  # the system does not say which file did not fit
            e.filename = os.fspath(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


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
