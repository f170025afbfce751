"""The files of an index: what is committed is read back, what is not is gone, and no changed byte goes unnoticed."""
import json
import os
import resource
import shutil
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest

from timm_multigrain.index import DamagedIndex, Index, IndexInUse
from timm_multigrain.index import blocks as blocks_module
from timm_multigrain.index.blocks import BLOCK, CheckedFile, Extent, GrowingFile, extent_of
from timm_multigrain.index.errors import NotWritten
from timm_multigrain.index.faiss_index import update_structure
from timm_multigrain.index.lock import index_lock
from timm_multigrain.index.manifest import Manifest, NewerFormat
from timm_multigrain.index.store import DATA_FILES, Store, StoreWriter
from timm_multigrain.index.tidy import compact, delete_leftovers

from .small_index import add_images, unit_vectors, write_index


def everything(folder):
    """All that an index says, and two searches."""
    index = Index.open(folder)
    index.store.check()
    scores, rows = index.search(unit_vectors(3, seed=9), 4)
    exact = index.search(unit_vectors(3, seed=9), 4, 'car', exact=True)
    return (np.asarray(index.vectors).tobytes(), index.paths, index.columns.tobytes(), index.skipped, index.info,
            [index.records(i) for i in range(len(index))], scores.tobytes(), rows.tobytes(), exact[1].tobytes())


@pytest.fixture
def folder(tmp_path):
    """An index with removed images, a skipped file and names of all kinds."""
    path = write_index(tmp_path / 'index', unit_vectors(120), [f'{i}\n\udcff"é.jpg' for i in range(120)])
    writer = StoreWriter(Store(path))
    writer.remove([3, 77])
    writer.skip(b'/pictures/bad\xff.jpg', 'is empty', 0, 5)
    add_images(writer, unit_vectors(2, seed=1), ['new a.jpg', 'new b.jpg'])
    writer.close()
    return path


def test_what_is_written_is_read(folder):
    index = Index.open(folder)
    kept = [i for i in range(120) if i not in (3, 77)]
    assert np.array_equal(index.vectors, np.concatenate([unit_vectors(120)[kept], unit_vectors(2, seed=1)]))
    old = [f'/pictures/{i}\n\udcff"é.jpg' for i in kept]
    assert index.paths == [*old, '/pictures/new a.jpg', '/pictures/new b.jpg']
    record = index.records(4)
    assert (record.width, record.height, record.bytes, record.mtime_ns) == (640, 480, 1005, 5)
    assert record.classes == (('tree', 0.75),) and len(record.sha256) == 64
    assert index.skipped == {'/pictures/bad\udcff.jpg': 'is empty'}
    assert len(index) == 120 and '120 images' in repr(index)
    with pytest.raises(IndexError):
        index.records(120)


def test_vectors_are_an_array(folder):
    vectors = Index.open(folder).vectors
    full = np.asarray(vectors)
    assert vectors.shape == full.shape == (120, 16) and not vectors.contiguous
    for key in (0, -1, slice(2, 5), slice(0, 10), slice(None, None, -7), [5, 2, 2], np.arange(120) % 3 == 0,
                slice(4, 4), (3, 2), (slice(1, 9), slice(2, 4)), ([1, 7], 0)):
        assert np.array_equal(vectors[key], full[key]), key
    assert np.array_equal(np.concatenate(list(vectors.chunks(7))), full)
    with pytest.raises(IndexError):
        vectors[120]


def test_uncommitted_is_gone(folder):
    before = everything(folder)
    writer = StoreWriter(Store(folder))
    writer.add([b'x'], Store(folder).records[:1], unit_vectors(1))
    writer.remove([0])
    writer.close()  # as a kill would
    assert everything(folder) == before
    writer = StoreWriter(Store(folder))
    add_images(writer, unit_vectors(1, seed=3), ['after.jpg'])
    writer.add([b'y'], Store(folder).records[:1], unit_vectors(1))
    writer.rollback()
    writer.commit()
    writer.close()
    index = Index.open(folder)
    assert index.paths == [*before[1], '/pictures/after.jpg']
    assert np.array_equal(index.vectors[-1], unit_vectors(1, seed=3)[0])


