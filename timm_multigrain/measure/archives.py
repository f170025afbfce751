"""Archives of published image sets: downloaded, checked and unpacked so that nothing lands outside of their folder.

What a download was is kept in `downloads.json` beside it: address, length and SHA-256. Where the right hash is known it
is compared; where it is not, the first download is trusted, and a later one of the same address has to be equal.
"""
import errno
import gzip
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from timm_multigrain.files import check_json, file_sha256, read_json, write_text
from timm_multigrain.images.sources import printable
from timm_multigrain.models.download import download

__all__ = ['RemoteFile', 'fetch_files', 'unpack']

MANIFEST = 'downloads.json'
ARCHIVES = ('.tar', '.tar.gz', '.tgz', '.zip')
MAX_RATIO = 100  # unpacked over packed: photographs hardly shrink at all
MAX_FILES = 200_000
MAX_DIRECTORY = 16 << 20  # bytes of a zip
MAX_HEADER = 1 << 20  # bytes of what a tar says of a file
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a published set.

    Attributes:
        url: Address. What ends in .tar, .tar.gz, .tgz or .zip is unpacked, other files are kept as they are.
        folder: Where it goes, relative to the set's folder.
        sha256: Hash, where it is known.
    """
    url: str
    folder: str = '.'
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rstrip('/').rpartition('/')[2]


def fetch_files(remotes: Iterable[RemoteFile], root: str | os.PathLike,
                report: Callable[[str], None] = print) -> None:
    """Download what is missing, check it and unpack it; called again, it goes on with the first file missing.

    Args:
        remotes: Files of the set.
        root: Folder of the set, made if missing.
        report: Takes a sentence for each file.

    Raises:
        FileNotFoundError, RuntimeError: As `timm_multigrain.models.download.download`.
        ValueError: The content is not what is known of it, or an archive that is damaged or not safe to unpack.
    """
    root = Path(root)
    for remote in remotes:
        entry = _read_manifest(root).get(remote.url, {})
        if entry.get('done'):
            report(f'{remote.name}: there already, SHA-256 {printable(str(entry.get("sha256")))}')
            continue
        archive = remote.name.endswith(ARCHIVES)
        path = root / (f'.{remote.name}' if archive else Path(remote.folder) / remote.name)
        download(remote.url, path, f'download it by other means and unpack it into {root / remote.folder}')
        sha256 = file_sha256(path)
        expected = remote.sha256 or entry.get('sha256')
        if expected and sha256 != expected:
            path.unlink()
            known = 'is known of it' if remote.sha256 else f'{root / MANIFEST} has from its first download'
            raise ValueError(f'{remote.url} has SHA-256 {sha256}, not the {expected} that {known}: the file was '
                             'changed or damaged on its way, and was deleted.')
        size = path.stat().st_size
        _note(root, remote.url, bytes=size, sha256=sha256, done=not archive)
        if archive:
            unpack(path, root / remote.folder)
            path.unlink()
            _note(root, remote.url, done=True)
        how = 'as known' if remote.sha256 else 'not known beforehand: trusted, and kept for the next time'
        report(f'{remote.name}: {size} bytes, SHA-256 {sha256} ({how})')


def unpack(archive: str | os.PathLike, folder: str | os.PathLike) -> int:
    """Unpack a tar, tar.gz or zip archive of files and folders, all of it or nothing; old files are replaced.

    Returns:
        Number of files.

    Raises:
        ValueError: The archive is damaged, larger than any set of photographs, or holds a link, a device or a path that
            leads out of the folder.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.unpacking-', dir=folder) as work, open(archive, 'rb') as file:
        try:
            (_unzip if file.read(2) == b'PK' else _untar)(archive, work)
        except Exception as e:  # a damaged archive raises whatever its headers lead to
            if isinstance(e, OSError) and e.errno in _OF_THE_DISK:
                raise
            reason = printable(str(e)[:300]) or type(e).__name__
            raise ValueError(f'{printable(archive)} was not unpacked: {reason}.') from e
        files = [path for path in Path(work).rglob('*') if path.is_file()]
        for path in files:
            target = folder / path.relative_to(work)
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f'{printable(target)} is outside of {printable(folder)}, through a link there.')
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return len(files)


class _Reader:
    """A file that gives a limited number of bytes, of which headers get a few: both formats read those into memory."""

    def __init__(self, file: BinaryIO, size: int, header: int):
        self.file, self.size, self.left, self.header = file, size, MAX_RATIO * max(size, 1 << 16), header

    def read(self, size: int = -1) -> bytes:
        size = size if size >= 0 else self.size - self.file.tell()  # a zip is read to its end
        self.left, self.header = self.left - size, self.header - size
        if self.left < 0 or self.header < 0:
            raise ValueError('it is larger, unpacked or in its headers, than any set of photographs')
        return self.file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _untar(archive: Path, folder: str) -> None:
    if not hasattr(tarfile, 'data_filter'):
        raise ValueError('tar archives need Python 3.10.12, 3.11.4, or newer')
    with open(archive, 'rb') as file:
        zipped = file.read(2) == b'\x1f\x8b'
    with (gzip.open if zipped else open)(archive, 'rb') as file:
        reader = _Reader(file, archive.stat().st_size, MAX_HEADER)
        with tarfile.open(fileobj=reader, mode='r|') as tar:
            for number, info in enumerate(tar):
                _check(number, info.name, info.isdir() or (info.isreg() and not info.issparse()))
                reader.header = info.size + MAX_HEADER
                tar.extract(info, folder, filter='data')
                reader.header = MAX_HEADER


def _unzip(archive: Path, folder: str) -> None:
    with open(archive, 'rb') as file:
        reader = _Reader(file, archive.stat().st_size, MAX_DIRECTORY)
        with zipfile.ZipFile(reader) as zipped:
            for number, info in enumerate(zipped.infolist()):
                plain = info.external_attr >> 28 in (0, 0o4, 0o10)  # of a Unix file mode: not said, folder, file
                inside = (Path(folder) / info.filename).resolve().is_relative_to(Path(folder).resolve())
                _check(number, info.filename, plain and inside)
                reader.left -= info.file_size
                reader.header = info.compress_size + MAX_HEADER
                zipped.extract(info, folder)


def _check(number: int, name: str, plain: bool) -> None:
    if not plain:
        raise ValueError(f'{name!r} is not a plain file of the folder')
    if number >= MAX_FILES:
        raise ValueError(f'it holds more than {MAX_FILES} files')


def _read_manifest(root: Path) -> dict[str, dict]:
    path = root / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    check_json(manifest, {str: {str: (str, int, bool)}}, printable(path))
    return manifest


def _note(root: Path, url: str, **entry) -> None:
    manifest = _read_manifest(root)
    manifest[url] = {**manifest.get(url, {}), **entry}
    write_text(root / MANIFEST, json.dumps(manifest, indent=2) + '\n')
