"""Make or update an index: find the images, embed what is new, commit batch after batch."""
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .lock import index_lock
from .manifest import MANIFEST
from .opening import OpenedIndex, check_place, open_or_create
from .plan import Plan, make_plan, sha256_of, vectors_of
from .records import RECORD, record_row, top_classes
from .scan import FoundFile, Scan, scan_folders
from .store import Store, StoreWriter
from .tidy import compact_if_worthwhile, delete_leftovers

__all__ = ['BuildReport', 'build_index']

ATTEMPTS = 3  # for a file that changes while it is read


@dataclass
class BuildReport:
    """What an update has done.

    Attributes:
        images: Images in the index now.
        new: Images that went through the model, changed ones not counted.
        changed: Files whose content has changed.
        moved: Files found at another place; their descriptors were kept.
        copied: New files with the content of another one; its descriptor was taken.
        removed: Images of files that are there no more.
        unchanged: Files that were left alone.
        skipped: Path to reason of the files that could not be read, this time or before.
        new_skipped: How many of them were met for the first time.
        unreadable: Path to reason of folders that could not be looked into; their images were left as they were.
        other: Files that are no images by their names.
        seconds: Time it took.
    """
    images: int = 0
    new: int = 0
    changed: int = 0
    moved: int = 0
    copied: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: dict[str, str] = field(default_factory=dict, repr=False)
    new_skipped: int = 0
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)
    other: int = 0
    seconds: float = 0.
    faiss: dict | None = None

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ('new', 'changed', 'moved', 'copied', 'removed', 'unchanged')}
        parts = [f'{number:,} {name}' for name, number in counts.items() if number]
        if self.skipped:
            parts.append(f'{len(self.skipped):,} unreadable ({self.new_skipped:,} of them met now)')
        if self.other:
            parts.append(f'{self.other:,} other files ignored')
        return f'{self.images:,} images: ' + (', '.join(parts) or 'nothing found') + f'; {self.seconds:.1f} s'


def build_index(
        dirs: Iterable[str | os.PathLike],
        out: str | os.PathLike,
        model: str | torch.nn.Module | None = None,
        protocol=None,
        *,
        model_options: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        fast: bool = False,
        half: bool = False,
        retry: bool = False,
        remove_missing: bool = False,
        kind: str = 'auto',
        progress: bool = True,
) -> BuildReport:
    """Make an index of the images below some folders, or bring one up to date.

    Images that are in it and have not changed are not read again; what was indexed when a run is stopped, however, is
    kept, but for the last batch. Images of folders that are not named now stay as they are.

    Args:
        dirs: Folders, looked through with all that is below them; none for those of the index. Images of indexed
            folders that are not there any more are recognised by their content and move to where they are found.
        out: The index folder; a new one is made.
        model: What `open_model` opens (a saved folder, a checkpoint, a name), or a MultiGrain, which is saved in the
            index. None takes the index's own; a new index needs one.
        protocol: Preprocessing, or a function that makes it from the model; None takes the index's own, or what the
            model is made for.
        model_options: Keyword arguments of `open_model`, such as pool and p.
        batch_size: Images that go through the model, and are committed, together.
        workers: Processes that read images; None for as many as there are cores.
        device: Where the model runs; None for a GPU if there is one.
        dtype: Arithmetic of the model, such as torch.bfloat16.
        fast: Fold batch norms and lay images out channels last: equal up to rounding only.
        half: Keep descriptors of a new index as float16, in half the space.
        retry: Try files again that could not be read before and have not changed.
        remove_missing: Forget a folder's images even if all of them, or the folder itself, are gone.
        kind: Structure for search: 'auto' by the number of images, 'exact', 'hnsw' or 'ivf-pq'.
        progress: Show bars.

    Raises:
        FileNotFoundError, NotADirectoryError: A folder is not there.
        FileExistsError: ``out`` is something else than an index.
        IndexInUse: Another process is writing to it.
        OtherModel: The index was built with another model or preprocessing.
        DamagedIndex, NewerFormat: The index cannot be read.
        NotWritten: No room on the disk; what is committed is whole.
        ValueError: No folders or no model for a new index.
    """
    start, out = time.monotonic(), Path(out)
    folders = [os.path.realpath(os.fsencode(folder)) for folder in dirs]
    check_place(out)
    new = not (out / MANIFEST).exists()
    known = [] if new else Store(out).roots
    for folder in folders:
        if not os.path.isdir(folder) and folder not in known:
            kind_of = NotADirectoryError if os.path.lexists(folder) else FileNotFoundError
            raise kind_of(f'{os.fsdecode(folder)!r} is no folder: give folders with pictures in them.')
    if not folders and new:
        raise ValueError(f'{out} is a new index: give the folders that it is to be made of.')
    out.mkdir(parents=True, exist_ok=True)
    with index_lock(out):
        opened = open_or_create(out, model, protocol, model_options, half)
        writer = StoreWriter(opened.store)
        try:
            delete_leftovers(writer)
            update = _Update(opened, writer, folders, retry, remove_missing)
            update.run(dict(
                batch_size=batch_size, workers=workers, device=device, dtype=dtype, fast=fast, progress=progress))
        finally:
            writer.close()
        compact_if_worthwhile(out)
        from .faiss_index import update_structure
        faiss = update_structure(out, kind, progress)
    return dataclasses.replace(
        update.report, images=len(Store(out).rows), seconds=time.monotonic() - start, faiss=faiss)