def test_growing_file_against_one_crc(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, 'BLOCK', 100)
    rng, path, data = np.random.default_rng(0), tmp_path / 'f', b''
    file = GrowingFile(path, Extent())
    for size in [1, 99, 100, 101, 350, 0, 7, 200]:
        piece = rng.bytes(size)
        file.append(piece)
        data += piece
        if size % 2:
            file.close()
            file = GrowingFile(path, file.extent)
    assert path.read_bytes() == data and file.extent == extent_of(path)
    reader = CheckedFile(path, file.extent)
    assert reader.view().tobytes() == data and reader.view(95, 205).tobytes() == data[95:205]
    with pytest.raises(DamagedIndex, match='asked for'):
        reader.view(0, len(data) + 1)
    with pytest.raises(ValueError, match='checksums'):
        Extent(101, (1,))


@pytest.mark.parametrize('kind', ['exact', 'hnsw', 'ivf-pq'])
def test_no_flipped_byte_goes_unnoticed(folder, tmp_path, kind):
    update_structure(folder, kind, progress=False)
    good = everything(folder)
    rng, noticed = np.random.default_rng(0), 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if not data:
            continue
        offsets = {0, 1, len(data) - 1, *rng.integers(len(data), size=30).tolist()}
        for offset in sorted(offsets if len(data) > 200 else range(len(data))):
            for flip in (1, 0x80):
                path.write_bytes(data[:offset] + bytes([data[offset] ^ flip]) + data[offset + 1:])
                with pytest.raises(DamagedIndex, match='damaged'):
                    everything(folder)
                noticed += 1
        path.write_bytes(data)
    assert noticed > 300 and everything(folder) == good


@pytest.mark.parametrize('damage', ['shorter', 'missing', 'longer', 'empty'])
def test_cut_and_missing_files(folder, damage):
    good = everything(folder)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if not data:
            continue
        if damage == 'missing':
            path.unlink()
        else:
            path.write_bytes({'shorter': data[:-1], 'longer': data + b'junk', 'empty': b''}[damage])
        if damage == 'longer' and path.name not in ('index.json', 'config.json'):
            assert everything(folder) == good  # what a killed writer leaves
        else:
            with pytest.raises((DamagedIndex, FileNotFoundError)):
                everything(folder)
        path.write_bytes(data)
    assert everything(folder) == good


def test_block_is_checked_when_touched(tmp_path):
    dim = 1024
    path = write_index(tmp_path / 'index', unit_vectors(1000, dim))
    assert (path / 'vectors.1.bin').stat().st_size > 3 * BLOCK
    with open(path / 'vectors.1.bin', 'r+b') as file:
        file.seek(2 * BLOCK + 5)
        byte = file.read(1)[0]
        file.seek(2 * BLOCK + 5)
        file.write(bytes([byte ^ 1]))
    index = Index.open(path)
    index.vectors[:256]
    for touch in (lambda: index.vectors[600], lambda: index.vectors[[1, 600]], lambda: index.vectors[500:700],
                  lambda: index.search(unit_vectors(1, dim)), lambda: np.asarray(index.vectors)):
        with pytest.raises(DamagedIndex, match=r'vectors\.1\.bin is damaged \(the checksum of block 2'):
            touch()


def test_newer_format_and_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_multigrain.index.manifest.FORMAT', 2)
    Manifest(1, 'x', {}).write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(NewerFormat, match=r'format 2.*update the package'):
        Manifest.read(tmp_path)
    with pytest.raises(FileNotFoundError, match='is not there: make one'):
        Index.open(tmp_path / 'nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='is no index'):
        Index.open(tmp_path / 'empty')


def test_compaction_keeps_all_that_holds(folder):
    before, open_index = everything(folder), Index.open(folder)
    compact(Store(folder))
    after = everything(folder)
    drop = ('path_offset', 'vector')
    a, b = (np.frombuffer(x[2], dtype=Index.open(folder).columns.dtype) for x in (before, after))
    assert all(np.array_equal(a[name], b[name]) for name in a.dtype.names if name not in drop)
    assert before[:2] == after[:2] and before[3] == after[3] and before[5:] == after[5:]
    assert np.array_equal(open_index.vectors, Index.open(folder).vectors) and len(Store(folder).all_records) == 120
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ['config.json', 'index.json', *(f'{name}.2.bin' for name in DATA_FILES)])


def test_leftovers_of_killed_writers_are_deleted(folder):
    for name in ('vectors.7.bin', 'faiss.3.bin', '.index.json-0123abcd', '.faiss.4.bin', 'mine.txt'):
        (folder / name).write_bytes(b'x')
    before = everything(folder)
    writer = StoreWriter(Store(folder))
    delete_leftovers(writer)
    writer.close()
    assert everything(folder) == before
    assert {p.name for p in folder.iterdir()} == {
        'config.json', 'index.json', 'mine.txt', *(f'{name}.1.bin' for name in DATA_FILES)}


