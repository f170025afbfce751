"""A file from the web that appears whole or not at all, fetched further where the connection was cut."""
import glob
import http.client
import os
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

__all__ = ['download']

_TIMEOUT = 30  # seconds without a byte
_TRIES = 2
_CHUNK = 1 << 20
_INSTEAD = 'download it by other means and give the file'


class _Cut(Exception):
    pass


def download(url: str, path: str | os.PathLike, instead: str = _INSTEAD) -> Path:
    """Fetch a URL under a temporary name, check its length, then rename; the folder is made if missing.

    Args:
        url: Address of the file.
        path: File to write; an old one is replaced.
        instead: What else the user can do, as the end of a sentence.

    Raises:
        FileNotFoundError: The server does not have it.
        RuntimeError: No connection, a connection cut twice, a server that refuses, or a disk that does not take it.
    """
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}.partial')
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            file = open(unfinished, 'xb', buffering=0)  # noqa: SIM115 - closed below
        except OSError as e:
            raise _disk_error(path, e) from e
        with file:  # unbuffered: closing must not fail for bytes that a full disk refused
            _fetch(url, file, path, instead)
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # such as a folder that is a file: the error is on its way already
            unfinished.unlink(missing_ok=True)
    return path


def _remove_leftovers(path: Path) -> None:
    """What runs that were killed have left: no connection waits for an hour without a byte."""
    for old in path.parent.glob(f'.{glob.escape(path.name)}-*.partial'):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()


def _fetch(url: str, file: BinaryIO, path: Path, instead: str) -> None:
    validator = None
    for attempt in range(_TRIES):
        with _open(url, file.tell(), validator, instead) as response:
            validator = response.headers.get('ETag') or response.headers.get('Last-Modified')
            try:
                _receive(response, file, path)
            except _Cut as e:
                if attempt + 1 < _TRIES:
                    continue
                raise RuntimeError(f'{url} could not be downloaded: the connection was cut {_TRIES} times ({e}); '
                                   f'try again later, or {instead}.') from e
        _write(file, b'', path)
        return


def _open(url: str, start: int, validator: str | None, instead: str):
    """Answer of the server, from byte ``start`` on if the file is still the same there."""
    headers = {'User-Agent': 'timm-multigrain'}
    if start and validator:
        headers.update({'Range': f'bytes={start}-', 'If-Range': validator})
    failed = f'{url} could not be downloaded'
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code in (404, 410):
            raise FileNotFoundError(
                f'{failed}: the server does not have it ({e.code} {e.reason}); check the address, or {instead}.') from e
        when = 'try again later' if e.code >= 500 or e.code == 429 else 'check the address'
        raise RuntimeError(f'{failed}: the server answered {e.code} {e.reason}; {when}, or {instead}.') from e
    except (OSError, http.client.HTTPException, ValueError) as e:
        cause = getattr(e, 'reason', None) or e
        raise RuntimeError(f'{failed}: no connection ({str(cause) or type(cause).__name__}); check the address and '
                           f'the network, or {instead}.') from e


def _receive(response, file: BinaryIO, path: Path) -> None:
    if getattr(response, 'status', None) != 206:
        file.seek(0)
        file.truncate()
    length = response.headers.get('Content-Length')
    total = None if length is None else file.tell() + int(length)
    with tqdm(total=total, initial=file.tell(), desc=path.name, unit='B', unit_scale=True, disable=None) as bar:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (OSError, http.client.HTTPException) as e:
                raise _Cut(f'{file.tell()} of {total or "unknown"} bytes came, then {e or type(e).__name__}') from e
            if not chunk:
                break
            _write(file, chunk, path)
            bar.update(len(chunk))
    if total is not None and file.tell() < total:
        raise _Cut(f'{file.tell()} of {total} bytes came')


def _write(file: BinaryIO, chunk: bytes, path: Path) -> None:
    """Write a chunk; the empty one ends the file and waits for the disk."""
    try:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view):]
        if not chunk:
            os.fsync(file.fileno())
    except OSError as e:
        raise _disk_error(path, e) from e


def _disk_error(path: Path, error: OSError) -> RuntimeError:
    return RuntimeError(f'{path} could not be written ({error.strerror or error}): free space there, or choose '
                        'another folder (TORCH_HOME or cache_dir for downloaded weights, TMPDIR for temporary files).')
