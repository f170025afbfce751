"""What an update of an index has to do: the folders as they are now against the index as it is."""
import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .scan import FoundFile, Scan
from .store import Store

__all__ = ['Plan', 'make_plan', 'sha256_of']


@dataclass
class Plan:
    """Work of an update. Numbers of records are those of the record file.

    Attributes:
        embed: Files to go through the model, new or changed.
        replaces: For a file of `embed` that has changed, by its absolute path: the record that is to go.
        renew: (file, record, hash) of files with a known content: its vector is taken over, the record goes.
        copy: (file, record, hash) of new files with the content of a file that stays.
        gone: Records of files that are there no more.
        unchanged: Number of files that are as they were.
        moved: How many of `renew` are at another place; the others are as they were but for the time.
        still_skipped: Number of files that could not be read before and have not changed.
        recovered: Files that were listed as unreadable and are not there any more.
    """
    embed: list[FoundFile] = field(default_factory=list)
    replaces: dict[bytes, int] = field(default_factory=dict)
    renew: list[tuple[FoundFile, int, bytes]] = field(default_factory=list)
    copy: list[tuple[FoundFile, int, bytes]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    unchanged: int = 0
    moved: int = 0
    still_skipped: int = 0
    recovered: list[bytes] = field(default_factory=list)


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
        scan: What is there.
        folders: The folders that were scanned; images of other folders are left alone.
        retry: Try files again that could not be read and have not changed.
        vanished: Indexed folders that are not there: their images may be found in `folders`, and stay if they are not.
        forget: Indexed folders that are not there, whose images go if they are not found.
    """
    plan, suspects = Plan(), []
    known = dict(zip(store.absolute_paths(), store.rows.tolist(), strict=True))
    sizes, times = store.all_records['bytes'], store.all_records['mtime_ns']
    present = set()
    for file in scan.files:
        path = os.path.join(folders[file.root], file.path)
        present.add(path)
        number, skipped = known.pop(path, None), store.skipped.get(path)
        if number is not None:
            if (sizes[number], times[number]) == (file.size, file.mtime_ns):
                plan.unchanged += 1
            elif sizes[number] == file.size and (digest := sha256_of(path)) == _hash(store, number):
                plan.renew.append((file, number, digest))
            else:
                plan.embed.append(file)
                plan.replaces[path] = number
        elif skipped and not retry and (skipped['size'], skipped['mtime_ns']) == (file.size, file.mtime_ns):
            plan.still_skipped += 1
        else:
            suspects.append(file)
    looked_at = [*folders, *forget]
    gone = {number for path, number in known.items() if _is_gone(path, looked_at, scan.unreadable)}
    absent = {path: number for path, number in known.items()
              if number in gone or any(_below(path, folder) for folder in vanished)}
    plan.recovered = [path for path in store.skipped
                      if path not in present and _is_gone(path, looked_at, scan.unreadable)]
    _find_known_contents(plan, store, suspects, absent, folders)
    plan.gone = sorted(gone & set(absent.values()))
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


def _hash(store: Store, number: int) -> bytes:
    return store.all_records['sha256'][number].tobytes()


def _is_gone(path: bytes, folders: Sequence[bytes], unreadable) -> bool:
    """Whether a path that the scan has not met would have been met if it were there."""
    return any(_below(path, folder) for folder in folders) and not any(_below(path, other) for other in unreadable)


def _below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b'/') + b'/')


def _find_known_contents(plan: Plan, store: Store, suspects: list, absent: dict[bytes, int], folders) -> None:
    """Deal out new files: moved, a copy of one that is there, or to embed. Only those of a known size are read."""
    sizes = set(store.records['bytes'].tolist())
    by_hash = defaultdict(list)
    if any(file.size in sizes for file in suspects):
        missing = set(absent.values())
        for number, digest in zip(store.rows.tolist(), store.records['sha256'], strict=True):
            # the end of the list is taken first: a moved file's record before one of a file that is still there
            by_hash[digest.tobytes()].insert(len(by_hash[digest.tobytes()]) if number in missing else 0, number)
    path_of = {number: path for path, number in absent.items()}
    for file in suspects:
        digest = sha256_of(os.path.join(folders[file.root], file.path)) if file.size in sizes else None
        numbers = by_hash.get(digest)
        if not numbers:
            plan.embed.append(file)
        elif numbers[-1] in path_of:
            number = numbers.pop()
            del absent[path_of.pop(number)]
            plan.renew.append((file, number, digest))
            plan.moved += 1
        else:
            plan.copy.append((file, numbers[-1], digest))


def vectors_of(store: Store, numbers: Sequence[int]) -> np.ndarray:
    """Descriptors of some records, (n, D)."""
    return store.vectors_at(store.all_records['vector'][np.asarray(numbers, dtype=np.int64)].astype(np.int64))