@contextmanager
def forked(function, *args):
    """A process that runs a function, quicker than a new one; the other end of the pipe it is given, and its number."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            function(write, *args)
        finally:
            os._exit(0)
    os.close(write)
    with open(read, 'rb', buffering=0) as pipe:
        try:
            yield pipe, child
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def fill(pipe, folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    writer = StoreWriter(Store(folder))
    for i in range(1000):
        try:
            add_images(writer, unit_vectors(50, seed=i), [f'{i}-{j}' for j in range(50)])
        except NotWritten as e:
            os.write(pipe, f'{i} {e}'.encode())
            return


def test_full_disk(folder):
    with forked(fill, folder) as (pipe, _):
        batches, _, message = pipe.readall().decode().partition(' ')
    assert 'could not be written to (File too large): what was committed to it before is whole' in message
    index = Index.open(folder)
    index.store.check()
    assert len(index) == 120 + 50 * int(batches) and int(batches) > 5
    assert np.array_equal(index.vectors[-50:], unit_vectors(50, seed=int(batches) - 1))
    writer = StoreWriter(Store(folder))
    add_images(writer, unit_vectors(1), ['one more'])
    writer.close()
    assert Index.open(folder).paths[-1] == '/pictures/one more'


def test_failing_write_of_the_manifest(folder, monkeypatch):
    before = everything(folder)

    def fail(*_):
        raise OSError(28, 'No space left on device')
    writer = StoreWriter(Store(folder))
    monkeypatch.setattr('timm_multigrain.files.os.replace', fail)
    with pytest.raises(NotWritten, match='No space left'):
        add_images(writer, unit_vectors(3, seed=4), ['p', 'q', 'r'])
    writer.close()
    monkeypatch.undo()
    assert everything(folder) == before


def add_for_ever(pipe, folder):
    writer = StoreWriter(Store(folder))
    for i in range(10_000):
        add_images(writer, unit_vectors(20, seed=i), [f'{i}-{j}' for j in range(20)])
        os.write(pipe, b'.')


def test_kill_at_any_moment(tmp_path):
    rng, last = np.random.default_rng(0), 0
    for turn in range(25):
        path = write_index(tmp_path / f'index{turn}', unit_vectors(1, seed=99), ['first'])
        with forked(add_for_ever, path) as (pipe, child):
            pipe.read(1)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            committed = 1 + len(pipe.readall())
        index = Index.open(path)
        index.store.check()
        batches = (len(index) - 1) // 20
        assert len(index) == 1 + 20 * batches and committed <= batches <= committed + 1
        expected = np.concatenate([unit_vectors(20, seed=i) for i in range(batches)])
        assert np.array_equal(index.vectors[1:], expected)
        assert index.paths[1:] == [f'/pictures/{i}-{j}' for i in range(batches) for j in range(20)]
        last = max(last, batches)
    assert last > 1


def hold(pipe, folder):
    with index_lock(folder):
        os.write(pipe, b'held')
        time.sleep(60)


def test_one_writer(tmp_path):
    with forked(hold, tmp_path) as (pipe, _):
        assert pipe.read(4) == b'held'
        with pytest.raises(IndexInUse, match='another process'), index_lock(tmp_path):
            pass
    with index_lock(tmp_path), pytest.raises(IndexInUse, match='this process'), index_lock(tmp_path):
        pass
    with index_lock(tmp_path):
        pass
    assert (tmp_path / 'lock').read_bytes() == b''


def test_manifest_and_names_survive_json(tmp_path):
    manifest = Manifest(3, 'f' * 64, {'vectors': Extent(5, (1,))}, ('/a\udcff\n', '../x'), {
        'file': 'faiss.1.bin', 'kind': 'hnsw', 'rows': 1, 'extent': {'size': 0, 'crc32': ''},
        'settings': {'ef': 1, 'candidates': 9}})
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert json.loads((tmp_path / 'index.json').read_text())['format'] == 1


def test_index_moves_with_its_pictures(tmp_path):
    path = write_index(tmp_path / 'a' / 'index', unit_vectors(2), root='../pictures')
    assert Index.open(path).paths[0] == str(tmp_path / 'a' / 'pictures' / '0.jpg')
    shutil.move(tmp_path / 'a', tmp_path / 'b')
    assert Index.open(tmp_path / 'b' / 'index').paths[0] == str(tmp_path / 'b' / 'pictures' / '0.jpg')
