"""The files of an index folder: `Store` reads a commit, `Writer` makes the next.

    index.sqlite       settings, folders, images, skipped files, and the checksums of the vectors
    vectors.<n>.bin    descriptors, row after row, float32 or float16, little-endian; it only grows
    faiss.<n>.bin      structure for approximate search, if there are enough images for one
    model/             the model, unless it was opened from a file or folder
    lock               empty; locked by the process that writes

A commit appends to the vectors, flushes them, and is SQLite's (write-ahead log: readers see the last commit meanwhile).
What a killed writer left behind the committed vectors is cut off by the next one. Every row of SQLite's tables carries
a checksum of its fields, and the settings hold how many rows a table has and the sum of their checksums, so that a row
can neither change nor vanish unnoticed. An index may come from anybody: its files are regular ones, not links; no name
of a file is taken from it; its tables are exactly these, without triggers and views.
"""
import json
import os
import re
import sqlite3
import stat
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np

from timm_multigrain.files import check_json, fsync, open_regular, parse_json, printable
from timm_multigrain.version import __version__

from .errors import DamagedIndex, IndexInUse, NewerFormat, writing
from .records import RECORD
from .vectors import VectorFile

__all__ = ['FILE', 'Store', 'Writer', 'index_lock', 'is_index']

FILE = 'index.sqlite'
FORMAT = 2  # PRAGMA user_version
APPLICATION = 0x4D47_4958  # PRAGMA application_id
CHUNK = 1 << 20  # bytes of vectors under one checksum, at most
REMOVED_SHARE = 0.25  # of the vectors, at which the file is written anew without them
_HOLDS = re.compile(r'(vectors|faiss)\.[0-9]+\.bin|\.(index\.sqlite|faiss)[-.].*')  # names that a writer may delete
_TABLES = {  # columns, the types they have to have, and the key
    'settings': ('name TEXT, value TEXT', (str, str), 'name'),
    'roots': ('id INTEGER, path BLOB', (int, bytes), 'id'),
    'images': ('id INTEGER, path BLOB, record BLOB', (int, bytes, bytes), 'id'),
    'skipped': ('root INTEGER, path BLOB, reason TEXT, bytes INTEGER, mtime_ns INTEGER', (int, bytes, str, int, int),
                'root, path'),
    'chunks': ('start INTEGER, rows INTEGER, crc32 INTEGER', (int, int, int), 'start'),
}
_SCHEMA = [f'CREATE TABLE {name} ({columns}, checksum INTEGER, PRIMARY KEY ({key})) WITHOUT ROWID'
           for name, (columns, _, key) in _TABLES.items()]
_SETTINGS = {  # anybody can write them, with a checksum that is right
    'config': {
        'dtype': str, 'dim': int, 'protocol': {}, 'model': {
            'name': str, 'source': (str, None), 'pool': str, 'weights_sha256': str, 'dim': int, 'num_classes': int,
            'label_names': ([str], None), 'options': {}}},
    'generation': int,  # of the file of vectors
    'faiss': ({'number': int, 'kind': str, 'rows': int, 'settings': {str: int}, 'size': int, 'crc32': int}, None),
    'totals': {name: [int] for name in _TABLES if name != 'settings'},
}


