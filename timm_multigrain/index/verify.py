"""A look at the files of copies right before they are listed, so that nobody deletes by what an index remembers.

An index is as old as its last update. A group is listed only if every file of it is there now with the size and time
that were indexed, identical files with the same SHA-256, and no file is surplus to itself under another name.
"""
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from timm_multigrain.files import open_regular

from .plan import sha256_of
from .records import Record

if TYPE_CHECKING:
    from .dedup import CopyGroup

__all__ = ['verify_groups']


def verify_groups(groups: Sequence['CopyGroup'], progress: bool = True) -> tuple[tuple['CopyGroup', ...], list[str]]:
    """Groups whose files are all what was indexed, and the paths of the files that are not.

    Args:
        groups: Groups of an index.
        progress: Show a bar if stderr is a terminal.
    """
    records = {file.record.path: file.record for group in groups for file in group.files}
    identical = {file.record.path for group in groups if group.kind == 'exact' for file in group.files}
    with ThreadPoolExecutor(4) as pool:
        looks = pool.map(lambda record: _identity(record, record.path in identical), records.values())
        seen = dict(zip(records, tqdm(
            looks, 'Checking files', len(records), leave=False, disable=None if progress else True), strict=True))
    changed = [path for path, identity in seen.items() if identity is None]
    groups = [group for group in groups if all(seen[file.record.path] for file in group.files)]
    surplus = {path for group in groups for path in group.others}
    kept = {seen[group.keep] for group in groups if group.keep not in surplus}
    groups = (_without_other_names(group, seen, kept) for group in groups)
    return tuple(group for group in groups if len(group.files) > 1), changed


def _identity(record: Record, whole: bool) -> tuple[int, int] | None:
    """What tells a file from any other, whatever it is called; None if it is not what was indexed.

    Args:
        record: What was indexed.
        whole: Compare the SHA-256, too.
    """
    try:
        with open_regular(record.path, follow_links=True) as file:
            status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    if (status.st_size, status.st_mtime_ns) != (record.bytes, record.mtime_ns):
        return None
    if whole and sha256_of(record.path) != bytes.fromhex(record.sha256):
        return None
    return status.st_dev, status.st_ino


def _without_other_names(group: 'CopyGroup', seen: dict, kept: set) -> 'CopyGroup':
    """The group without names of a file that is in it already, or that is to be kept by another group."""
    files, names = [group.files[0]], {seen[group.keep]} | kept
    for file in group.files[1:]:
        identity = seen[file.record.path]
        if identity not in names:
            names.add(identity)
            files.append(file)
    return replace(group, files=tuple(files))
