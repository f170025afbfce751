"""Make or update an index: find the images, embed what is new, commit batch after batch."""
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from timm_multigrain.embed.embedder import embed_images
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import printable
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.images.walk import FoundFile, Scan, scan_folders
from timm_multigrain.models.open import open_model
from timm_multigrain.models.save import save_pretrained
from timm_multigrain.version import __version__

from .ann import update_structure
from .errors import OtherModel
from .model import SAVED, describe_model, open_described, open_named, protocol_from_json
from .plan import Plan, make_plan, sha256_of
from .records import RECORD, record_row, top_classes
from .store import FILE, Store, Writer, index_lock, is_index

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
        removed: Images of deleted files.
        unchanged: Files that were left alone.
        skipped: Path to reason of the files that could not be read, this time or before.
        new_skipped: How many of them were met for the first time.
        unreadable: Path to reason of folders that could not be opened; their images were left as they were.
        other: Files that are not images by their names.
        seconds: Time it took.
        faiss: The structure for search and the recall that it has, None without one.
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
        protocol: Protocol | Callable[[torch.nn.Module], Protocol] | None = None,
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
        dirs: Folders, searched with their subfolders; none for those of the index. Images of indexed folders that
            are gone are recognised by their content and move to where they are found.
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
        FileNotFoundError, NotADirectoryError: A folder was not found.
        FileExistsError: ``out`` is something else than an index.
        IndexInUse: Another process is writing to it.
        OtherModel: The index was built with another model or preprocessing.
        DamagedIndex, NewerFormat: The index cannot be read.
        NotWritten: No room on the disk; what is committed is whole.
        ValueError: No folders or no model for a new index.
    """
    start, out = time.monotonic(), Path(out)
    folders = list(dict.fromkeys(os.path.realpath(os.fsencode(folder)) for folder in dirs))
    new = _check_place(out)
    known = [] if new else Store(out).roots
    for folder in folders:
        if not os.path.isdir(folder) and folder not in known:
            kind_of = NotADirectoryError if os.path.lexists(folder) else FileNotFoundError
            raise kind_of(f'{os.fsdecode(folder)!r} is not a folder: give folders with pictures in them.')
    if new and (not folders or model is None):
        raise ValueError(f'{out} is a new index: give the folders that it is to be made of, and name the model.')
    out.mkdir(parents=True, exist_ok=True)
    with index_lock(out):
        if new and _check_place(out):  # another process may have made it meanwhile
            model, protocol = _create(out, model, protocol, model_options, half), None
            model_options = None
        store = Store(out)
        model, protocol = _check_model(store, model, protocol, model_options)
        writer = Writer(store)
        try:
            update = _Update(store, writer, folders, model, protocol, retry, remove_missing)
            update.run(dict(
                batch_size=batch_size, workers=workers, device=device, dtype=dtype, fast=fast, progress=progress))
            writer.compact_if_worthwhile()
            update.report.faiss = update_structure(writer, kind, progress)
        finally:
            writer.close()
    update.report.seconds = time.monotonic() - start
    return update.report


def _check_place(out: Path) -> bool:
    """Whether an index can be made there: what a killed process left of a new one, an empty folder or nothing.

    Raises:
        FileExistsError: It is something else than that or an index.
    """
    if not os.path.lexists(out):
        return True
    if not out.is_dir():
        raise FileExistsError(f'{out} is a file: name a folder for the index.')
    if os.path.lexists(out / FILE):
        return False
    if (out / 'index.json').exists():
        Store(out)  # what there is to say of an old one
    other = [path.name for path in out.iterdir()
             if path.is_symlink() or not (path.name in ('lock', SAVED) or path.name.startswith('.'))]
    if other:
        raise FileExistsError(f'{out} holds other things ({min(other)!r}): name a new folder for the index.')
    return True


def _create(out: Path, model, protocol, model_options, half: bool) -> torch.nn.Module:
    """Make an index without images; the model that it is of."""
    source = None
    if isinstance(model, str):
        source = os.path.abspath(model) if os.path.exists(model) else None
        model = open_model(model, **(model_options or {}))
    if source is None:  # also of a name: an index is searched without asking the network for what it says
        save_pretrained(model, out / SAVED)
    protocol = Protocol.for_model(model) if protocol is None else protocol(model) if callable(protocol) else protocol
    Writer.create(out, {
        'model': describe_model(model, source, model_options),
        'protocol': protocol.to_dict(), 'dim': model.embed_dim, 'dtype': 'float16' if half else 'float32',
        'versions': {'timm_multigrain': __version__, 'timm': timm.__version__, 'torch': torch.__version__,
                     'python': sys.version.split()[0]}})
    return model


def _check_model(store: Store, model, protocol, model_options) -> tuple[torch.nn.Module | None, Protocol]:
    """The model, where it is open already, and the protocol of an index; arguments as of `build_index`.

    Raises:
        OtherModel: Others were asked for.
    """
    described, out = store.config['model'], store.folder
    if model is None and model_options:
        raise ValueError(f'{", ".join(model_options)} without a model: name the model, or leave it to the index.')
    if model is not None:
        model = open_named(described, model, out, model_options)
    own = protocol_from_json(store.config['protocol'])
    if callable(protocol):
        model = open_described(described, out) if model is None else model
        protocol = protocol(model)
    if protocol not in (None, own):
        raise OtherModel(f'{out} was built with {own}, not {protocol}: leave those options out, or make another index.')
    return model, own


class _Update:
    """One run over the folders; ``report`` fills as it goes on."""

    def __init__(self, store: Store, writer: Writer, folders: list[bytes], model: torch.nn.Module | None,
                 protocol: Protocol, retry: bool, remove_missing: bool):
        self.store, self.writer, self.model, self.protocol = store, writer, model, protocol
        self.retry, self.remove_missing = retry, remove_missing
        named = folders or self.store.roots
        self.folders = [folder for folder in named if os.path.isdir(folder)]
        self.vanished, self.forget = self._missing_roots(named)
        self.report = BuildReport()

    def _missing_roots(self, named: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Indexed folders that were not found: those whose images stay, unless they are found elsewhere, and others."""
        vanished, forget = [], []
        images = np.bincount(self.store.records['root'], minlength=len(self.store.roots))
        for folder, number in zip(self.store.roots, images.tolist(), strict=True):
            if os.path.isdir(folder):
                continue
            if number and folder in named and not self.remove_missing:
                raise FileNotFoundError(
                    f'{os.fsdecode(folder)!r} with {number:,} images was not found: mount the disk; if it was moved, '
                    'name the folder where it is now; or forget them with --remove-missing.')
            (forget if not number or folder in named else vanished).append(folder)
        return vanished, forget

    def run(self, options: dict) -> None:
        scan = scan_folders(self.folders, leave_out=[os.fsencode(self.store.folder)], skip=is_index, by_content=True)
        plan = make_plan(self.store, scan, self.folders, self.retry, self.vanished, self.forget)
        self._refuse_if_all_gone(plan, scan)
        self.report.other, self.report.unchanged = scan.other, plan.unchanged
        self.report.unreadable = {os.fsdecode(path): reason for path, reason in scan.unreadable.items()}
        self.roots = [self._root_number(folder) for folder in self.folders]
        self.replaces = plan.replaces
        self.skipped = {os.path.join(self.store.roots[root], name): (root, name) for root, name in self.store.skipped}
        self._take_over(plan)
        files = plan.embed
        for attempt in range(ATTEMPTS):
            files = self._embed(files, options, last=attempt == ATTEMPTS - 1) if files else []
        after = Store(self.store.folder)
        self.report.images = len(after.ids)
        self.report.skipped = {os.fsdecode(os.path.join(after.roots[root], name)): reason
                               for (root, name), (reason, *_) in after.skipped.items()}

    def _refuse_if_all_gone(self, plan: Plan, scan: Scan) -> None:
        """An empty folder where a thousand images were is more often a disk that is not mounted."""
        for number, folder in enumerate(self.folders):
            if self.remove_missing or not plan.gone or any(file.root == number for file in scan.files):
                continue
            gone = sum(self.store.roots[root] == folder for root in self.store.records['root'][plan.gone])
            if gone:
                raise FileNotFoundError(
                    f'None of the {gone:,} indexed images below {os.fsdecode(folder)!r} was found: mount the disk, '
                    'or forget them with --remove-missing.')

    def _root_number(self, folder: bytes) -> int:
        """The folder's number in the index, a new one if need be; relative if folder and index can move together."""
        if folder in self.store.roots:
            return self.store.roots.index(folder)
        index = os.path.realpath(os.fsencode(self.store.folder))
        beside = os.path.dirname(index)
        inside = folder == beside or folder.startswith(beside.rstrip(b'/') + b'/')
        return self.writer.add_root(os.path.relpath(folder, index) if inside else folder)

    def _take_over(self, plan: Plan) -> None:
        """Everything that needs no model, in one commit."""
        for found in (plan.renew, plan.copy):
            names, rows = [file.path for file, _ in found], [row for _, row in found]
            records = self.store.records[rows]
            records['root'] = [self.roots[file.root] for file, _ in found]
            records['mtime_ns'] = [file.mtime_ns for file, _ in found]
            if found is plan.renew:
                self.writer.replace(self.store.ids[rows].tolist(), names, records)
            else:
                self.writer.add(names, records, self.store.file[self.store.vector_rows[rows]])
        self.writer.remove(self.store.ids[plan.gone].tolist())
        for root, name in plan.recovered:
            self.writer.unskip(root, name)
        self.writer.commit()
        self.report.moved, self.report.copied, self.report.removed = plan.moved, len(plan.copy), len(plan.gone)
        self.report.unchanged += len(plan.renew) - plan.moved

    def _path(self, file: FoundFile) -> bytes:
        return os.path.join(self.folders[file.root], file.path)

    def _embed(self, files: list[FoundFile], options: dict, last: bool) -> list[FoundFile]:
        """Put files through the model; those that changed meanwhile come back, as they are now."""
        if self.model is None:
            self.model = open_described(self.store.config['model'], self.store.folder)
        again = []
        source = ImageFiles([os.fsdecode(self._path(file)) for file in files])
        with ThreadPoolExecutor(4) as pool:
            for batch in embed_images(
                    self.model, source, self.protocol, logits=self.model.num_classes > 0, errors='skip',
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
        records = np.empty(len(keep), dtype=RECORD)
        for place, i in enumerate(keep):
            file = found[i]
            records[place] = record_row(
                root=self.roots[file.root], size=batch.sizes[i], bytes=file.size, mtime_ns=file.mtime_ns,
                sha256=states[i][0], classes=classes[i], probabilities=probabilities[i])
            if self._drop_old(file):
                self.report.changed += 1
            else:
                self.report.new += 1
            self._unskip(file)
        self.writer.add([found[i].path for i in keep], records, batch.vectors.numpy()[keep])
        self.writer.commit()

    def _drop_old(self, file: FoundFile) -> bool:
        """Take out what the file was before it changed, if it was indexed."""
        row = self.replaces.pop(self._path(file), None)
        if row is not None:
            self.writer.remove([self.store.ids[row]])
        return row is not None

    def _unskip(self, file: FoundFile) -> None:
        if self._path(file) in self.skipped:
            self.writer.unskip(*self.skipped[self._path(file)])

    def _unreadable(self, file: FoundFile, message: str) -> None:
        """List it, unless it has been removed since the scan. Committed with the next batch."""
        path = self._path(file)
        self.report.removed += self._drop_old(file)
        if os.path.lexists(path):
            reason = message.removeprefix(f'{printable(path)}: ')
            self._unskip(file)
            self.writer.skip(self.roots[file.root], file.path, reason, file.size, file.mtime_ns)
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
