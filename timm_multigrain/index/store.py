"""The files of an index folder: read by `Store`, written by `StoreWriter`.

    index.json            what is committed, see manifest.py
    config.json           the model and the preprocessing, written once
    vectors.<g>.bin       descriptors, a row after the other, float32 or float16, little-endian
    records.<g>.bin       one record of 120 bytes for each image that was added, see records.py
    paths.<g>.bin         their paths below the indexed folders, bytes as the system has them, back to back
    removed.<g>.bin       numbers of records that hold no more, uint64
    skipped.<g>.bin       files that could not be read, JSON lines; a later line of the same path counts
    faiss.<n>.bin         structure for approximate search, if there are enough images for one
    lock                  empty

Nothing is ever changed in place. A commit appends, flushes, and replaces index.json; whatever happens before that is
undone by cutting the files back. When much is removed, `compact` writes the files anew as generation g + 1.
"""
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from timm_multigrain.files import check_json, open_regular, parse_json, printable, write_text

from .blocks import CheckedFile, Extent, GrowingFile
from .errors import DamagedIndex, writing
from .manifest import MANIFEST, Manifest
from .records import RECORD

__all__ = ['CONFIG', 'DATA_FILES', 'Store', 'StoreWriter']

CONFIG = 'config.json'
_CONFIG = {  # anybody can write it, with a checksum that is right
    'dtype': str, 'dim': int, 'protocol': {}, 'model': {
        'name': str, 'source': (str, None), 'pool': str, 'weights_sha256': str, 'dim': int, 'num_classes': int,
        'label_names': ([str], None), 'options': {}}}
_SKIPPED = {'path': str, 'reason': str, 'size': int, 'mtime_ns': int}
DATA_FILES = ('vectors', 'records', 'paths', 'removed', 'skipped')


