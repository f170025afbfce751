"""The files of an index folder: `Store` reads a commit, `Writer` makes the next.

    index.sqlite       settings, folders, images, skipped files, the checksums of the vectors, and local descriptors
    vectors.<n>.bin    descriptors, row after row, float32 or float16, little-endian; it only grows
    faiss.<n>.bin      structure for approximate search, if there are enough images for one
    model/             the model, unless it was opened from a file or folder
    lock               empty; locked by the process that writes

A commit appends to the vectors, flushes them, and is SQLite's (write-ahead log: readers see the last commit meanwhile).
What a killed writer left behind the committed vectors is cut off by the next one. Every row of the tables carries a
checksum of its fields, and the state holds how many rows a table has and the sum of their checksums, so that a row can
neither change nor vanish unnoticed. An index may come from anybody: its files are regular ones, not links; no name of a
file is taken from it; its tables are exactly these, without triggers and views.
"""
import json
import os
import re
import sqlite3
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np

from timm_multigrain.files import check_json, fsync, open_regular, parse_json, printable, replacing
from timm_multigrain.version import __version__

from .records import RECORD, REGION, DamagedIndex, IndexInUse, NewerFormat, writing
from .vectors import Vectors

FILE = 'index.sqlite'
FORMAT = 5  # PRAGMA user_version
APPLICATION = 0x4D47_4958  # PRAGMA application_id
CHUNK = 1 << 20  # bytes of vectors under one checksum, at most
PCA = b''  # in place of a SHA-256: what all details were reduced by
REMOVED_SHARE = 0.25  # of the vectors, at which the file is written anew without them
_LEFT = re.compile(r'(vectors|faiss)\.[0-9]+\.bin|\.(index\.sqlite|faiss)[-.].*')  # names that a writer may delete
_TABLES = {  # columns, key, and the text of a row that its checksum is of, which refuses fields of other types
    'settings': ('name TEXT, value TEXT', 'name', b'%b\0%b'),
    'roots': ('id INTEGER, path BLOB', 'id', b'%x %b'),
    'images': ('id INTEGER, path BLOB, record BLOB', 'id', b'%x %b\0%b'),
    'regions': ('image INTEGER, source TEXT, regions BLOB', 'image', b'%x %b\0%b'),  # of images looked at for parts
    'skipped': ('root INTEGER, path BLOB, reason TEXT, bytes INTEGER, mtime_ns INTEGER', 'root, path',
                b'%x %b\0%b\0%x %x'),
    'local': ('sha256 BLOB, crc32 INTEGER', 'sha256', b'%b\0%x'),  # of files whose details are kept
    'chunks': ('start INTEGER, rows INTEGER, crc32 INTEGER', 'start', b'%x %x %x')}
_SCHEMA = [f'CREATE TABLE {name} ({columns}, checksum INTEGER, PRIMARY KEY ({key})) WITHOUT ROWID'
           for name, (columns, key, _) in _TABLES.items()]
_SCHEMA.append('CREATE TABLE details (sha256 BLOB PRIMARY KEY, data BLOB) WITHOUT ROWID')  # large: read one by one
_SETTINGS = {  # anybody can write them, with a checksum that is right
    'config': {'dtype': str, 'protocol': {}, 'model': {
        'name': str, 'source': (str, None), 'pool': str, 'weights_sha256': str, 'dim': int, 'num_classes': int,
        'label_names': ([str], None), 'options': {}}},
    'state': {  # the generation is that of the file of vectors; pending are pictures that an update has yet to embed
        'generation': int, 'pending': int, 'totals': {name: [int] for name in _TABLES if name != 'settings'}, 'faiss': (
            {'number': int, 'kind': str, 'rows': int, 'settings': {str: int}, 'size': int, 'crc32': int}, None)}}


