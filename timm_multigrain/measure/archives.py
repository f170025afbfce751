"""Archives of published image sets: downloaded, checked and unpacked so that nothing lands outside of their folder.

What a download was is kept in `downloads.json` beside it: address, length and SHA-256. The first download is trusted,
and a later one of the same address has to be equal.
"""
import json
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from timm_multigrain.files import check_json, file_sha256, printable, read_json, write_text
from timm_multigrain.models.download import download

MANIFEST = 'downloads.json'
ARCHIVES = ('.tar', '.tar.gz', '.tgz', '.zip')


class RemoteFile(NamedTuple):
    """Address of a file, and where it goes, relative to the set's folder; .tar, .tar.gz, .tgz and .zip are unpacked."""
    url: str
    folder: str = '.'

    @property
    def name(self) -> str:
        return self.url.rstrip('/').rpartition('/')[2]


def fetch_files(remotes: Iterable[RemoteFile], root: str | os.PathLike) -> None:
    """Download what is missing, check it and unpack it; called again, it goes on with the first file missing."""
    root = Path(root)
    manifest = read_manifest(root)
    for remote in remotes:
        entry = manifest.setdefault(remote.url, {})
        if entry.get('done'):
            print(f'{remote.name}: there already, SHA-256 {printable(str(entry.get("sha256")))}')
            continue
        archive = remote.name.endswith(ARCHIVES)
        if archive and not remote.name.endswith('.zip'):
            _check_tarfile()  # before hours of downloading
        path = root / (f'.{remote.name}' if archive else Path(remote.folder) / remote.name)
        download(remote.url, path, f'download it by other means and unpack it into {root / remote.folder}')
        sha256, size = file_sha256(path), path.stat().st_size
        if sha256 != entry.get('sha256', sha256):
            path.unlink()
            raise ValueError(f'{remote.url} has SHA-256 {sha256}, not the {entry["sha256"]} that {root / MANIFEST} has '
                             'from its first download: the file was changed or damaged on its way, and was deleted.')
        entry.update(bytes=size, sha256=sha256, done=not archive)
        write_text(root / MANIFEST, json.dumps(manifest, indent=2) + '\n')
        if archive:
            unpack(path, root / remote.folder)
            path.unlink()
            entry['done'] = True
            write_text(root / MANIFEST, json.dumps(manifest, indent=2) + '\n')
        print(f'{remote.name}: {size} bytes, SHA-256 {sha256}')


def read_manifest(root: Path) -> dict[str, dict]:
    """What was downloaded into a folder, by address; ValueError for a damaged file."""
    path = root / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    check_json(manifest, {str: {str: (str, int, bool)}}, printable(path))
    return manifest


def unpack(archive: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Unpack a tar, tar.gz or zip archive of files and folders, all of it or nothing.

    Raises:
        ValueError: The archive is damaged, or a tar that holds a device or a path that leads out of the folder (a zip's
            are left out, or stay in it); or the disk does not take it.
        RuntimeError: A Python that cannot unpack a tar of others safely.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(archive, 'rb') as file:
        zipped = file.read(4) == b'PK\3\4'  # zipfile.is_zipfile says yes to a tar that ends with a zip, too
    if not zipped:
        _check_tarfile()
    with tempfile.TemporaryDirectory(prefix='.unpacking-', dir=folder) as work:
        try:
            if zipped:
                shutil.unpack_archive(archive, work, 'zip')
            else:
                shutil.unpack_archive(archive, work, 'tar', filter='data')
        except Exception as e:  # a damaged archive raises whatever its headers lead to
            reason = printable(str(e)[:300]) or type(e).__name__
            raise ValueError(f'{printable(archive)} was not unpacked: {reason}.') from e
        for path in [path for path in Path(work).rglob('*') if path.is_file()]:
            target = folder / path.relative_to(work)
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f'{printable(target)} is outside of {printable(folder)}, through a link there.')
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _check_tarfile() -> None:
    if not hasattr(tarfile, 'data_filter'):
        raise RuntimeError(
            f'Python {platform.python_version()} cannot unpack the tar archives of others safely: take 3.10.12, '
            '3.11.4, 3.12 or a later one of these, or download and unpack them by hand.')
