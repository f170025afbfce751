"""Which file of a group of copies is best kept, and why: rules in the order in which they decide. And a shell script
that moves the others to a folder; each line looks at the files again when it runs.

The default is what a careful person does: real files before links, a photograph before its screenshot, colour before
grey, more pixels before fewer, a JPEG file before the PNG file that was made from it, what the camera wrote before what
lost its data, a file in its own place before one that is named a copy, what is older by hours, what is compressed less.
"""
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property

from timm_multigrain.files import write_bytes
from timm_multigrain.images.pixels import open_image, read_image

from .records import Record

KEEP = ('largest', 'oldest', 'newest', 'first-folder')
HOUR = 3600 * 10 ** 9  # ns; in one hour a whole collection may have been copied
LOSSLESS = ('PNG', 'BMP', 'TIFF', 'PPM', 'GIF')
MAKE, MODEL, EXIF_FOLDER, TAKEN = 0x10F, 0x110, 0x8769, 0x9003  # EXIF's tags
COPIES = re.compile(  # in names of files and folders, in some languages
    r'(?<![^\W_])(cop(y|ies)|kopien?|copies?|copias?|c[oó]pias?|duplicates?|duplikate?|dupes?|backups?)(?![^\W_])'
    r'|\s\(\d+\)$', re.IGNORECASE)

# POSIX sh, for Linux, macOS and BSD. The page of copies writes the same script.
HEADER = '''#!/bin/sh
# Moves copies into a folder, by default ./surplus, with the folders they are in: sh THIS-FILE [FOLDER]
# Nothing is deleted. A file is moved only if it, and the file that is kept for it, are what they were when
# this was written; what is not so is named, and the exit status is 1.
to=${1:-surplus}
moved=0 left=0
mkdir -p -- "$to" || exit 2
sum() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -c 1-64
}
skip() {
    printf 'left: %s: %s\\n' "$1" "$2" >&2
    left=$((left + 1))
}
# FILE SHA256 KEPT SHA256
move() {
    if ! [ -f "$1" ]; then skip "$1" 'not there any more'
    elif ! [ -f "$3" ]; then skip "$1" 'the file to keep is not there any more'
    elif [ "$1" -ef "$3" ]; then skip "$1" 'it is the file to keep itself'
    elif [ "$(sum "$1")" != "$2" ]; then skip "$1" 'it has changed'
    elif [ "$(sum "$3")" != "$4" ]; then skip "$1" 'the file to keep has changed'
    elif [ -e "$to$1" ] || [ -L "$to$1" ]; then skip "$1" 'there is such a file in the folder already'
    elif mkdir -p -- "$to${1%/*}" && mv -- "$1" "$to$1"; then moved=$((moved + 1))
    else skip "$1" 'it could not be moved'
    fi
}
'''
FOOTER = '''printf '%s files moved to %s, %s left\\n' "$moved" "$to" "$left"
[ "$left" -eq 0 ]
'''


@dataclass(frozen=True)
class Candidate:
    """A file that may be kept, and what the rules ask about it.

    Attributes:
        record: What the index knows of it.
        folder: Number of the indexed folder that it is in.
        around: Whether it shows another file's picture among other things, as a screenshot does.
        grey, camera: Whether the picture is grey; whether the file says which camera it is from, or when it was taken.
        pixels: Hash of the pixels, where a file of the same size was compressed without loss, or this one was.
        remade: Whether it holds, without loss, the pixels of a file that was compressed with loss.
    """
    record: Record
    folder: int = 0
    around: bool = False
    grey: bool = False
    camera: bool = False
    pixels: bytes = b''
    remade: bool = False

    @cached_property
    def is_link(self) -> bool:
        """Whether the file, or a folder on the way to it, is a link."""
        return os.path.realpath(self.record.path) != self.record.path

    @property
    def named_copy(self) -> bool:
        """Whether its name or one of its folders says that it is a copy."""
        folder, name = os.path.split(self.record.path)
        return any(COPIES.search(part) for part in (*folder.split(os.sep), os.path.splitext(name)[0]))


