"""Make or update an index: find the images, compare them with what is indexed, embed what is new, commit by batches."""
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from timm_multigrain.embed.embedder import Embedded, embed_images
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import counted, file_sha256, printable
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.images.walk import FoundFile, Scan, scan_folders
from timm_multigrain.models.open import open_model
from timm_multigrain.models.save import save_pretrained
from timm_multigrain.search.local import LocalDescriber
from timm_multigrain.version import __version__

from .ann import update_structure
from .model import SAVED, describe_model, open_described, protocol_from_json
from .records import RECORD, DamagedIndex, OtherModel, top_classes
from .regions import Boxes, update_regions
from .store import FILE, PCA, Store, Writer, index_lock, is_index

BATCH = 16  # images whose details are committed at a time
DEFAULT_MODEL = 'tf_efficientnet_lite0.in1k'  # 18 MB, Apache-2.0, quick without a GPU


@dataclass
class BuildReport:
    """What an update has done.

    Attributes:
        images: Images in the index now.
        new: Images that went through the model, those of changed files not counted.
        moved: Files found at another place; their descriptors were kept.
        copied: New files with the content of another one; its descriptor was taken.
        skipped: Path to reason of the files that could not be read, this time or before.
        new_skipped: How many of them were met for the first time.
        unreadable: Path to reason of folders that could not be opened; their images were left as they were.
        other: Files that are not images by their names.
        regions: Parts of images in the index now.
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
    regions: int = 0

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ('new', 'changed', 'moved', 'copied', 'removed', 'unchanged')}
        parts = [f'{number:,} {name}' for name, number in counts.items() if number]
        if self.skipped:
            parts.append(f'{len(self.skipped):,} unreadable ({self.new_skipped:,} new)')
        if self.other:
            parts.append(f'{counted(self.other, "other file")} ignored')
        regions = f', {counted(self.regions, "region")}' if self.regions else ''
        what = ', '.join(parts) or 'nothing found'
        return f'{counted(self.images, "image")}{regions}: {what}; {self.seconds:.1f} s'


def build_index(
        dirs: Iterable[str | os.PathLike],
        out: str | os.PathLike,
        model: str | os.PathLike | torch.nn.Module | None = None,
        protocol: Protocol | Callable[[torch.nn.Module], Protocol] | None = None,
        *,
        model_options: Mapping[str, Any] | None = None,
        boxes: str | os.PathLike | Callable | None = None,
        local: bool = False,
        half: bool = False,
        retry: bool = False,
        remove_missing: bool = False,
        everything: bool = False,
        kind: str = 'auto',
        progress: bool = True,
        **extraction,
) -> BuildReport:
    """Make an index of the images below some folders, or bring one up to date.

    Images that are in it and have not changed are not read again; of a run that is stopped only the last batch is lost.
    Images of folders that are not named now stay as they are.

    Args:
        dirs: Folders, searched with their subfolders; none for those of the index. Images of indexed folders that
            are gone are recognised by their content and move to where they are found.
        out: The index folder; a new one is made.
        model: What `open_model` opens (a saved folder, a checkpoint, a name), or a MultiGrain, which is saved in the
            index. None takes the index's own, for a new index `DEFAULT_MODEL`.
        protocol: Preprocessing, or a function that makes it from the model; None takes the index's own, or what the
            model is made for.
        model_options: Keyword arguments of `open_model`, such as pool and p.
        boxes: Where things are in the pictures, see `Boxes`: each is embedded, too, and found by itself. None leaves
            the regions of images that have not changed as they are.
        local: Keep local descriptors, too, at most 68,000 bytes an image, of these and all later updates, so that a
            search by details need not compute them, see `timm_multigrain.search.local`.
        half: Keep descriptors of a new index as float16, in half the space.
        retry: Try files again that could not be read before and have not changed.
        remove_missing: Forget a folder's images even if all of them, or the folder itself, are gone.
        everything: Of a new index: hidden files and folders, and those that programs fill, too; see images/walk.py.
        kind: Structure for search: 'auto' by the number of images, 'exact', 'hnsw' or 'ivf-pq'.
        **extraction: batch_size, workers, device, dtype and fast of `Embedder`; a batch is committed at a time.

    Raises:
        FileNotFoundError, NotADirectoryError: A folder was not found.
        FileExistsError: ``out`` is something else than an index.
        IndexInUse: Another process is writing to it.
        OtherModel: The index was built with another model or preprocessing.
        DamagedIndex, NewerFormat: The index cannot be read.
        NotWritten: No room on the disk; what is committed is whole.
        ValueError: No folders for a new index, or no images in them.
    """
    start, out, boxes = time.monotonic(), Path(out), None if boxes is None else Boxes(boxes)
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    folders = list(dict.fromkeys(os.path.realpath(os.fsencode(folder)) for folder in dirs))
    new = _is_new(out)
    known = [] if new else Store(out).roots
    for folder in folders:
        if not os.path.isdir(folder) and folder not in known:
            kind_of = NotADirectoryError if os.path.lexists(folder) else FileNotFoundError
            raise kind_of(f'{os.fsdecode(folder)!r} is not a folder: give folders with pictures in them.')
    if new:
        if not folders:
            raise ValueError(f'{out} is a new index: give the folders that it is to be made of.')
        scan = scan_folders(folders, skip=is_index, by_content=True, everything=everything)
        if not scan.files:
            raise ValueError(f'No images in {", ".join(map(printable, folders))}: nothing was made.')
        model = model or DEFAULT_MODEL
        source = os.path.abspath(model) if isinstance(model, str) and os.path.exists(model) else None
        model = open_model(model, **(model_options or {})) if isinstance(model, str) else model
    out.mkdir(parents=True, exist_ok=True)
    with index_lock(out):
        if new and _is_new(out):  # another process may have made it meanwhile
            _create(out, model, source, protocol, model_options, half, everything)
            protocol = model_options = None
        store = Store(out)
        model, protocol = _check_model(store, model, protocol, model_options)
        writer = Writer(store)
        try:
            update = _Update(store, writer, model, protocol, {'progress': progress, **extraction})
            update.run(folders, retry, remove_missing, boxes, local)
            writer.compact_if_worthwhile()
            update_structure(writer, kind, progress)
        finally:
            writer.close()
    update.report.seconds = time.monotonic() - start
    return update.report


def _is_new(out: Path) -> bool:
    """Whether an index can be made there: what a killed process left of a new one, an empty folder or nothing.

    Raises:
        FileExistsError: It is something else than that or an index.
    """
    if not os.path.lexists(out):
        return True
    if os.path.lexists(out / FILE):
        return False
    other = [path.name for path in out.iterdir()
             if path.is_symlink() or not (path.name in ('lock', SAVED) or path.name.startswith('.'))]
    if other:
        raise FileExistsError(f'{out} holds other things ({min(other)!r}): name a new folder for the index.')
    return True


def _create(
        out: Path, model: torch.nn.Module, source: str | None, protocol, model_options, half: bool, everything: bool,
) -> None:
    """Make an index without images, of a model from a file or folder or from elsewhere."""
    if source is None:  # also of a name: an index is searched without asking the network for what it says
        save_pretrained(model, out / SAVED)
    protocol = Protocol.for_model(model) if protocol is None else protocol(model) if callable(protocol) else protocol
    Writer.create(out, {
        'model': describe_model(model, source, model_options),
        'protocol': protocol.to_dict(), 'dtype': 'float16' if half else 'float32', 'everything': everything,
        'versions': {'timm_multigrain': __version__, 'timm': timm.__version__, 'torch': torch.__version__,
                     'python': sys.version.split()[0]}})


def _check_model(store: Store, model, protocol, model_options) -> tuple[torch.nn.Module | None, Protocol]:
    """The model, where it is open already, and the protocol of an index; OtherModel if others were asked for."""
    described, out = store.config['model'], store.folder
    if model is None and model_options:
        raise ValueError(f'{out} was built with its own model: leave {", ".join(model_options)} out, or name the '
                         'model, too, which is then compared.')
    if model is not None or callable(protocol):
        model = open_described(described, out, model, model_options)
    own = protocol_from_json(store.config['protocol'])
    protocol = protocol(model) if callable(protocol) else protocol
    if protocol not in (None, own):
        raise OtherModel(f'{out} was built with {own}, not {protocol}: leave those options out, or make another index.')
    return model, own


class _Update:
    """One run over the folders; ``report`` fills as it goes on. Rows are those of the store."""

    def __init__(self, store: Store, writer: Writer, model: torch.nn.Module | None, protocol: Protocol, options: dict):
        self.store, self.writer, self.model, self.protocol, self.options = store, writer, model, protocol, options
        self.report = BuildReport()
        self.embed: list[FoundFile] = []  # to go through the model, new or changed
        self.replaces: dict[bytes, int] = {}  # path of a changed file of those to the row that is to go
        self.renew: list[tuple[FoundFile, int]] = []  # a known content that is nowhere else: takes over the row
        self.copy: list[tuple[FoundFile, int]] = []  # new files with the content of the row, which stays
        self.gone: list[int] = []  # rows of deleted files
        self.skipped = {os.path.join(store.roots[root], name): (root, name) for root, name in store.skipped}

    def run(self, named: list[bytes], retry: bool, remove_missing: bool, boxes: Boxes | None, local: bool) -> None:
        store, report = self.store, self.report
        if local:
            LocalDescriber(self._opened(), self.protocol)  # an error comes before the work
        named = named or store.roots
        self.folders = [folder for folder in named if os.path.isdir(folder)]
        vanished, forget = self._missing_roots(named, remove_missing)
        scan = scan_folders(
            self.folders, leave_out=[os.fsencode(store.folder)], skip=is_index, by_content=True,
            everything=bool(store.config.get('everything')))
        present = self._compare(scan, retry, vanished, forget)
        if not remove_missing:
            self._refuse_if_all_gone(scan)
        self.roots = [self._root_number(folder) for folder in self.folders]
        self._take_over([path for path in self.skipped if path not in present and self._is_gone(path, scan, forget)])
        if self.embed:
            self._embed()
        if boxes is not None:
            update_regions(self.writer, self._opened, self.protocol, boxes, self.folders, **self.options)
        if local or store.local:
            self._keep_details()
        after = store if self.writer.state == store.state else Store(store.folder)  # a million images take 2 s
        report.images, report.regions, report.other, report.skipped = (
            len(after.ids), len(after.regions), scan.other, after.skipped_paths())
        report.unreadable = {os.fsdecode(path): reason for path, reason in scan.unreadable.items()}

    def _missing_roots(self, named: list[bytes], remove_missing: bool) -> tuple[list[bytes], list[bytes]]:
        """Indexed folders that were not found: those whose images stay, unless they are found elsewhere, and others."""
        vanished, forget = [], []
        images = np.bincount(self.store.records['root'], minlength=len(self.store.roots))
        for folder, number in zip(self.store.roots, images.tolist(), strict=True):
            if os.path.isdir(folder):
                continue
            if number and folder in named and not remove_missing:
                raise FileNotFoundError(
                    f'{os.fsdecode(folder)!r} with {counted(number, "image")} was not found: mount the disk; if it was '
                    'moved, name the folder where it is now; or forget them with --remove-missing.')
            (forget if not number or folder in named else vanished).append(folder)
        return vanished, forget

    def _compare(self, scan: Scan, retry: bool, vanished: list[bytes], forget: list[bytes]) -> set[bytes]:
        """Sort what a scan has found and what it has not; the paths that exist.

        Files of the same size and time as when they were indexed are taken to be unchanged. Others of a known size are
        read: what has a known content keeps its descriptor.
        """
        store, suspects, present = self.store, [], set()
        known = {path: row for row, path in enumerate(store.paths())}
        sizes, times, hashes = (store.records[name] for name in ('bytes', 'mtime_ns', 'sha256'))
        for file in scan.files:
            path = self._path(file)
            present.add(path)
            row = known.pop(path, None)
            if row is None:
                if retry or store.skipped.get(self.skipped.get(path), ())[1:] != (file.size, file.mtime_ns):
                    suspects.append(file)
            elif (sizes[row], times[row]) == (file.size, file.mtime_ns):
                self.report.unchanged += 1
            elif sizes[row] == file.size and sha256_of(path) == hashes[row].tobytes():
                self.report.unchanged += 1
                self.renew.append((file, row))
            else:
                self.embed.append(file)
                self.replaces[path] = row
        gone = {row for path, row in known.items() if self._is_gone(path, scan, forget)}
        absent = gone | {row for path, row in known.items() if any(_below(path, folder) for folder in vanished)}
        by_hash, known_sizes = defaultdict(list), set(sizes.tolist())
        # the last of a list is taken first: the row of an absent file before one of an existing file
        for row in sorted(range(len(hashes)), key=lambda row: (row in absent, row)) if suspects else ():
            by_hash[hashes[row].tobytes()].append(row)
        for file in suspects:
            rows = by_hash.get(sha256_of(self._path(file))) if file.size in known_sizes else None
            if not rows:
                self.embed.append(file)
            elif rows[-1] in absent:
                absent.remove(rows[-1])
                self.renew.append((file, rows.pop()))
                self.report.moved += 1
            else:
                self.copy.append((file, rows[-1]))
        self.gone = sorted(gone & absent)
        return present

    def _is_gone(self, path: bytes, scan: Scan, forget: list[bytes]) -> bool:
        """Whether a path that the scan has not met would have been met if it existed."""
        return any(_below(path, folder) for folder in [*self.folders, *forget]) and not any(
            _below(path, other) for other in scan.unreadable)

    def _refuse_if_all_gone(self, scan: Scan) -> None:
        """An empty folder where a thousand images were is more often a disk that is not mounted."""
        for number, folder in enumerate(self.folders):
            gone = sum(self.store.roots[root] == folder for root in self.store.records['root'][self.gone])
            if gone and not any(file.root == number for file in scan.files):
                raise FileNotFoundError(
                    f'None of the {gone:,} indexed images below {os.fsdecode(folder)!r} was found: mount the disk, '
                    'or forget them with --remove-missing.')

    def _root_number(self, folder: bytes) -> int:
        """The folder's number in the index, a new one if need be; relative if folder and index can move together."""
        if folder in self.store.roots:
            return self.store.roots.index(folder)
        index = os.path.realpath(os.fsencode(self.store.folder))
        inside = _below(folder, os.path.dirname(index))
        return self.writer.add_root(os.path.relpath(folder, index) if inside else folder)

    def _take_over(self, recovered: list[bytes]) -> None:
        """Everything that needs no model, in one commit; recovered are skipped files that were deleted."""
        for found in (self.renew, self.copy):
            names, rows = [file.path for file, _ in found], [row for _, row in found]
            records = self.store.records[rows]
            records['root'] = [self.roots[file.root] for file, _ in found]
            records['mtime_ns'] = [file.mtime_ns for file, _ in found]
            if found is self.renew:
                self.writer.replace(self.store.ids[rows], names, records)
            else:
                self.writer.add(names, records, self.store.file[self.store.vector_rows[rows]])
        self.writer.remove(self.store.ids[self.gone])
        for path in recovered:
            self._unskip(path)
        self.writer.commit(pending=len(self.embed))
        self.report.copied, self.report.removed = len(self.copy), len(self.gone)

    def _embed(self) -> None:
        files, pending = self.embed, len(self.embed)
        with ThreadPoolExecutor(4) as pool:
            for batch in embed_images(
                    self._opened(), ImageFiles([os.fsdecode(self._path(file)) for file in files]), self.protocol,
                    logits=self.model.num_classes > 0, on_error=lambda i, message: self._unreadable(files[i], message),
                    **self.options):
                found = [files[i] for i in batch.indices]
                hashes = list(pool.map(self._hash_if_unchanged, found))
                self._add(batch, found, hashes)
                for file, digest in zip(found, hashes, strict=True):
                    if digest is None:  # a time of -1: tried by the next run in any case
                        self._unreadable(file._replace(mtime_ns=-1), 'it was changing while it was read')
                pending -= len(found)
                self.writer.commit(pending=pending)
        self.writer.commit(pending=0)

    def _keep_details(self) -> None:
        """Local descriptors of the files in the index that have none yet, and of no others."""
        store = Store(self.writer.folder)
        files = {digest.tobytes(): row for row, digest in enumerate(store.records['sha256'])}
        for gone in store.local.keys() - files.keys() - {PCA}:
            self.writer.set_details(gone, None)
        missing = [digest for digest in files if digest not in store.local]
        if missing:
            paths = [os.fsdecode(store.path(files[digest])) for digest in missing]
            source, given = ImageFiles(paths), ('workers', 'device', 'progress')
            describer = LocalDescriber(
                self._opened(), self.protocol, **{name: self.options[name] for name in given if name in self.options})
            if store.local:
                kept = store.details()[PCA]
                try:
                    describer.restore(kept)
                except ValueError as e:
                    raise DamagedIndex(store.folder, str(e)) from e
            else:
                self.writer.set_details(PCA, describer.fit(source).to_bytes())
            for i, features in enumerate(describer.describe(source)):
                if len(features.points) and sha256_of(paths[i]) == missing[i]:  # as it was indexed
                    self.writer.set_details(missing[i], features.to_bytes())
                if i % BATCH == BATCH - 1:
                    self.writer.commit()
        self.writer.commit()

    def _opened(self) -> torch.nn.Module:
        if self.model is None:
            self.model = open_described(self.store.config['model'], self.store.folder)
        return self.model

    def _path(self, file: FoundFile) -> bytes:
        return os.path.join(self.folders[file.root], file.path)

    def _hash_if_unchanged(self, file: FoundFile) -> bytes | None:
        """Read after the picture was: a file of the scan's size and time now has had them in between, too."""
        digest = sha256_of(self._path(file))
        try:
            status = os.stat(self._path(file))
        except OSError:
            return None
        return digest if (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns) else None

    def _add(self, batch: Embedded, found: list[FoundFile], hashes: list[bytes | None]) -> None:
        keep = [i for i, digest in enumerate(hashes) if digest is not None]
        files, records = [found[i] for i in keep], np.zeros(len(keep), dtype=RECORD)
        records['root'] = [self.roots[file.root] for file in files]
        records['width'], records['height'] = np.array([batch.sizes[i] for i in keep]).reshape(-1, 2).T
        records['bytes'], records['mtime_ns'] = [file.size for file in files], [file.mtime_ns for file in files]
        records['sha256'] = [np.frombuffer(hashes[i], np.uint8) for i in keep] or 0
        records['classes'] = -1
        if batch.logits is not None:
            classes, probabilities = top_classes(batch.logits[keep])
            records['classes'][:, :classes.shape[1]] = classes
            records['probabilities'][:, :classes.shape[1]] = probabilities
        for file in files:
            changed = self._drop_old(file)
            self.report.changed += changed
            self.report.new += not changed
            self._unskip(self._path(file))
        self.writer.add([file.path for file in files], records, batch.vectors.numpy()[keep])

    def _drop_old(self, file: FoundFile) -> bool:
        """Take out what the file was before it changed, if it was indexed."""
        row = self.replaces.pop(self._path(file), None)
        if row is not None:
            self.writer.remove([self.store.ids[row]])
        return row is not None

    def _unskip(self, path: bytes) -> None:
        if path in self.skipped:
            self.writer.unskip(*self.skipped[path])

    def _unreadable(self, file: FoundFile, message: str) -> None:
        """List it, unless it has been removed since the scan. Committed with the next batch."""
        path = self._path(file)
        self.report.removed += self._drop_old(file)
        if os.path.lexists(path):
            self._unskip(path)
            reason = message.removeprefix(f'{printable(path)}: ')
            self.writer.skip(self.roots[file.root], file.path, reason, file.size, file.mtime_ns)
            self.report.new_skipped += 1


def sha256_of(path: bytes | str) -> bytes | None:
    """Hash of a file; None if it cannot be read."""
    try:
        return bytes.fromhex(file_sha256(path))
    except OSError:
        return None


def _below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b'/') + b'/')
