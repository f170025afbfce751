"""The image files below some folders, for every command: by suffix, regular files, each once.

Links are followed; a folder is entered once however many links lead to it, and a link to a file that was found
without it is left out. Hidden files and folders are skipped, and so are those that programs fill with thumbnails or
deleted files (`NOT_PICTURES`), FIFOs and devices.
"""
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .pixels import is_image

EXTENSIONS = frozenset({
    '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
    '.pnm', '.jp2', '.j2k', '.avif', '.heic', '.heif', '.hif', '.jxl'})  # .jxl: found, and listed as not readable

NOT_PICTURES = frozenset({  # folders by name, in lower case
    b'@eadir', b'#recycle', b'@recycle', b'@recently-snapshot', b'$recycle.bin', b'system volume information',
    b'lost+found', b'__macosx', b'lightroom previews.lrdata'})


class FoundFile(NamedTuple):
    """A file as it was seen.

    Attributes:
        root: Number of the folder it lies below.
        path: Path below that folder, bytes as the system has them.
        size: Bytes.
        mtime_ns: When it was last changed, nanoseconds since 1970.
    """
    root: int
    path: bytes
    size: int
    mtime_ns: int


@dataclass
class Scan:
    """What was found.

    Attributes:
        files: The image files, folder by folder, sorted; those behind links last.
        other: Files of other kinds, only counted.
        unreadable: Folders and files that the system does not let us see, and links that lead nowhere, with the reason.
    """
    files: list[FoundFile] = field(default_factory=list)
    other: int = 0
    unreadable: dict[bytes, str] = field(default_factory=dict)


def scan_folders(
        folders: Iterable[str | bytes | os.PathLike],
        leave_out: Iterable[bytes] = (),
        skip: Callable[[bytes], bool] = lambda folder: False,
        by_content: bool = False,
        everything: bool = False,
) -> Scan:
    """All image files below some folders.

    Args:
        folders: Folders; a file that lies below two of them is found below the first.
        leave_out: Folders that are not entered.
        skip: Called with the path of each folder; True leaves the folder out.
        by_content: A file without a suffix is an image if its first bytes say so.
        everything: Hidden files and folders, and those of `NOT_PICTURES`, too.
    """
    walk = _Walk(skip, by_content, everything, {_identity(os.stat(path)) for path in leave_out if os.path.isdir(path)})
    for root, folder in enumerate(map(os.fsencode, folders)):
        if not os.path.isdir(folder):
            kind = NotADirectoryError if os.path.lexists(folder) else FileNotFoundError
            raise kind(f'{os.fsdecode(folder)!r} is not a folder: give folders with pictures in them.')
        walk.enter(root, folder)
    walk.follow_links()
    return walk.scan


class _Walk:

    def __init__(self, skip: Callable[[bytes], bool], by_content: bool, everything: bool, seen: set):
        self.skip, self.by_content, self.everything, self.seen = skip, by_content, everything, seen
        self.scan, self.links = Scan(), []

    def enter(self, root: int, folder: bytes, below: bytes = b'') -> None:
        pending = [below]  # a list, not the stack: folders may be nested deeper than Python's calls
        while pending:
            path = pending.pop()
            full = os.path.join(folder, path)
            try:
                identity = _identity(os.stat(full))
                if identity in self.seen:
                    continue
                self.seen.add(identity)
                with os.scandir(full) as iterator:
                    entries = sorted(iterator, key=lambda entry: entry.name)
            except OSError as e:
                self.scan.unreadable[full] = e.strerror or str(e)
                continue
            if not self.skip(full):
                pending += reversed([inner for entry in entries if (inner := self._look(root, folder, path, entry))])

    def _look(self, root: int, folder: bytes, path: bytes, entry: os.DirEntry) -> bytes | None:
        """Take a file, note a link; the path of a folder is returned."""
        path = os.path.join(path, entry.name)
        if not self.everything and (entry.name.startswith(b'.') or entry.name.lower() in NOT_PICTURES):
            return None
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # removed since it was listed
            return None
        except OSError as e:
            self.scan.unreadable[os.path.join(folder, path)] = e.strerror or str(e)
            return None
        if stat.S_ISDIR(status.st_mode):
            return path
        if stat.S_ISLNK(status.st_mode):
            self.links.append((root, folder, path))
        else:
            self._take(root, folder, path, status)
        return None

    def follow_links(self) -> None:
        """Last, so that files found without a link keep that path; links to folders before links to files."""
        to_files = []
        for root, folder, path in self.links:  # which grows meanwhile
            full = os.path.join(folder, path)
            try:
                status = os.stat(full)
            except OSError as e:
                self.scan.unreadable[full] = f'a link that leads nowhere ({e.strerror})'
                continue
            if stat.S_ISDIR(status.st_mode):
                self.enter(root, folder, path)
            else:
                to_files.append((root, folder, path, status))
        for root, folder, path, status in to_files:
            if _identity(status) not in self.seen:
                self._take(root, folder, path, status)

    def _take(self, root: int, folder: bytes, path: bytes, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            return
        suffix = os.path.splitext(os.fsdecode(path))[1].lower()
        if suffix in EXTENSIONS or (self.by_content and not suffix and is_image(os.path.join(folder, path))):
            self.seen.add(_identity(status))
            self.scan.files.append(FoundFile(root, path, status.st_size, status.st_mtime_ns))
        else:
            self.scan.other += 1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