class Rules:
    """What to keep.

    Args:
        keep: One of `KEEP`, by which the first rules decide.
        prefer: Folders whose files are never surplus.
        first_set: Folder 0 is kept before all others.
    """

    def __init__(self, keep: str = 'largest', prefer: Sequence[str | os.PathLike] = (), first_set: bool = False):
        if keep not in KEEP:
            raise ValueError(f'keep is {keep!r}: give one of {", ".join(KEEP)}.')
        for folder in prefer:
            if not os.path.isdir(folder):
                raise FileNotFoundError(
                    f'{os.fsdecode(folder)!r} is not a folder: give one whose files are to be kept.')
        self.folders = [os.path.realpath(os.fsdecode(folder)).rstrip(os.sep) + os.sep for folder in prefer]
        first = {'largest': None, 'oldest': ('older', lambda c: c.record.mtime_ns),
                 'newest': ('newer', lambda c: -c.record.mtime_ns),
                 'first-folder': ('first folder', lambda c: c.folder)}
        self.rules: list[tuple[str, Callable]] = [
            *([('first set', lambda c: c.folder)] if first_set else ()),
            ('preferred folder', lambda c: not self.is_preferred(c.record)),
            ('not a link', lambda c: c.is_link),
            *([first[keep]] if first[keep] else ()),
            ('the other shows it among other things', lambda c: c.around),
            ('in colour', lambda c: c.grey),
            ('more pixels', lambda c: -c.record.width * c.record.height),
            ('the other was made from it', lambda c: c.remade),
            ('with data of the camera', lambda c: not c.camera),
            ('not named a copy', lambda c: c.named_copy),
            ('older', lambda c: c.record.mtime_ns // HOUR),
            ('compressed less', lambda c: -c.record.bytes),
            ('older', lambda c: c.record.mtime_ns),
            ('shorter name', lambda c: len(os.path.basename(os.fsencode(c.record.path)))),
            ('first by name', lambda c: os.fsencode(c.record.path)),
        ]

    def is_preferred(self, record: Record) -> bool:
        """Whether it is in one of the preferred folders."""
        return record.path.startswith(tuple(self.folders))

    def key(self, candidate: Candidate) -> tuple:
        """Sorts what is best kept first."""
        return tuple(rule(candidate) for _, rule in self.rules)

    def reason(self, kept: Candidate, other: Candidate) -> str:
        """Why the one is kept and not the other."""
        return next(reason for reason, rule in self.rules if rule(kept) != rule(other))


def look_at(candidates: Sequence[Candidate], exif: bool) -> list[Candidate]:
    """The candidates of one group with what their files say; a file that cannot be read says nothing."""
    found, lossless = [], []
    for candidate in candidates:
        try:
            with open_image(candidate.record.path) as image:
                tags, lossy = image.getexif(), image.format not in LOSSLESS
                camera = any(tag in tags for tag in (MAKE, MODEL)) or TAKEN in tags.get_ifd(EXIF_FOLDER)
        except Exception:  # whatever Pillow's readers raise
            camera, lossy = False, None
        found.append(replace(candidate, camera=camera))
        lossless.append(None if lossy is None else not lossy)
    sizes = [(candidate.record.width, candidate.record.height) for candidate in found]
    pixels = {}
    for i, size in enumerate(sizes):
        if any(sizes[j] == size and {lossless[i], lossless[j]} == {True, False} for j in range(len(found))):
            try:
                pixels[i] = hashlib.sha256(read_image(found[i].record.path, exif=exif).tobytes()).digest()
            except ValueError:
                continue
    lossy = {digest for i, digest in pixels.items() if not lossless[i]}
    return [replace(candidate, pixels=pixels.get(i, b''), remade=bool(lossless[i]) and pixels.get(i) in lossy)
            for i, candidate in enumerate(found)]


def write_script(path: str | os.PathLike, surplus: Iterable[tuple]) -> None:
    """Write the script that moves surplus files, each given with the one that is kept for it, see `Copies.surplus`."""
    lines = [f'# written {datetime.now():%Y-%m-%d %H:%M}']
    for pair in surplus:
        names = [shlex.quote(text) for file in pair for text in (file.record.path, file.record.sha256)]
        lines.append(f'move {" ".join(names)}')
    lines = ''.join(f'{line}\n' for line in lines)
    write_bytes(path, os.fsencode(HEADER + lines + FOOTER))  # bytes of names that are not UTF-8 are surrogate escapes
