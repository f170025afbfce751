"""What an update of an index has to do: the folders as they are now against the index as it is."""
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from timm_multigrain.images.walk import FoundFile, Scan

from .store import Store

__all__ = ['Plan', 'make_plan', 'sha256_of']


@dataclass
class Plan:
    """Work of an update. Rows are those of the store.

    Attributes:
        embed: Files to go through the model, new or changed.
        replaces: For a file of `embed` that has changed, by its absolute path: the row that is to go.
        renew: (file, row) of files with a known content that is nowhere else: they take over what the row has.
        copy: (file, row) of new files with the content of a file that stays.
        gone: Rows of deleted files.
        unchanged: Number of files that are as they were.
        moved: How many of `renew` are at another place; the others are as they were but for the time.
        recovered: (root, path) of files that were listed as unreadable and are deleted.
    """
    embed: list[FoundFile] = field(default_factory=list)
    replaces: dict[bytes, int] = field(default_factory=dict)
    renew: list[tuple[FoundFile, int]] = field(default_factory=list)
    copy: list[tuple[FoundFile, int]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    unchanged: int = 0
    moved: int = 0
    recovered: list[tuple[int, bytes]] = field(default_factory=list)


def make_plan(
        store: Store,
        scan: Scan,
        folders: Sequence[bytes],
        retry: bool = False,
        vanished: Sequence[bytes] = (),
        forget: Sequence[bytes] = (),
) -> Plan:
    """Compare a scan with an index.

    Files of the same size and time as when they were indexed are taken to be unchanged. Others are read: what has a
    known content keeps its descriptor.

    Args:
        store: The index.
        scan: The files that exist.
        folders: The folders that were scanned; images of other folders are left alone.
        retry: Try files again that could not be read and have not changed.
        vanished: Indexed folders that were not found: their images may be found in `folders`, and stay otherwise.
        forget: Indexed folders that were not found, whose images go if they are not found elsewhere.
    """
    plan, suspects, present = Plan(), [], set()
    known = {path: row for row, path in enumerate(store.paths())}
    skipped = {os.path.join(store.roots[root], name): entry for (root, name), entry in store.skipped.items()}
    sizes, times = store.records['bytes'], store.records['mtime_ns']
    for file in scan.files:
        path = os.path.join(folders[file.root], file.path)
        present.add(path)
        row = known.pop(path, None)
        if row is None:
            if retry or path not in skipped or skipped[path][1:] != (file.size, file.mtime_ns):
                suspects.append(file)
        elif (sizes[row], times[row]) == (file.size, file.mtime_ns):
            plan.unchanged += 1
        elif sizes[row] == file.size and sha256_of(path) == store.records['sha256'][row].tobytes():
            plan.renew.append((file, row))
        else:
            plan.embed.append(file)
            plan.replaces[path] = row
    looked_at = [*folders, *forget]
    gone = {row for path, row in known.items() if _is_gone(path, looked_at, scan.unreadable)}
    absent = {row for path, row in known.items() if row in gone or any(_below(path, folder) for folder in vanished)}
    for root, name in store.skipped:
        path = os.path.join(store.roots[root], name)
        if path not in present and _is_gone(path, looked_at, scan.unreadable):
            plan.recovered.append((root, name))
    _find_known_contents(plan, store, suspects, absent, folders)
    plan.gone = sorted(gone & absent)
    return plan


def sha256_of(path: bytes | str) -> bytes | None:
    """Hash of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.digest()


def _is_gone(path: bytes, folders: Sequence[bytes], unreadable: Iterable[bytes]) -> bool:
    """Whether a path that the scan has not met would have been met if it existed."""
    return any(_below(path, folder) for folder in folders) and not any(_below(path, other) for other in unreadable)


def _below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b'/') + b'/')


def _find_known_contents(plan: Plan, store: Store, suspects: list, absent: set[int], folders) -> None:
    """Sort new files: moved, a copy of an existing one, or to embed. Only those of a known size are read."""
    sizes, by_hash = set(store.records['bytes'].tolist()), defaultdict(list)
    if any(file.size in sizes for file in suspects):
        # the last of a list is taken first: the row of an absent file before one of an existing file
        for row in sorted(range(len(store.ids)), key=lambda row: (row in absent, row)):
            by_hash[store.records['sha256'][row].tobytes()].append(row)
    for file in suspects:
        digest = sha256_of(os.path.join(folders[file.root], file.path)) if file.size in sizes else None
        rows = by_hash.get(digest)
        if not rows:
            plan.embed.append(file)
        elif rows[-1] in absent:
            row = rows.pop()
            absent.remove(row)
            plan.renew.append((file, row))
            plan.moved += 1
        else:
            plan.copy.append((file, rows[-1]))