class Store:
    """An index folder as of its last commit. Later commits do not change it; open it again to see them.

    Args:
        folder: The index.

    Raises:
        FileNotFoundError: It is not there or no index.
        DamagedIndex: It is not what was written.
        NewerFormat: A later version of the package wrote it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.config = _read_config(self.folder, self.manifest.config)
        self.dtype = np.dtype(self.config['dtype']).newbyteorder('<')
        self.dim = self.config['dim']
        try:
            self._files = self._open_files()
        except DamagedIndex:
            latest = Manifest.read(self.folder)
            if latest.generation == self.manifest.generation:
                raise
            self.manifest = latest  # a writer compacted the index between the two readings
            self._files = self._open_files()
        self._check_sizes()

    def _open_files(self) -> dict[str, CheckedFile]:
        if not self.manifest.files.keys() >= set(DATA_FILES):
            raise DamagedIndex(self.folder / MANIFEST, f'it does not name {", ".join(DATA_FILES)}')
        g = self.manifest.generation
        return {name: CheckedFile(self.folder / f'{name}.{g}.bin', self.manifest.files[name]) for name in DATA_FILES}

    def _check_sizes(self) -> None:
        for name, unit in (('vectors', self.dim * self.dtype.itemsize), ('records', RECORD.itemsize), ('removed', 8)):
            file = self._files[name]
            if file.extent.size % unit:
                raise DamagedIndex(file.path, f'{file.extent.size:,} bytes are not rows of {unit}')

    @cached_property
    def all_records(self) -> np.ndarray:
        """Every record ever added, removed ones too, (R,) of `RECORD`.

        Raises:
            DamagedIndex: The file is not what was committed, or a record is of something that is not in the index.
        """
        records = self._files['records'].view().view(RECORD)
        path_ends = records['path_offset'] + records['path_length']  # wraps around, which is below the offset
        good = ((records['root'] < len(self.manifest.roots)) & (records['vector'] < self.num_vectors)
                & (records['path_offset'] <= path_ends) & (path_ends <= self._files['paths'].extent.size)
                & (records['classes'] < max(1, self.config['model']['num_classes'])).all(1))
        if not good.all():
            raise DamagedIndex(self._files['records'].path, f'record {int(np.argmin(good))} is of nothing in the index')
        return records

    @cached_property
    def rows(self) -> np.ndarray:
        """Numbers of the records that hold, ascending, (N,) int64."""
        holds, removed = np.ones(len(self.all_records), dtype=bool), self._files['removed'].view().view('<u8')
        if (removed >= len(holds)).any():
            raise DamagedIndex(self._files['removed'].path, f'it is of more than {len(holds):,} records')
        holds[removed.astype(np.int64)] = False
        return np.flatnonzero(holds)

    @cached_property
    def records(self) -> np.ndarray:
        """The records that hold, (N,) of `RECORD`."""
        return self.all_records if len(self.rows) == len(self.all_records) else self.all_records[self.rows]

    @property
    def num_vectors(self) -> int:
        """Rows of the vector file, those of removed images too."""
        return self._files['vectors'].extent.size // (self.dim * self.dtype.itemsize)

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Rows of the vector file, (stop - start, D), mapped, read-only."""
        width = self.dim * self.dtype.itemsize
        return self._files['vectors'].view(start * width, stop * width).view(self.dtype).reshape(-1, self.dim)

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """A copy of some rows of the vector file, (n, D)."""
        return self._files['vectors'].rows(rows, self.dtype, self.dim)

    def relative_path(self, record: np.ndarray) -> bytes:
        """Path of a record below its root, as the system has it."""
        start = int(record['path_offset'])
        return self._files['paths'].view(start, start + int(record['path_length'])).tobytes()

    def absolute_paths(self) -> list[bytes]:
        """Paths of the images that hold, in their order."""
        names = self._files['paths'].view().tobytes()
        roots = [os.path.join(root, b'') for root in self.roots]
        columns = (self.records[name].tolist() for name in ('root', 'path_offset', 'path_length'))
        return [roots[root] + names[start:start + length] for root, start, length in zip(*columns, strict=True)]

    @property
    def roots(self) -> list[bytes]:
        """Absolute paths of the indexed folders, in their order."""
        return [self.root(number) for number in range(len(self.manifest.roots))]

    def root(self, number: int) -> bytes:
        """Absolute path of an indexed folder."""
        return os.fsencode(os.path.normpath(os.path.join(os.path.abspath(self.folder), self.manifest.roots[number])))

    @cached_property
    def skipped(self) -> dict[bytes, dict]:
        """Files that could not be read by absolute path: reason, size and mtime_ns."""
        skipped = {}
        for line in self._files['skipped'].view().tobytes().splitlines():
            try:
                entry = parse_json(line)
                check_json(entry, _SKIPPED, 'an entry')
                path = os.fsencode(entry.pop('path'))
            except ValueError as e:  # a path may hold what no file system knows, too
                raise DamagedIndex(self._files['skipped'].path, printable(str(e))) from e
            skipped.pop(path, None)
            if entry['reason']:
                skipped[path] = entry
        return skipped

    @property
    def size(self) -> int:
        """Bytes that are committed."""
        return sum(extent.size for extent in self.manifest.files.values())

    def check(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            DamagedIndex: At the first block that differs.
        """
        for file in self._files.values():
            file.view()


class StoreWriter:
    """Appends to an index whose lock is held.

    Args:
        store: The last commit.
    """

    def __init__(self, store: Store):
        self.folder, self.manifest = store.folder, store.manifest
        self.dim, self.dtype = store.dim, store.dtype
        self.roots = list(store.manifest.roots)
        self._files = {}
        for name in DATA_FILES:
            path = self.folder / f'{name}.{self.manifest.generation}.bin'
            self._files[name] = GrowingFile(path, self.manifest.files[name])

    @classmethod
    def create(cls, folder: Path, config: dict, generation: int = 1) -> None:
        """Make a folder an index without images.

        Args:
            folder: A folder that is there.
            config: What config.json is to hold: dim and dtype of the descriptors at least.
        """
        text = json.dumps(config, indent=1) + '\n'
        write_text(folder / CONFIG, text)
        for name in DATA_FILES:
            GrowingFile(folder / f'{name}.{generation}.bin', Extent()).close()
        config_hash = hashlib.sha256(text.encode()).hexdigest()
        Manifest(generation, config_hash, {name: Extent() for name in DATA_FILES}).write(folder)

    @property
    def num_records(self) -> int:
        return self._files['records'].size // RECORD.itemsize

    @property
    def num_vectors(self) -> int:
        return self._files['vectors'].size // (self.dim * self.dtype.itemsize)

    def add(self, paths: Sequence[bytes], rows: np.ndarray, vectors: np.ndarray | None = None) -> None:
        """Append images.

        Args:
            paths: Their paths below the folders they are in.
            rows: Their records, (n,) of `RECORD`, see `record_row`.
            vectors: Their descriptors, (n, D); None keeps the vector that each record names.
        """
        rows = rows.copy()
        lengths = np.array([len(path) for path in paths], dtype=np.uint64)
        rows['path_offset'] = self._files['paths'].size + np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.uint64)
        rows['path_length'] = lengths
        if vectors is not None:
            rows['vector'] = np.arange(self.num_vectors, self.num_vectors + len(rows))
            self._append('vectors', np.ascontiguousarray(vectors, dtype=self.dtype))
        self._append('paths', b''.join(paths))
        self._append('records', rows)

    def remove(self, records: Sequence[int]) -> None:
        """These records hold no more."""
        self._append('removed', np.asarray(records, dtype='<u8'))

    def skip(self, path: bytes, reason: str, size: int = 0, mtime_ns: int = 0) -> None:
        """Note a file that cannot be indexed; with an empty reason, that it is to be forgotten."""
        entry = {'path': os.fsdecode(path), 'reason': reason, 'size': size, 'mtime_ns': mtime_ns}
        self._append('skipped', json.dumps(entry).encode() + b'\n')

    def commit(self, **changes) -> None:
        """Make what was appended part of the index.

        Args:
            changes: Other fields of the manifest, such as faiss.
        """
        with writing(self.folder):
            files = {name: file.sync() for name, file in self._files.items()}
            manifest = Manifest(**{**vars(self.manifest), **changes, 'files': files, 'roots': tuple(self.roots)})
            if manifest != self.manifest:
                manifest.write(self.folder)
                self.manifest = manifest
        for file in self._files.values():
            file.committed()

    def _append(self, name: str, data: bytes | np.ndarray) -> None:
        with writing(self.folder):
            self._files[name].append(data)

    def rollback(self) -> None:
        """Undo what is not committed."""
        self.roots = list(self.manifest.roots)
        for file in self._files.values():
            file.rollback()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _read_config(folder: Path, sha256: str) -> dict:
    path = folder / CONFIG
    try:
        with open_regular(path) as file:
            data = file.readall()
    except FileNotFoundError:
        raise DamagedIndex(path, 'it is missing') from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedIndex(path, 'its checksum differs')
    try:
        config = parse_json(data)
        check_json(config, _CONFIG, 'it')
        names, classes = config['model']['label_names'], config['model']['num_classes']
        if config['dtype'] not in ('float32', 'float16') or not 0 < config['dim'] == config['model']['dim']:
            raise ValueError(f'descriptors of {config["dim"]} {printable(config["dtype"])} are none')
        if classes < 0 or (names is not None and len(names) != classes):
            raise ValueError(f'it has not a name for each of {classes} classes')
    except ValueError as e:
        raise DamagedIndex(path, str(e)) from e
    return config
