"""Image files below some folders, with what tells a file that has changed from one that has not.

Links are followed, a folder is entered once however many links lead to it, and a link to a file that is there anyway is
left out. Hidden files and folders are skipped, and so are folders that hold an index.
"""
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from timm_multigrain.images.sources import EXTENSIONS

from .manifest import is_index

__all__ = ['FoundFile', 'Scan', 'is_image_name', 'scan_folders']

_SIGNATURES = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF87a', b'GIF89a', b'II*\0', b'MM\0*', b'BM')
_BRANDS = (b'heic', b'heix', b'mif1', b'msf1', b'avif')


class FoundFile(NamedTuple):
    """A file as the scan has seen it.

    Attributes:
        root: Number of the folder it lies below.
        path: Path below that folder, bytes as the system has them.
        size: Bytes.
        mtime_ns: When it was last changed, nanoseconds since 1970.
        inode: What tells a file from another, whatever it is called.
    """
    root: int
    path: bytes
    size: int
    mtime_ns: int
    inode: tuple[int, int]


@dataclass
class Scan:
    """Attributes:
        files: The image files, folder by folder, sorted.
        other: Files of other kinds, only counted.
        unreadable: Folders and files that the system does not let us see, with the reason.
    """
    files: list[FoundFile] = field(default_factory=list)
    other: int = 0
    unreadable: dict[bytes, str] = field(default_factory=dict)


def scan_folders(folders: Iterable[bytes], leave_out: Iterable[bytes] = ()) -> Scan:
    """All image files below some folders.

    Args:
        folders: Absolute paths; a file that lies below two of them is found below the first.
        leave_out: Folders that are not entered.

    Raises:
        FileNotFoundError, NotADirectoryError: One of the folders is none.
    """
    scan, seen, links = Scan(), {_identity(path) for path in leave_out if os.path.isdir(path)}, []
    for root, folder in enumerate(folders):
        if not os.path.isdir(folder):
            kind = NotADirectoryError if os.path.lexists(folder) else FileNotFoundError
            raise kind(f'{os.fsdecode(folder)!r} is no folder: give folders with pictures in them.')
        _walk(scan, root, folder, seen, links)
    inodes = {file.inode for file in scan.files} if links else set()
    while links:  # after all else, so that what is there without a link is found there
        root, folder, path = links.pop(0)
        full = os.path.join(folder, path)
        try:
            if os.path.isdir(full):
                known = len(scan.files)
                _walk(scan, root, folder, seen, links, path)
                inodes.update(file.inode for file in scan.files[known:])
            elif (status := os.stat(full)) and (status.st_dev, status.st_ino) not in inodes:
                inodes.add((status.st_dev, status.st_ino))
                _file(scan, root, folder, path, status)
        except OSError as e:
            scan.unreadable[full] = f'a link that leads nowhere ({e.strerror})'
    return scan


def is_image_name(name: bytes) -> bool | None:
    """Whether a file's name says that it is a photograph; None if it has no extension to tell by."""
    extension = os.path.splitext(os.fsdecode(name))[1].lower()
    if not extension:
        return None
    return extension in EXTENSIONS


def _walk(scan, root: int, folder: bytes, seen: set, links: list, below: bytes = b'') -> None:
    """Depth first with a list, not the stack: folders may be nested deeper than Python's calls."""
    pending = [below]
    while pending:
        path = pending.pop()
        full = os.path.join(folder, path)
        try:
            identity = _identity(full)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(full) as iterator:
                entries = sorted(iterator, key=lambda entry: entry.name)
        except OSError as e:
            scan.unreadable[full] = e.strerror or str(e)
            continue
        if is_index(full):
            continue
        inside = []
        for entry in entries:
            name = os.path.join(path, entry.name)
            if entry.name.startswith(b'.'):
                continue
            if entry.is_symlink():
                links.append((root, folder, name))
            elif entry.is_dir():
                inside.append(name)
            else:
                _entry(scan, root, folder, name, entry)
        pending += reversed(inside)


def _entry(scan, root: int, folder: bytes, name: bytes, entry: os.DirEntry) -> None:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError as e:  # removed since it was listed, or no right to see it
        if not isinstance(e, FileNotFoundError):
            scan.unreadable[os.path.join(folder, name)] = e.strerror or str(e)
        return
    _file(scan, root, folder, name, status)


def _file(scan, root: int, folder: bytes, path: bytes, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        return
    image = is_image_name(os.path.basename(path))
    if image is None:
        image = _looks_like_image(os.path.join(folder, path))
    if image:
        inode = status.st_dev, status.st_ino
        scan.files.append(FoundFile(root, path, status.st_size, status.st_mtime_ns, inode))
    else:
        scan.other += 1


def _looks_like_image(path: bytes) -> bool:
    """By the first bytes, for files without an extension, such as those of caches and of some cameras."""
    try:
        with open(path, 'rb') as file:
            start = file.read(16)
    except OSError:
        return False
    return start.startswith(_SIGNATURES) or (start[:4] == b'RIFF' and start[8:12] == b'WEBP') or (
        start[4:8] == b'ftyp' and start[8:12] in _BRANDS)


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