class Store:
    """An index as of its last commit. Later commits do not change it; open it again to see them.

    Attributes:
        config: What describes model and preprocessing.
        state: Generation of the file of vectors, structure for search, and totals of the tables.
        ids: (N,) int64, numbers of the images in the order they were added.
        records: (N,) of `RECORD`.
        names: Paths of the images below their folders, bytes.
        regions: (R,) of `REGION`, parts of the images, by image.
        region_rows: (R,) int64, row of the image that each is a part of.
        local: SHA-256 of each file whose details are kept, and `PCA` if there are any, to the CRC-32 of what is kept.
        region_sources: Number of each image that was looked at for parts, to who said where they are.
        skipped: (number of the folder, path below it) to (reason, bytes, mtime_ns) of files that could not be read.
        file: The file of vectors.

    Raises:
        FileNotFoundError: Not found, or not an index.
        DamagedIndex: It is not what was written.
        NewerFormat: Another version of the package wrote it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not os.path.lexists(self.folder / FILE):
            if os.path.isfile(folder):
                raise FileNotFoundError(f'{self.folder} is a file, and an index is a folder: make one with '
                                        'timm-multigrain index DIR -o INDEX')
            why = 'is not an index' if self.folder.is_dir() else 'was not found'
            raise FileNotFoundError(f'{self.folder} {why}: make one with timm-multigrain index DIR -o {self.folder}')
        self._read(self._take)

    def _read(self, take: Callable[[sqlite3.Connection], Any], tries: int = 3) -> Any:
        """What a function takes from the tables."""
        try:
            return self._read_once(take)
        except (DamagedIndex, PermissionError):  # a writer may begin or end meanwhile
            if tries == 1:
                raise
        time.sleep(0.01)
        return self._read(take, tries - 1)

    def _read_once(self, take: Callable[[sqlite3.Connection], Any]) -> Any:
        path = self.folder / FILE
        _check_files(self.folder)
        log = any(os.path.lexists(f'{path}{end}') for end in ('-wal', '-shm'))
        try:
            # where nobody is writing, nothing in the folder is touched
            with closing(_connect(path, 'mode=ro' if log else 'mode=ro&immutable=1')) as db:
                db.execute('BEGIN')
                _check_schema(db, self.folder)
                return take(db)
        except (sqlite3.Error, ValueError, OverflowError, TypeError) as e:
            if 'unable to open' in str(e):
                raise PermissionError(f'{path} cannot be read: if the process that wrote it was killed, make the '
                                      'folder writable once and open it again.') from e
            raise DamagedIndex(path, printable(str(e))) from e

    def _take(self, db: sqlite3.Connection) -> None:
        """Take over the rows of all tables; one of the errors above if they are not what was written."""
        tables = {name: db.execute(f'SELECT * FROM {name}').fetchall() for name in _TABLES}
        settings = {name.decode(): parse_json(value) for name, value, _ in tables['settings']}
        check_json(settings, _SETTINGS, 'settings')
        self.config, self.state = settings['config'], settings['state']
        for name, rows in tables.items():
            form, checksums = _TABLES[name][2], [row[-1] for row in rows]
            if [zlib.crc32(form % row[:-1]) for row in rows] != checksums:
                raise ValueError(f'the checksum of a row of {name} differs')
            if name != 'settings' and [len(rows), sum(checksums)] != self.state['totals'][name]:
                raise ValueError(f'{len(rows)} of {name} are not the ones that were written')
        self._roots = [path for _, path, _ in tables['roots']]
        self.ids = np.array([row[0] for row in tables['images']], dtype=np.int64)
        self.names = [name for _, name, _, _ in tables['images']]
        self.records = np.frombuffer(b''.join([row[2] for row in tables['images']]), dtype=RECORD)
        images = np.array([row[0] for row in tables['regions']], dtype=np.int64)
        if not np.isin(images, self.ids).all():
            raise ValueError('it has parts of no image')
        self.region_sources = {row[0]: row[1].decode() for row in tables['regions']}
        self.regions = np.frombuffer(b''.join([row[2] for row in tables['regions']]), dtype=REGION)
        numbers = np.array([len(row[2]) // REGION.itemsize for row in tables['regions']], dtype=np.int64)
        self.region_rows = np.repeat(np.searchsorted(self.ids, images), numbers)
        self.local = {row[0]: row[1] for row in tables['local']}
        self.skipped = {(root, name): (reason.decode(), size, mtime_ns)
                        for root, name, reason, size, mtime_ns, _ in tables['skipped']}
        chunks = np.array(tables['chunks'], dtype=np.int64).reshape(-1, 4)
        self.dim, self.dtype = self.config['model']['dim'], np.dtype(self.config['dtype']).newbyteorder('<')
        self._check(chunks)
        self.file = Vectors(self.vectors_path, self.dim, self.dtype, chunks)
        if not ((self.vector_rows >= 0) & (self.vector_rows < len(self.file))).all():
            raise ValueError('an image has a vector beyond the last one')

    def _check(self, chunks: np.ndarray) -> None:
        """What checksums do not tell: whoever makes an index makes them, too."""
        names, classes = self.config['model']['label_names'], self.config['model']['num_classes']
        roots = {*np.unique(self.records['root']).tolist(), *(root for root, _ in self.skipped)}
        paths = b''.join([*self._roots, *self.names, *(name for _, name in self.skipped)])
        first, last = np.split(self.regions['box'], 2, axis=1)
        sizes = np.stack([self.records['width'], self.records['height']], axis=1)
        numbers = [1] if self.faiss is None else [
            self.faiss['number'], self.faiss['rows'], *self.faiss['settings'].values()]
        checks = {
            f'vectors of {self.dim} {self.config["dtype"]}':
                self.config['dtype'] in ('float32', 'float16') and 0 < self.dim < 1 << 20,
            'not a name for each class': classes >= 0 and (names is None or len(names) == classes),
            'settings of the structure below 1': min(numbers) >= 1,
            f'a record that does not have {RECORD.itemsize} bytes': len(self.records) == len(self.ids),
            'parts of images that are not within them': len(self.regions) == len(self.region_rows) and (
                (first >= 0) & (first < last) & (last <= sizes[self.region_rows])).all(),
            'details without what they were reduced by': not self.local or PCA in self.local,
            'a file in no folder of the index': roots <= set(range(len(self._roots))) and b'\0' not in paths,
            'an image of an unknown class': (self.records['classes'] < max(1, classes)).all(),
            'chunks of vectors with gaps':
                (chunks[:, 1] > 0).all() and (chunks[:, 0] == np.cumsum(chunks[:, 1]) - chunks[:, 1]).all()}
        for what, good in checks.items():
            if not good:
                raise ValueError(f'it has {what}')

    @cached_property
    def roots(self) -> list[bytes]:
        """Absolute paths of the indexed folders."""
        base = os.fsencode(os.path.abspath(self.folder))
        return [os.path.normpath(os.path.join(base, root)) for root in self._roots]

    def path(self, row: int) -> bytes:
        """Absolute path of an image."""
        return os.path.join(self.roots[self.records['root'][row]], self.names[row])

    def paths(self) -> list[bytes]:
        """Absolute paths of all images."""
        roots = [os.path.join(root, b'') for root in self.roots]
        return [roots[root] + name for root, name in zip(self.records['root'].tolist(), self.names, strict=True)]

    def skipped_paths(self) -> dict[str, str]:
        """Paths of the files that could not be read, as os.fsdecode gives them, to the reason."""
        return {os.fsdecode(os.path.join(self.roots[root], name)): reason
                for (root, name), (reason, *_) in self.skipped.items()}

    @property
    def faiss(self) -> dict | None:
        """What is known of the structure for search; None without one."""
        return self.state['faiss']

    @property
    def vectors_path(self) -> Path:
        return self.folder / f'vectors.{self.state["generation"]}.bin'

    @property
    def vector_rows(self) -> np.ndarray:
        """Row of each image, and then of each region, in the file of vectors, (N + R,) int64."""
        return np.concatenate([self.records['vector'], self.regions['vector']]).astype(np.int64)

    def regions_of(self, row: int) -> np.ndarray:
        """The regions of one image, (n,) of `REGION`."""
        return self.regions[slice(*np.searchsorted(self.region_rows, [row, row + 1]))]

    def details(self, hashes: Iterable[bytes] = ()) -> dict[bytes, bytes]:
        """What is kept of the details of files, by their SHA-256, and as `PCA`.

        It is less where a later commit has removed some; DamagedIndex if they are not what was written.
        """
        def take(db: sqlite3.Connection) -> dict[bytes, bytes]:
            found, wanted = {}, self.local.keys() & {PCA, *hashes}
            for key in wanted:
                data, = db.execute('SELECT data FROM details WHERE sha256 = ?', (key,)).fetchone() or (b'',)
                if zlib.crc32(data) == self.local[key]:
                    found[key] = data
            state, = db.execute("SELECT value FROM settings WHERE name = 'state'").fetchone()
            if len(found) < len(wanted) and parse_json(state) == self.state:
                raise ValueError(f'{len(wanted) - len(found)} pictures have other details than were written')
            return found

        return self._read(take) if self.local else {}

    def check(self) -> None:
        """Read every vector and compare the checksums; DamagedIndex if one differs."""
        self.file[:]


class Writer:
    """Adds to an index whose lock is held, from its last commit on.

    Raises:
        NotWritten: The folder cannot be written to, here and in all that follows. What was committed before is whole,
            and this writer is to be closed.
    """

    def __init__(self, store: Store):
        self.folder, self.dim, self.dtype, self.num_vectors = store.folder, store.dim, store.dtype, len(store.file)
        self.state = json.loads(json.dumps(store.state))
        self._next = int(store.ids[-1]) + 1 if len(store.ids) else 0
        with writing(self.folder):
            self._file = open_regular(store.vectors_path, os.O_RDWR | (0 if self.num_vectors else os.O_CREAT))
            self._db = _connect(self.folder / FILE, 'mode=rw')
            self._db.execute('PRAGMA synchronous=FULL')
            if self._db.execute('PRAGMA quick_check(1)').fetchone() != (b'ok',):
                raise DamagedIndex(self.folder / FILE, 'its pages do not fit together')
            self._file.truncate(self.num_vectors * self.dim * self.dtype.itemsize)
            self._file.seek(0, os.SEEK_END)
            self._delete_leftovers()

    @classmethod
    def create(cls, folder: str | os.PathLike, config: dict) -> None:
        """Make an existing folder an index without images; config is that of `Store`. The lock must be held."""
        totals = {name: [0, 0] for name in _TABLES if name != 'settings'}
        state = {'generation': 1, 'pending': 0, 'faiss': None, 'totals': totals}
        with writing(folder):
            with replacing(Path(folder) / FILE) as unfinished, closing(sqlite3.connect(unfinished)) as db:
                for statement in ('PRAGMA journal_mode=WAL', f'PRAGMA application_id={APPLICATION}',
                                  f'PRAGMA user_version={FORMAT}', *_SCHEMA):
                    db.execute(statement)
                for name, value in (('config', config), ('state', state)):
                    db.execute('INSERT INTO settings VALUES (?, ?, ?)', _row('settings', name, json.dumps(value)))
                db.commit()
            fsync(folder)

    def add_root(self, path: bytes) -> int:
        """Number of another folder; a relative path is relative to the index."""
        number = self.state['totals']['roots'][0]
        self._insert('roots', [(number, path)])
        return number

    def add(self, names: Sequence[bytes], records: np.ndarray, vectors: np.ndarray) -> None:
        """Add n images: paths below their folders, (n,) of `RECORD` (where 'vector' is set), descriptors (n, D)."""
        records['vector'] = np.arange(self.num_vectors, self.num_vectors + len(records))
        self._append(vectors)
        self._insert_images(range(self._next, self._next + len(names)), names, records)
        self._next += len(names)

    def replace(self, ids: Sequence[int], names: Sequence[bytes], records: np.ndarray) -> None:
        """Give images another path or record; they keep their place among the others."""
        self._delete('images', [(int(i),) for i in ids])
        self._insert_images(ids, names, records)

    def remove(self, ids: Iterable[int]) -> None:
        """Take images out, with their regions."""
        for table in ('images', 'regions'):
            self._delete(table, [(int(i),) for i in ids])

    def set_regions(self, ids: Sequence[int], source: str, regions: Sequence[np.ndarray], vectors: np.ndarray) -> None:
        """Give images other regions: (n,) of `REGION` each (where 'vector' is set), descriptors of all, (m, D)."""
        for each, last in zip(regions, self.num_vectors + np.cumsum([len(each) for each in regions]), strict=True):
            each['vector'] = np.arange(last - len(each), last)
        self._append(vectors)
        self._delete('regions', [(int(i),) for i in ids])
        self._insert('regions', [(int(i), source, each.tobytes()) for i, each in zip(ids, regions, strict=True)])

    def set_details(self, sha256: bytes, data: bytes | None) -> None:
        """Keep the details of a file, or as `PCA` what all were reduced by; None forgets them."""
        self._delete('local', [(sha256,)])
        if data is not None:
            self._insert('local', [(sha256, zlib.crc32(data))])
        with writing(self.folder):
            self._db.execute('DELETE FROM details WHERE sha256 = ?', (sha256,))
            if data is not None:
                self._db.execute('INSERT INTO details VALUES (?, ?)', (sha256, data))

    def skip(self, root: int, name: bytes, reason: str, size: int, mtime_ns: int) -> None:
        """Note a file that cannot be indexed."""
        self.unskip(root, name)
        self._insert('skipped', [(root, name, printable(reason), size, mtime_ns)])

    def unskip(self, root: int, name: bytes) -> None:
        """Forget that a file could not be indexed, if it is noted."""
        self._delete('skipped', [(root, name)])

    def commit(self, **state) -> None:
        """Make what was done part of the index, and new values of its state: `pending` pictures, or another structure
        for search, `faiss`, whose predecessor is deleted."""
        if not self._db.in_transaction and state.items() <= self.state.items():
            return
        self.state.update(state)
        with writing(self.folder):
            os.fsync(self._file.fileno())
            row = _row('settings', 'state', json.dumps(self.state))
            self._db.execute('REPLACE INTO settings VALUES (?, ?, ?)', row)
            self._db.commit()
        with suppress(sqlite3.OperationalError):  # a damaged log is a lost commit: keep it short, if there is room
            self._db.execute('PRAGMA wal_checkpoint(PASSIVE)')
        if 'faiss' in state:
            self._delete_leftovers()

    def compact_if_worthwhile(self) -> None:
        """Write the file of vectors anew once a quarter of it is of images that were removed.

        Readers that have the index open keep what they see. The structure for search goes.
        """
        most = (1 - REMOVED_SHARE) * self.num_vectors  # that are in use
        if self.state['totals']['images'][0] >= most:  # seen without reading the tables
            return
        store = Store(self.folder)
        rows = np.unique(store.vector_rows)
        if len(rows) >= most:
            return
        records, store.regions = store.records.copy(), store.regions.copy()
        for each in (records, store.regions):
            each['vector'] = np.searchsorted(rows, each['vector'])
        self.state['generation'] += 1
        with writing(self.folder):
            self._file.close()
            self._file = open_regular(self.folder / f'vectors.{self.state["generation"]}.bin',
                                      os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._delete('chunks', self._db.execute('SELECT start FROM chunks').fetchall())
            self.num_vectors = 0
            for start in range(0, len(rows), self._step):
                self._append(store.file[rows[start:start + self._step]])
            self.replace(store.ids, store.names, records)
            self._delete('regions', [(i,) for i in store.region_sources])
            self._insert('regions', [(i, source, store.regions_of(np.searchsorted(store.ids, i)).tobytes())
                                     for i, source in store.region_sources.items()])
            self.commit(faiss=None)

    def close(self) -> None:
        """End, without what is not committed."""
        self._db.close()
        self._file.close()

    @property
    def _step(self) -> int:
        """Vectors under one checksum."""
        return max(1, CHUNK // (self.dim * self.dtype.itemsize))

    def _append(self, vectors: np.ndarray) -> None:
        vectors = np.ascontiguousarray(vectors, dtype=self.dtype)
        for start in range(0, len(vectors), self._step):
            chunk = vectors[start:start + self._step]
            with writing(self.folder):
                data = memoryview(chunk).cast('B')
                while len(data):
                    data = data[self._file.write(data):]
            self._insert('chunks', [(self.num_vectors, len(chunk), zlib.crc32(chunk))])
            self.num_vectors += len(chunk)

    def _insert_images(self, ids: Iterable[int], names: Sequence[bytes], records: np.ndarray) -> None:
        self._insert('images', [
            (int(i), name, record.tobytes()) for i, name, record in zip(ids, names, records, strict=True)])

    def _insert(self, table: str, rows: Iterable[tuple]) -> None:
        rows, total = [_row(table, *row) for row in rows], self.state['totals'][table]
        total[:] = total[0] + len(rows), total[1] + sum(row[-1] for row in rows)
        with writing(self.folder):
            marks = ', '.join('?' * (_TABLES[table][0].count(',') + 2))
            self._db.executemany(f'INSERT INTO {table} VALUES ({marks})', rows)

    def _delete(self, table: str, keys: Iterable[tuple]) -> None:
        where, total = _TABLES[table][1].replace(', ', ' = ? AND ') + ' = ?', self.state['totals'][table]
        with writing(self.folder):
            for key in keys:
                found = self._db.execute(f'SELECT checksum FROM {table} WHERE {where}', key).fetchone()
                if found:
                    self._db.execute(f'DELETE FROM {table} WHERE {where}', key)
                    total[:] = total[0] - 1, total[1] - found[0]

    def _delete_leftovers(self) -> None:
        faiss = self.state['faiss']
        named = {f'vectors.{self.state["generation"]}.bin', f'faiss.{faiss["number"]}.bin' if faiss else None}
        for path in self.folder.iterdir():
            if _LEFT.fullmatch(path.name) and path.name not in named:
                path.unlink()


@contextmanager
def index_lock(folder: Path):
    """Hold the folder's lock, which the system takes back when the process ends; IndexInUse if another one has it."""
    _check_files(folder)
    with writing(folder):
        db = _connect(folder / 'lock', 'mode=rwc', timeout=0)
    with closing(db):
        try:
            db.execute('PRAGMA journal_mode=OFF')
            db.execute('BEGIN EXCLUSIVE')
        except sqlite3.OperationalError as e:
            raise IndexInUse(f'{folder} is being written to by another process ({e}): wait until it has ended.') from e
        yield


