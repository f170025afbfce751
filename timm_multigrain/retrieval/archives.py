"""Archives of published image sets: downloaded, checked and unpacked so that nothing lands outside of their folder.

What a download was is kept in `downloads.json` beside it: address, length and SHA-256. Where the right hash is known it
is compared; where it is not, the first download is trusted, and a later one of the same address has to be equal.
"""
import hashlib
import json
import os
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from timm_multigrain.download import download
from timm_multigrain.files import write_text

__all__ = ['RemoteFile', 'fetch_files', 'unpack']

MANIFEST = 'downloads.json'
ARCHIVES = ('.tar', '.tar.gz', '.tgz', '.zip')
MAX_BYTES = 200 << 30  # of one archive, unpacked
MAX_RATIO = 100  # unpacked over packed: photographs hardly shrink at all
MAX_FILES = 5_000_000
_CHUNK = 1 << 20


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
    """Download what is not there yet, check it and unpack it; called again, it goes on with the first file missing.

    Args:
        remotes: Files of the set.
        root: Folder of the set, made if missing.
        report: Takes a sentence for each file.

    Raises:
        FileNotFoundError, RuntimeError: As `timm_multigrain.download.download`.
        ValueError: The content is not what is known of it, or an archive that is damaged or not safe to unpack.
    """
    root = Path(root)
    for remote in remotes:
        entry = _read_manifest(root).get(remote.url, {})
        if entry.get('done'):
            report(f'{remote.name}: there already, SHA-256 {entry["sha256"]}')
            continue
        archive = remote.name.endswith(ARCHIVES)
        path = root / (f'.{remote.name}' if archive else Path(remote.folder) / remote.name)
        download(remote.url, path, f'download it by other means and unpack it into {root / remote.folder}')
        sha256 = _sha256(path)
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


def unpack(archive: str | os.PathLike, folder: str | os.PathLike, max_bytes: int = MAX_BYTES,
           max_ratio: float = MAX_RATIO, max_files: int = MAX_FILES) -> int:
    """Unpack the plain files of a tar, tar.gz or zip archive, all of them or none.

    Files that are there already are replaced. Permissions, owners and times are not taken over.

    Args:
        archive: The file.
        folder: Where to, made if missing.
        max_bytes: Most bytes unpacked.
        max_ratio: Most bytes unpacked for a byte of the archive.
        max_files: Most files.

    Returns:
        Number of files.

    Raises:
        ValueError: The archive is damaged, larger than allowed when unpacked, or holds a link, a device or a path that
            leads out of the folder.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f'.unpacking-{uuid.uuid4().hex[:8]}'
    allowed = min(max_bytes, int(max_ratio * max(archive.stat().st_size, 1 << 16)))
    names = []
    try:
        for name, content in _members(archive):
            allowed -= _copy(content, _inside(staging, name, archive), allowed, archive)
            names.append(name)
            if len(names) > max_files:
                raise ValueError(f'{archive} holds more than {max_files} files: it is not unpacked.')
        for name in dict.fromkeys(names):
            target = _inside(folder, name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(_inside(staging, name, archive), target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # the disk's, not the archive's
            raise
        raise ValueError(f'{archive} is no whole archive ({type(e).__name__}: {e}): download it again.') from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(set(names))


def _members(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Name and content of each plain file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if info.is_dir():
                    continue
                kind = info.external_attr >> 28  # of a Unix file mode, 0 where the archive has none
                if kind not in (0, 0o10):
                    raise ValueError(_unsafe(archive, info.filename, 'no plain file'))
                with file.open(info) as content:
                    yield info.filename, content
        return
    with tarfile.open(archive, 'r|*') as file:
        for info in file:
            if info.isdir():
                continue
            if not info.isreg():
                raise ValueError(_unsafe(archive, info.name, 'a link or a device'))
            content = file.extractfile(info)
            yield info.name, content


def _inside(folder: Path, name: str, archive: Path) -> Path:
    parts = PurePosixPath(name).parts
    if (not parts or name.startswith('/') or '..' in parts or '\\' in name or '\0' in name
            or (len(name) > 1 and name[1] == ':')):
        raise ValueError(_unsafe(archive, name, f'outside of {folder}'))
    path = folder.joinpath(*parts)
    if not path.parent.resolve().is_relative_to(folder.resolve()):  # a link that was there before
        raise ValueError(_unsafe(archive, name, f'outside of {folder}, through a link'))
    return path


def _unsafe(archive: Path, name: str, what: str) -> str:
    return f'{archive} is not safe to unpack: it would write {name!r}, {what}; nothing of it was unpacked.'


def _copy(content: BinaryIO, path: Path, allowed: int, archive: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(path, 'wb') as file:
        while chunk := content.read(_CHUNK):
            size += len(chunk)
            if size > allowed:
                raise ValueError(f'{archive} becomes larger than the {MAX_RATIO} times its own size, or '
                                 f'{MAX_BYTES >> 30} GiB, that a set of images may have: nothing of it was unpacked.')
            file.write(chunk)
    return size


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(root: Path) -> dict[str, dict]:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f'{root / MANIFEST} is not JSON ({e}): delete it.') from e
    if not (isinstance(manifest, dict) and all(isinstance(entry, dict) for entry in manifest.values())):
        raise ValueError(f'{root / MANIFEST} is no list of downloads: delete it.')
    return manifest


def _note(root: Path, url: str, **entry) -> None:
    manifest = _read_manifest(root)
    manifest[url] = {**manifest.get(url, {}), **entry}
    write_text(root / MANIFEST, json.dumps(manifest, indent=2) + '\n')
