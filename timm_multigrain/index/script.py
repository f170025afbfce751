"""A shell script that moves surplus files to a folder; each line looks at the files again when it runs."""
import os
import shlex
from collections.abc import Sequence
from datetime import datetime

from timm_multigrain.files import write_bytes

from .dedup import CopyFile

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


def write_script(path: str | os.PathLike, surplus: Sequence[tuple[CopyFile, CopyFile]]) -> None:
    """Write the script.

    Args:
        path: File to write.
        surplus: Files to move, each with the one that is kept for it.
    """
    lines = [move_line(file, kept) for file, kept in surplus]
    text = HEADER + f'# written {datetime.now():%Y-%m-%d %H:%M}\n' + ''.join(lines) + FOOTER
    write_bytes(path, os.fsencode(text))


def move_line(file: CopyFile, kept: CopyFile) -> str:
    """The line that moves one file; bytes of names that are not UTF-8 are surrogate escapes."""
    quoted = [shlex.quote(part) for each in (file, kept) for part in (each.record.path, each.record.sha256)]
    return f'move {" ".join(quoted)}\n'