def is_index(folder: str | bytes | os.PathLike) -> bool:
    """Whether a folder is an index, damaged or not."""
    try:
        with open_regular(Path(os.fsdecode(folder)) / FILE) as file:
            start = file.read(72)
    except OSError:
        return False
    return start[:16] == b'SQLite format 3\0' and start[68:] == APPLICATION.to_bytes(4, 'big')


def _row(table: str, *fields) -> tuple:
    """The fields and their checksum."""
    coded = tuple(field.encode() if isinstance(field, str) else field for field in fields)
    return *fields, zlib.crc32(_TABLES[table][2] % coded)


def _connect(path: Path, mode: str, timeout: float = 30) -> sqlite3.Connection:
    name = quote_from_bytes(os.fsencode(os.path.abspath(path)))
    db = sqlite3.connect(f'file:{name}?{mode}', timeout, isolation_level='IMMEDIATE', check_same_thread=False, uri=True)
    db.text_factory = bytes
    db.execute('PRAGMA trusted_schema=OFF')
    db.execute('PRAGMA cell_size_check=ON')
    return db


def _check_files(folder: Path) -> None:
    """SQLite opens its files itself: DamagedIndex unless they are regular ones, with no other name to be written to."""
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
    if db.execute('SELECT sql FROM sqlite_master ORDER BY rowid').fetchall() != [(text.encode(),) for text in _SCHEMA]:
        raise ValueError('its tables are not those of an index')