class _Update:
    """One run over the folders; ``report`` fills as it goes on."""

    def __init__(
            self, opened: OpenedIndex, writer: StoreWriter, folders: list[bytes], retry: bool, remove_missing: bool):
        self.opened, self.store, self.writer = opened, opened.store, writer
        self.retry, self.remove_missing = retry, remove_missing
        named = folders or self.store.roots
        self.folders = [folder for folder in named if os.path.isdir(folder)]
        self.vanished, self.forget = self._missing_roots(named)
        self.report = BuildReport()

    def _missing_roots(self, named: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Indexed folders that are not there: those whose images stay, unless they are found elsewhere, and others."""
        vanished, forget = [], []
        images = np.bincount(self.store.records['root'], minlength=len(self.store.roots))
        for folder, number in zip(self.store.roots, images.tolist(), strict=True):
            if os.path.isdir(folder):
                continue
            if number and folder in named and not self.remove_missing:
                raise FileNotFoundError(
                    f'{os.fsdecode(folder)!r} with {number:,} images is not there: mount the disk; if it was moved, '
                    'name the folder where it is now; or forget them with --remove-missing.')
            (forget if not number or folder in named else vanished).append(folder)
        return vanished, forget

    def run(self, options: dict) -> None:
        scan = scan_folders(self.folders, leave_out=[os.fsencode(self.store.folder)])
        plan = make_plan(self.store, scan, self.folders, self.retry, self.vanished, self.forget)
        self._refuse_if_all_gone(plan, scan)
        self.report.other, self.report.unchanged = scan.other, plan.unchanged
        self.report.unreadable = {os.fsdecode(path): reason for path, reason in scan.unreadable.items()}
        self.roots = [self._root_number(folder) for folder in self.folders]
        self.replaces, self.skipped_before = plan.replaces, self.store.skipped
        self._take_over(plan)
        files = plan.embed
        for attempt in range(ATTEMPTS):
            files = self._embed(files, options, last=attempt == ATTEMPTS - 1) if files else []
        skipped = Store(self.store.folder).skipped
        self.report.skipped = {os.fsdecode(path): entry['reason'] for path, entry in skipped.items()}

    def _refuse_if_all_gone(self, plan: Plan, scan: Scan) -> None:
        """An empty folder where a thousand images were is more often a disk that is not mounted."""
        for number, folder in enumerate(self.folders):
            if self.remove_missing or not plan.gone or any(file.root == number for file in scan.files):
                continue
            records = self.store.all_records[plan.gone]
            gone = sum(self.store.root(int(record['root'])) == folder for record in records)
            if gone:
                raise FileNotFoundError(
                    f'Not one of the {gone:,} images that were below {os.fsdecode(folder)!r} is there: mount the disk, '
                    'or forget them with --remove-missing.')

    def _root_number(self, folder: bytes) -> int:
        """The folder's number in the index, a new one if need be; relative if folder and index can move together."""
        if folder in self.store.roots:
            return self.store.roots.index(folder)
        index = os.path.realpath(os.fsencode(self.store.folder))
        beside = os.path.dirname(index)
        inside = folder == beside or folder.startswith(beside.rstrip(b'/') + b'/')
        self.writer.roots.append(os.fsdecode(os.path.relpath(folder, index) if inside else folder))
        return len(self.writer.roots) - 1

    def _take_over(self, plan: Plan) -> None:
        """Everything that needs no model, in one commit."""
        for known, keep in ((plan.renew, True), (plan.copy, False)):
            if known:
                numbers = [number for _, number, _ in known]
                rows = self.store.all_records[numbers].copy()
                for row, (file, _, _) in zip(rows, known, strict=True):
                    row['root'], row['mtime_ns'] = self.roots[file.root], file.mtime_ns
                vectors = None if keep else vectors_of(self.store, numbers)
                self.writer.add([file.path for file, _, _ in known], rows, vectors)
        self.writer.remove([number for _, number, _ in plan.renew] + plan.gone)
        for path in plan.recovered:
            self.writer.skip(path, '')
        self.writer.commit()
        self.report.moved, self.report.copied, self.report.removed = plan.moved, len(plan.copy), len(plan.gone)
        self.report.unchanged += len(plan.renew) - plan.moved

    def _path(self, file: FoundFile) -> bytes:
        return os.path.join(self.folders[file.root], file.path)

    def _embed(self, files: list[FoundFile], options: dict, last: bool) -> list[FoundFile]:
        """Put files through the model; those that changed meanwhile come back, as they are now."""
        from timm_multigrain.embed.stream import embed_images
        from timm_multigrain.images.sources import ImageFiles

        model, again = self.opened.get_model(), []
        source = ImageFiles([os.fsdecode(self._path(file)) for file in files])
        with ThreadPoolExecutor(4) as pool:
            for batch in embed_images(
                    model, source, self.opened.protocol, logits=model.num_classes > 0, errors='skip',
                    on_error=lambda i, message: self._unreadable(files[i], message), **options):
                found = [files[i] for i in batch.indices]
                states = list(pool.map(self._state, found))
                same = np.array([(s[1], s[2]) == (f.size, f.mtime_ns) for f, s in zip(found, states, strict=True)])
                self._add(batch, found, states, np.flatnonzero(same))
                for i in np.flatnonzero(~same):
                    again += self._changed_while_read(found[i], states[i], last)
        self.writer.commit()
        return again

    def _state(self, file: FoundFile) -> tuple[bytes | None, int, int]:
        """Hash, size and time, read after the picture was: what is equal to the scan's was equal in between."""
        path = self._path(file)
        digest = sha256_of(path)
        try:
            status = os.stat(path)
        except OSError:
            return None, -1, -1
        return digest, status.st_size, status.st_mtime_ns

    def _add(self, batch, found: list[FoundFile], states: list, keep: np.ndarray) -> None:
        if not len(keep):
            return
        classes, probabilities = top_classes(batch.logits) if batch.logits is not None else ([()] * len(found),) * 2
        rows = np.empty(len(keep), dtype=RECORD)
        for row, i in enumerate(keep):
            file, path = found[i], self._path(found[i])
            rows[row] = record_row(
                root=self.roots[file.root], size=batch.sizes[i], bytes=file.size, mtime_ns=file.mtime_ns,
                sha256=states[i][0], classes=classes[i], probabilities=probabilities[i])
            self._replace(path)
            if path in self.skipped_before:
                self.writer.skip(path, '')
        self.writer.add([found[i].path for i in keep], rows, batch.vectors.numpy()[keep])
        self.writer.commit()

    def _replace(self, path: bytes) -> None:
        old = self.replaces.pop(path, None)
        if old is None:
            self.report.new += 1
        else:
            self.writer.remove([old])
            self.report.changed += 1

    def _unreadable(self, file: FoundFile, message: str) -> None:
        """List it, unless it has been removed since the scan. Committed with the next batch."""
        path = self._path(file)
        old = self.replaces.pop(path, None)
        if old is not None:
            self.writer.remove([old])
            self.report.removed += 1
        if os.path.lexists(path):
            from timm_multigrain.images.sources import printable
            reason = message.removeprefix(f'{printable(path)}: ')
            self.writer.skip(path, reason, file.size, file.mtime_ns)
            self.report.new_skipped += 1

    def _changed_while_read(self, file: FoundFile, state: tuple, last: bool) -> list[FoundFile]:
        digest, size, mtime_ns = state
        if digest is None:
            self._unreadable(file, 'it can no longer be read')
        elif last:
            self._unreadable(file._replace(mtime_ns=-1), 'it was changing while it was read')  # -1: tried every time
        else:
            return [file._replace(size=size, mtime_ns=mtime_ns)]
        return []