class Store:
    """An index as of its last commit. Later commits do not change it; open it again to see them.

    Args:
        folder: The index.

    Attributes:
        config: What describes model and preprocessing.
        roots: Absolute paths of the indexed folders, bytes.
        ids: (N,) int64, numbers of the images in the order they were added.
        records: (N,) of `RECORD`.
        names: Paths of the images below their folders, bytes.
        skipped: (number of the folder, path below it) to (reason, bytes, mtime_ns) of files that could not be read.
        faiss: What is known of the structure for search; None without one.
        file: The file of vectors.

    Raises:
        FileNotFoundError: Not found, or not an index.
        DamagedIndex: It is not what was written.
        NewerFormat: Another version of the package wrote it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        for attempt in range(5):
            seen = _state(self.folder)
            try:
                self._read()
                return
            except DamagedIndex:  # unless a writer was at work just now
                if attempt == 4 or (seen == _state(self.folder) and not seen[-1]):
                    raise
                time.sleep(0.05)

    def _read(self) -> None:
        path = self.folder / FILE
        if not os.path.lexists(path):
            why = 'was not found' if not self.folder.is_dir() else 'is not an index' if not (
                self.folder / 'index.json').exists() else 'is an index of a version that was never released'
            raise FileNotFoundError(f'{self.folder} {why}: make one with timm-multigrain index DIR -o {self.folder}')
        _check_files(self.folder)
        try:
            with closing(_connect(path, _reading(self.folder))) as db:
                db.execute('BEGIN')
                _check_schema(db, self.folder)
                tables = {name: _read_table(db, name) for name in _TABLES}
            self._read_settings(*tables.pop('settings'))
            for name, (rows, total) in tables.items():
                if [len(rows), total] != self.totals[name]:
                    raise ValueError(f'{len(rows)} of {name} are not the ones that were written')
            self._roots = [row[1] for row in tables['roots'][0]]
            self._read_images(tables['images'][0])
            self.skipped = {(root, name): tuple(rest) for root, name, *rest, _ in tables['skipped'][0]}
            self._check_names(self.skipped)
            chunks = np.array(tables['chunks'][0], dtype=np.int64).reshape(-1, 4)
            if (chunks[:, 1] < 1).any() or (chunks[:, 0] != np.cumsum(chunks[:, 1]) - chunks[:, 1]).any():
                raise ValueError('the chunks of the vectors have gaps')
        except NewerFormat:
            raise
        except (sqlite3.Error, ValueError, OverflowError) as e:
            if 'unable to open' in str(e):
                raise PermissionError(f'{path} cannot be read: if the process that wrote it was killed, make the '
                                      'folder writable once and open it again.') from e
            raise DamagedIndex(path, printable(str(e))) from e
        self.file = VectorFile(self.vectors_path, self.dim, self.dtype, chunks)
        if len(self.records) and self.records['vector'].max() >= len(self.file):
            raise DamagedIndex(path, 'an image has a vector beyond the last one')

    def _read_settings(self, rows: list, _: int) -> None:
        settings = {name: parse_json(value) for name, value, _ in rows}
        check_json(settings, _SETTINGS, 'settings')
        self.config, self.generation, self.faiss, self.totals = (settings[name] for name in _SETTINGS)
        names, classes = self.config['model']['label_names'], self.config['model']['num_classes']
        if self.config['dtype'] not in ('float32', 'float16') or not 0 < self.config['dim'] < 1 << 20 or (
                self.config['dim'] != self.config['model']['dim']):
            raise ValueError(f'vectors of {self.config["dim"]} {self.config["dtype"]} are not in an index')
        if classes < 0 or (names is not None and len(names) != classes):
            raise ValueError(f'it does not have a name for each of {classes} classes')
        if self.faiss is not None:
            numbers = self.faiss['settings']
            if 'candidates' not in numbers or not numbers.keys() & {'probes', 'ef'} or (
                    min(self.faiss['number'], self.faiss['rows'], *numbers.values()) < 1):
                raise ValueError('settings of the structure are missing or below 1')
        self.dtype, self.dim = np.dtype(self.config['dtype']).newbyteorder('<'), self.config['dim']

    def _read_images(self, rows: list) -> None:
        ids, self.names, records = ([row[i] for row in rows] for i in range(3))
        if not set(map(len, records)) <= {RECORD.itemsize}:
            raise ValueError(f'a record does not have {RECORD.itemsize} bytes')
        self.ids = np.array(ids, dtype=np.int64)
        self.records = np.frombuffer(b''.join(records), dtype=RECORD)
        self._check_names(zip(self.records['root'].tolist(), self.names, strict=True))
        if (self.records['classes'] >= max(1, self.config['model']['num_classes'])).any():
            raise ValueError('an image is of a class that the model does not have')

    def _check_names(self, names: Iterable[tuple[int, bytes]]) -> None:
        number = len(self._roots)
        if any(not 0 <= root < number or b'\0' in name for root, name in names) or b'\0' in b''.join(self._roots):
            raise ValueError('a file lies in no folder of the index')

    @cached_property
    def roots(self) -> list[bytes]:
        base = os.fsencode(os.path.abspath(self.folder))
        return [os.path.normpath(os.path.join(base, root)) for root in self._roots]

    def path(self, row: int) -> bytes:
        """Absolute path of an image."""
        return os.path.join(self.roots[self.records['root'][row]], self.names[row])

    def paths(self) -> list[bytes]:
        """Absolute paths of all images."""
        roots = [os.path.join(root, b'') for root in self.roots]
        return [roots[root] + name for root, name in zip(self.records['root'].tolist(), self.names, strict=True)]

    @property
    def vectors_path(self) -> Path:
        return self.folder / f'vectors.{self.generation}.bin'

    @property
    def vector_rows(self) -> np.ndarray:
        """Row of each image in the file of vectors, (N,) int64."""
        return self.records['vector'].astype(np.int64)

    @property
    def size(self) -> int:
        """Bytes of the tables and of the committed vectors."""
        return (self.folder / FILE).stat().st_size + len(self.file) * self.dim * self.dtype.itemsize

    def check(self) -> None:
        """Read every vector and compare the checksums.

        Raises:
            DamagedIndex: A chunk is not what was written.
        """
        self.file[:]


class Writer:
    """Adds to an index whose lock is held.

    Args:
        store: Its last commit.

    Raises:
        NotWritten: The folder cannot be written to.
    """

    def __init__(self, store: Store):
        self.folder = store.folder
        self.dim, self.dtype, self.generation = store.dim, store.dtype, store.generation
        self.num_vectors, self.faiss, self._roots = len(store.file), store.faiss, len(store.roots)
        self._next = int(store.ids[-1]) + 1 if len(store.ids) else 0
        self._totals = {name: Counter(rows=rows, sum=total) for name, (rows, total) in store.totals.items()}
        self._db = None
        with writing(self.folder):
            self._file = open_regular(store.vectors_path, os.O_RDWR | (0 if self.num_vectors else os.O_CREAT))
            self._db = _connect(self.folder / FILE, 'mode=rw')
            self._db.execute('PRAGMA synchronous=FULL')
            if self._db.execute('PRAGMA quick_check(1)').fetchone() != ('ok',):
                raise DamagedIndex(self.folder / FILE, 'its pages do not fit together')
            self._file.truncate(self.num_vectors * self.dim * self.dtype.itemsize)
            self._file.seek(0, os.SEEK_END)
            self._delete_leftovers()

    @classmethod
    def create(cls, folder: str | os.PathLike, config: dict) -> None:
        """Make an existing folder an index without images. The lock must be held.

        Args:
            folder: The folder.
            config: Model, protocol, dim and dtype of the descriptors.
        """
        unfinished = Path(folder) / f'.{FILE}-{uuid.uuid4().hex[:8]}'
        with writing(folder):
            try:
                with closing(sqlite3.connect(unfinished, isolation_level=None)) as db:
                    db.execute('PRAGMA journal_mode=WAL')
                    db.execute(f'PRAGMA application_id={APPLICATION}')
                    db.execute(f'PRAGMA user_version={FORMAT}')
                    for statement in _SCHEMA:
                        db.execute(statement)
                    totals = {name: [0, 0] for name in _SETTINGS['totals']}
                    for name, value in zip(_SETTINGS, (config, 1, None, totals), strict=True):
                        row = name, json.dumps(value)
                        db.execute('INSERT INTO settings VALUES (?, ?, ?)', (*row, _checksum(row)))
                os.replace(unfinished, Path(folder) / FILE)
                fsync(folder)
            finally:
                unfinished.unlink(missing_ok=True)

    def add_root(self, path: bytes) -> int:
        """Number of another folder; a relative path is relative to the index."""
        self._insert('roots', [(self._roots, path)])
        self._roots += 1
        return self._roots - 1

    def add(self, names: Sequence[bytes], records: np.ndarray, vectors: np.ndarray | None = None) -> None:
        """Add images.

        Args:
            names: Their paths below their folders.
            records: (n,) of `RECORD`.
            vectors: Their descriptors, (n, D); None keeps the vector that each record names.
        """
        if vectors is not None:
            records = records.copy()
            records['vector'] = np.arange(self.num_vectors, self.num_vectors + len(records))
            self._append(vectors)
        ids = range(self._next, self._next + len(names))
        self._next += len(names)
        self._insert('images', [
            (i, name, record.tobytes()) for i, name, record in zip(ids, names, records, strict=True)])

    def replace(self, ids: Sequence[int], names: Sequence[bytes], records: np.ndarray) -> None:
        """Give images another path or record; they keep their place among the others."""
        self.remove(ids)
        self._insert('images', [(int(i), name, r.tobytes()) for i, name, r in zip(ids, names, records, strict=True)])

    def remove(self, ids: Iterable[int]) -> None:
        """Take images out."""
        self._delete('images', [(int(i),) for i in ids])

    def skip(self, root: int, name: bytes, reason: str, size: int, mtime_ns: int) -> None:
        """Note a file that cannot be indexed."""
        self.unskip(root, name)
        self._insert('skipped', [(root, name, printable(reason), size, mtime_ns)])

    def unskip(self, root: int, name: bytes) -> None:
        """Forget that a file could not be indexed, if it is noted."""
        self._delete('skipped', [(root, name)])

    def commit(self) -> None:
        """Make what was done part of the index.

        Raises:
            NotWritten: No room on the disk; what was committed before is whole, and this writer is to be closed.
        """
        if not self._db.in_transaction:
            return
        with writing(self.folder):
            os.fsync(self._file.fileno())
            self._set('totals', {name: [total['rows'], total['sum']] for name, total in self._totals.items()})
            self._db.execute('COMMIT')
        with suppress(sqlite3.OperationalError):  # a damaged log is a lost commit: keep it short, if there is room
            self._db.execute('PRAGMA wal_checkpoint(PASSIVE)')

    def set_faiss(self, described: dict | None) -> None:
        """Commit another structure for search and delete the last one."""
        old, self.faiss = self.faiss, described
        if old != described:
            self._set('faiss', described)
            self.commit()
        if old is not None and old != described:
            (self.folder / f'faiss.{old["number"]}.bin').unlink(missing_ok=True)

    def compact_if_worthwhile(self) -> None:
        """Write the file of vectors anew once a quarter of it is of images that were removed.

        Readers that have the index open keep what they see.

        Raises:
            NotWritten: No room; the index is as it was.
        """
        if self.num_vectors - self._totals['images']['rows'] <= REMOVED_SHARE * self.num_vectors:
            return
        store = Store(self.folder)
        rows = np.unique(store.vector_rows)  # an image may share the vector of another
        old, self.generation = store.vectors_path, store.generation + 1
        new = self.folder / f'vectors.{self.generation}.bin'
        with writing(self.folder):
            self._file.close()
            self._file = open_regular(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._begin()
            self._delete('chunks', self._db.execute('SELECT start FROM chunks').fetchall())
            self.num_vectors = 0
            step = max(1, CHUNK // (self.dim * self.dtype.itemsize))
            for start in range(0, len(rows), step):
                self._append(store.file[rows[start:start + step]])
            records = store.records.copy()
            records['vector'] = np.searchsorted(rows, store.vector_rows)
            self.replace(store.ids, store.names, records)
            self._set('generation', self.generation)
            self._set('faiss', None)
            self.commit()
            old.unlink()
            if store.faiss:
                (self.folder / f'faiss.{store.faiss["number"]}.bin').unlink(missing_ok=True)
            self.faiss = None

    def close(self) -> None:
        """End, without what is not committed."""
        if self._db is not None:
            self._db.close()
        self._file.close()

    def _begin(self) -> None:
        if not self._db.in_transaction:
            self._db.execute('BEGIN IMMEDIATE')

    def _append(self, vectors: np.ndarray) -> None:
        vectors = np.ascontiguousarray(vectors, dtype=self.dtype)
        step = max(1, CHUNK // (self.dim * self.dtype.itemsize))
        for start in range(0, len(vectors), step):
            chunk = vectors[start:start + step]
            with writing(self.folder):
                data = memoryview(chunk).cast('B')
                while len(data):
                    data = data[self._file.write(data):]
            self._insert('chunks', [(self.num_vectors, len(chunk), zlib.crc32(chunk))])
            self.num_vectors += len(chunk)

    def _insert(self, table: str, rows: list[tuple]) -> None:
        with writing(self.folder):
            self._begin()
            rows = [(*row, _checksum(row)) for row in rows]
            marks = ', '.join('?' * (len(_TABLES[table][1]) + 1))
            self._db.executemany(f'INSERT INTO {table} VALUES ({marks})', rows)
            self._totals[table].update(rows=len(rows), sum=sum(row[-1] for row in rows))

    def _delete(self, table: str, keys: Iterable[tuple]) -> None:
        where = ' AND '.join(f'{column} = ?' for column in _TABLES[table][2].split(', '))
        with writing(self.folder):
            self._begin()
            for key in keys:
                found = self._db.execute(f'SELECT checksum FROM {table} WHERE {where}', key).fetchone()
                if found:
                    self._db.execute(f'DELETE FROM {table} WHERE {where}', key)
                    self._totals[table].subtract(rows=1, sum=found[0])

    def _set(self, name: str, value) -> None:
        with writing(self.folder):
            self._begin()
            row = name, json.dumps(value)
            self._db.execute('REPLACE INTO settings VALUES (?, ?, ?)', (*row, _checksum(row)))

    def _delete_leftovers(self) -> None:
        named = {f'vectors.{self.generation}.bin'} | ({f'faiss.{self.faiss["number"]}.bin'} if self.faiss else set())
        for path in self.folder.iterdir():
            if _HOLDS.fullmatch(path.name) and path.name not in named:
                path.unlink()


@contextmanager
def index_lock(folder: Path):
    """Hold the folder's lock, which the system takes back when the process ends, however it ends.

    Raises:
        IndexInUse: Another process or thread holds it.
    """
    _check_files(folder)
    with writing(folder):
        db = _connect(folder / 'lock', 'mode=rwc', timeout=0)
    try:
        try:
            db.execute('PRAGMA journal_mode=OFF')
            db.execute('BEGIN EXCLUSIVE')
        except sqlite3.OperationalError as e:
            raise IndexInUse(f'{folder} is being written to by another process ({e}): wait until it has ended.') from e
        yield
    finally:
        db.close()


def is_index(folder: str | bytes | os.PathLike) -> bool:
    """Whether a folder is an index, damaged or not."""
    try:
        with open_regular(Path(os.fsdecode(folder)) / FILE) as file:
            start = file.read(72)
    except OSError:
        return False
    return start[:16] == b'SQLite format 3\0' and start[68:] == APPLICATION.to_bytes(4, 'big')


def _checksum(row: Sequence) -> int:
    """CRC-32 of the fields; none but the last can hold the byte between them."""
    return zlib.crc32(b'\0'.join([value if type(value) is bytes else str(value).encode() for value in row]))


def _connect(path: Path, mode: str, timeout: float = 30) -> sqlite3.Connection:
    name = quote_from_bytes(os.fsencode(os.path.abspath(path)))
    db = sqlite3.connect(f'file:{name}?{mode}', timeout, isolation_level=None, check_same_thread=False, uri=True)
    db.execute('PRAGMA trusted_schema=OFF')
    db.execute('PRAGMA cell_size_check=ON')
    return db


def _reading(folder: Path) -> str:
    """How SQLite opens the tables: without touching anything in the folder where nobody is writing to it."""
    log = any(os.path.lexists(folder / f'{FILE}{end}') for end in ('-wal', '-shm'))
    return 'mode=ro' if log else 'mode=ro&immutable=1'


def _state(folder: Path) -> tuple:
    """Differs if a writer was at work between two calls; last, whether one is or was killed."""
    try:
        status = os.lstat(folder / FILE)
    except OSError:
        return None, False
    return (status.st_ino, status.st_mtime_ns, status.st_size), os.path.lexists(folder / f'{FILE}-wal')


def _check_files(folder: Path) -> None:
    """SQLite opens its files itself: they have to be regular ones, and what it writes to must have no other name.

    Raises:
        DamagedIndex: One of them is something else.
    """
    for name in (FILE, f'{FILE}-wal', f'{FILE}-shm', 'lock'):
        path = folder / name
        if os.path.lexists(path):
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or (name == 'lock' and status.st_size):
                raise DamagedIndex(path, 'it is not a file of its own')
    for name in (f'{FILE}-journal', 'lock-journal'):  # of another mode; it may name files for SQLite to delete
        if os.path.lexists(folder / name):
            raise DamagedIndex(folder / name, 'it is not a file of an index')


def _check_schema(db: sqlite3.Connection, folder: Path) -> None:
    if db.execute('PRAGMA application_id').fetchone()[0] != APPLICATION:
        raise ValueError('it is not an index')
    version = db.execute('PRAGMA user_version').fetchone()[0]
    if version != FORMAT:
        raise NewerFormat(f'{folder} has format {version}; this is timm_multigrain {__version__}, which reads format '
                          f'{FORMAT}: update the package, or make the index anew.')
    if db.execute('SELECT sql FROM sqlite_master ORDER BY rowid').fetchall() != [(text,) for text in _SCHEMA]:
        raise ValueError('its tables are not those of an index')


def _read_table(db: sqlite3.Connection, table: str) -> tuple[list[tuple], int]:
    """The rows, and the sum of their checksums.

    Raises:
        ValueError: A row is not what was written.
    """
    rows = db.execute(f'SELECT * FROM {table}').fetchall()
    for values, kind in zip(zip(*rows, strict=True), (*_TABLES[table][1], int), strict=False):
        if set(map(type, values)) != {kind}:
            raise ValueError(f'a value in {table} is of another type')
    checksums = [_checksum(row[:-1]) for row in rows]
    if checksums != [row[-1] for row in rows]:
        raise ValueError(f'the checksum of a row of {table} differs')
    return rows, sum(checksums)
