"""The files of an index: what is committed is read back, what is not is gone, and no changed byte goes unnoticed."""
import os
import resource
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from timm_multigrain.index import DamagedIndex, Index, IndexInUse
from timm_multigrain.index import store as store_module
from timm_multigrain.index.ann import update_structure
from timm_multigrain.index.records import NewerFormat, NotWritten
from timm_multigrain.index.store import FILE, PCA, Store, Writer, index_lock, is_index
from timm_multigrain.search.rerank import alpha_query_expansion, database_augmentation

from .small_index import add_images, forked, unit_vectors, write_index, writer_of


def everything(folder):
    """All that an index says, and two searches."""
    index = Index(folder)
    index.store.check()
    scores, rows = index.search(unit_vectors(3, seed=9), 4)
    exact = index.search(unit_vectors(3, seed=9), 4, 'car', exact=True)
    return (np.asarray(index.vectors).tobytes(), index.paths, index.columns.tobytes(), index.skipped, index.info,
            [index.records(i) for i in range(len(index))], scores.tobytes(), rows.tobytes(), exact[1].tobytes(),
            index.store.details(index.store.local))


@pytest.fixture
def folder(tmp_path):
    """An index with removed images, a skipped file and names of all kinds."""
    path = write_index(tmp_path / 'index', unit_vectors(120), [f'{i}\n\udcff"é.jpg' for i in range(120)])
    with writer_of(path) as writer:
        writer.remove([3, 77])
        writer.skip(0, b'bad\xff.jpg', 'is empty', 0, 5)
        for key, length in ((PCA, 900), (b'a' * 32, 9000), (b'b' * 32, 5000), (b'c' * 32, 0)):
            writer.set_details(key, bytes(length))
        add_images(writer, unit_vectors(2, seed=1), ['new a.jpg', 'new b.jpg'])
    return path


def test_what_is_written_is_read(folder):
    index = Index(folder)
    kept = [i for i in range(120) if i not in (3, 77)]
    assert np.array_equal(index.vectors, np.concatenate([unit_vectors(120)[kept], unit_vectors(2, seed=1)]))
    old = [f'/pictures/{i}\n\udcff"é.jpg' for i in kept]
    assert index.paths == [*old, '/pictures/new a.jpg', '/pictures/new b.jpg']
    record = index.records(4)
    assert (record.width, record.height, record.bytes, record.mtime_ns) == (640, 480, 1005, 5)
    assert record.classes == (('tree', 0.75),) and len(record.sha256) == 64
    assert index.skipped == {'/pictures/bad\udcff.jpg': 'is empty'}
    assert len(index) == 120 and '120 images' in repr(index)
    assert is_index(folder) and not is_index(folder.parent)
    with pytest.raises(IndexError):
        index.records(120)


def test_vectors_are_an_array(folder):
    vectors = Index(folder).vectors
    full = np.asarray(vectors)
    assert vectors.shape == full.shape == (120, 16)
    for key in (0, -1, slice(2, 5), slice(0, 10), slice(None, None, -7), [5, 2, 2], np.arange(120) % 3 == 0,
                slice(4, 4)):
        assert np.array_equal(vectors[key], full[key]), key
    with pytest.raises(IndexError):
        vectors[120]


def test_expansion_and_augmentation(tmp_path):
    index, queries = Index(write_index(tmp_path / 'index', unit_vectors(90), dtype='float16')), unit_vectors(4, seed=1)
    queries.flags.writeable = False
    vectors = np.asarray(index.vectors, np.float32)
    cars, augmented = np.arange(1, 90, 3), database_augmentation(vectors, 3, 2.).numpy()
    for database, qe, dba in ((vectors, (2, 3.), None), (augmented, None, (3, 2.)), (augmented, (2, 3.), (3, 2.))):
        for rows, class_name in ((np.arange(90), None), (cars, 'car')):
            expanded = queries if qe is None else alpha_query_expansion(queries, database[rows], *qe)
            expected = np.asarray(expanded) @ database[rows].T
            scores, found = index.search(queries, 5, class_name, qe=qe, dba=dba)
            np.testing.assert_array_equal(found, rows[(-expected).argsort(1)[:, :5]])
            np.testing.assert_allclose(scores, -np.sort(-expected)[:, :5], atol=1e-6)
    assert np.array_equal(index.vectors, vectors)
    assert index.search(queries, 2, 'boat', qe=(99, 3.))[1].shape == (4, 2)
    with pytest.raises(ValueError, match='leave qe and dba out'):
        index.search(queries, qe=(2, 3.), rerank=2)
    for value in (np.nan, np.inf):
        wrong = queries.copy()
        wrong[1, 0] = value
        with pytest.raises(ValueError, match='descriptors hold NaN or infinity'):
            index.search(wrong)


def test_uncommitted_is_gone(folder):
    before = everything(folder)
    with writer_of(folder) as writer:
        writer.set_details(b'd' * 32, b'details')
        writer.set_details(b'a' * 32, None)
        writer.add([b'x'], Store(folder).records[:1].copy(), unit_vectors(1))
        writer.remove([0])
        assert everything(folder) == before  # and nobody sees it meanwhile
    assert everything(folder) == before
    with writer_of(folder) as writer:
        add_images(writer, unit_vectors(1, seed=3), ['after.jpg'])
    index = Index(folder)
    assert index.paths == [*before[1], '/pictures/after.jpg']
    assert np.array_equal(index.vectors[-1], unit_vectors(1, seed=3)[0])


@pytest.mark.parametrize('kind', ['hnsw', 'ivf-pq'])
def test_no_flipped_byte_gives_another_answer(folder, kind):
    pytest.importorskip('faiss.contrib.torch_utils')  # puts another search in place of faiss' own
    with writer_of(folder) as writer:
        update_structure(writer, kind, progress=False)
    good, rng, noticed, unnoticed = everything(folder), np.random.default_rng(0), 0, 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for offset in sorted({0, 1, *rng.integers(len(data), size=60).tolist()} if data else ()):
            path.write_bytes(data[:offset] + bytes([data[offset] ^ (1 << rng.integers(8))]) + data[offset + 1:])
            try:
                assert everything(folder) == good, (path.name, offset)
                unnoticed += 1  # of a page that is not used
            except (DamagedIndex, NewerFormat):
                noticed += 1
        path.write_bytes(data)
    assert noticed > unnoticed and everything(folder) == good


def test_a_log_with_a_flipped_byte_is_the_commit_or_the_one_before(tmp_path):
    path = write_index(tmp_path / 'index', unit_vectors(3))
    before = everything(path)
    with writer_of(path) as writer, closing(sqlite3.connect(path / FILE, isolation_level=None)) as reader:
        writer.add([b'x'], Store(path).records[:1].copy(), unit_vectors(1))
        reader.execute('BEGIN')
        reader.execute('SELECT * FROM roots').fetchall()  # who reads the last commit keeps the next one in the log
        writer.commit()
        after = everything(path)
        shutil.copytree(path, tmp_path / 'killed')
    assert everything(tmp_path / 'killed')[:4] == after[:4]
    log = tmp_path / 'killed' / f'{FILE}-wal'
    data, rng = log.read_bytes(), np.random.default_rng(0)
    assert len(data) > 4096 and after != before
    for offset in rng.integers(len(data), size=60).tolist():
        log.write_bytes(data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1:])
        (tmp_path / 'killed' / f'{FILE}-shm').unlink(missing_ok=True)
        found = everything(tmp_path / 'killed')
        assert found[:4] in (before[:4], after[:4])


@pytest.mark.parametrize('damage', ['shorter', 'missing', 'longer', 'empty'])
def test_cut_and_missing_files(folder, damage):
    good = everything(folder)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if damage == 'missing':
            path.unlink()
        else:
            path.write_bytes({'shorter': data[:-1], 'longer': data + b'junk', 'empty': b''}[damage])
        if damage == 'longer':  # what a killed writer leaves
            assert everything(folder) == good
        else:
            with pytest.raises((DamagedIndex, FileNotFoundError)):
                everything(folder)
        path.write_bytes(data)
    assert everything(folder) == good


def test_a_chunk_is_checked_when_it_is_touched(tmp_path):
    dim = 1024
    path = write_index(tmp_path / 'index', unit_vectors(1000, dim))  # 256 rows a chunk
    with open(path / 'vectors.1.bin', 'r+b') as file:
        file.seek(2 * store_module.CHUNK + 5)
        file.write(b'?')
    index = Index(path)
    index.vectors[:512], index.vectors[[1, 800]]
    for touch in (lambda: index.vectors[600], lambda: index.vectors[[1, 600]], lambda: index.vectors[500:700],
                  lambda: index.search(unit_vectors(1, dim)), lambda: np.asarray(index.vectors)):
        with pytest.raises(DamagedIndex, match=r'vectors\.1\.bin is damaged \(the checksum of rows 512 to 767'):
            touch()


def test_other_formats_and_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, 'FORMAT', 9)
    folder = write_index(tmp_path / 'index', unit_vectors(1))
    monkeypatch.undo()
    with pytest.raises(NewerFormat, match=r'format 9.*update the package'):
        Index(folder)
    with pytest.raises(FileNotFoundError, match='was not found: make one'):
        Index(tmp_path / 'nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='is not an index'):
        Index(tmp_path / 'empty')


def test_compaction_keeps_all_that_is_left(folder):
    with writer_of(folder) as writer:
        writer.remove(range(0, 60, 2))
        writer.commit()
        update_structure(writer, 'exact')
        before, open_index = everything(folder), Index(folder)
        writer.compact_if_worthwhile()
        add_images(writer, unit_vectors(1, seed=5), ['later.jpg'])
        writer.remove([122])
        writer.commit()
    after = everything(folder)
    assert before[:2] == after[:2] and before[3] == after[3] and before[5:] == after[5:]
    assert np.array_equal(open_index.vectors, Index(folder).vectors)
    assert sorted(os.listdir(folder)) == [FILE, 'vectors.2.bin']
    assert (folder / 'vectors.2.bin').stat().st_size == 4 * 16 * (len(open_index) + 1)


def test_leftovers_of_killed_writers_are_deleted(folder):
    for name in ('vectors.7.bin', 'faiss.3.bin', f'.{FILE}-0123abcd', '.faiss.4.bin', 'mine.txt', 'vectors.txt'):
        (folder / name).write_bytes(b'x')
    before = everything(folder)
    with writer_of(folder):
        pass
    assert everything(folder) == before
    assert sorted(os.listdir(folder)) == [FILE, 'mine.txt', 'vectors.1.bin', 'vectors.txt']


def test_a_folder_that_nobody_can_write_to(folder):
    before = everything(folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & 0o555)
    names, times = sorted(os.listdir(folder)), [p.stat().st_mtime_ns for p in folder.iterdir()]
    try:
        assert everything(folder) == before
        assert sorted(os.listdir(folder)) == names and [p.stat().st_mtime_ns for p in folder.iterdir()] == times
    finally:
        for path in (folder, *folder.iterdir()):
            path.chmod(path.stat().st_mode | 0o200)


def fill(pipe, folder, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    writer = Writer(Store(folder))
    for i in range(1000):
        try:
            add_images(writer, unit_vectors(50, dim=16, seed=i), [f'{i}-{j}' for j in range(50)])
        except NotWritten as e:
            os.write(pipe, f'{i} {e}'.encode())
            return


@pytest.mark.parametrize('limit', [60_000, 131_072])  # of a file: the vectors reach it first, or the tables do
def test_full_disk(folder, limit):
    if limit > 100_000:
        with writer_of(folder) as writer:
            for i in range(300):  # not images: the tables alone grow
                writer.skip(0, b'%d' % i, 'x' * 300, 0, 0)
            writer.commit()
    with forked(fill, folder, limit) as (pipe, _):
        batches, _, message = pipe.readall().decode().partition(' ')
    assert 'could not be written to (' in message and 'what was committed to it before is whole' in message
    index = Index(folder)
    index.store.check()
    assert len(index) == 120 + 50 * int(batches)
    if int(batches):
        assert np.array_equal(index.vectors[-50:], unit_vectors(50, seed=int(batches) - 1))
    with writer_of(folder) as writer:
        add_images(writer, unit_vectors(1), ['one more'])
    assert Index(folder).paths[-1] == '/pictures/one more'


def add_for_ever(pipe, folder):
    writer = Writer(Store(folder))
    for i in range(10_000):
        add_images(writer, unit_vectors(20, seed=i), [f'{i}-{j}' for j in range(20)])
        os.write(pipe, b'.')


def test_kill_at_any_moment(tmp_path):
    rng, last = np.random.default_rng(0), 0
    for turn in range(12):
        path = write_index(tmp_path / f'index{turn}', unit_vectors(1, seed=99), ['first'])
        with forked(add_for_ever, path) as (pipe, child):
            pipe.read(1)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            committed = 1 + len(pipe.readall())
        index = Index(path)
        index.store.check()
        batches = (len(index) - 1) // 20
        assert len(index) == 1 + 20 * batches and committed <= batches <= committed + 1
        expected = np.concatenate([unit_vectors(20, seed=i) for i in range(batches)])
        assert np.array_equal(index.vectors[1:], expected)
        assert index.paths[1:] == [f'/pictures/{i}-{j}' for i in range(batches) for j in range(20)]
        last = max(last, batches)
    assert last > 1


def test_search_while_it_is_written_to(tmp_path):
    path = write_index(tmp_path / 'index', unit_vectors(1, seed=99), ['first'])
    stop, seen = threading.Event(), []

    def write():
        with writer_of(path) as writer:
            i = 0
            while not stop.is_set():
                add_images(writer, unit_vectors(20, seed=i), [f'{i}-{j}' for j in range(20)])
                i += 1
    thread = threading.Thread(target=write)
    thread.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            index = Index(path)
            seen.append(len(index))
            assert index.search(unit_vectors(1, seed=99), 1)[1] == [[0]] and (len(index) - 1) % 20 == 0
    finally:
        stop.set()
        thread.join()
    assert len(set(seen)) > 3 and seen == sorted(seen)


def hold(pipe, folder):
    with index_lock(folder):
        os.write(pipe, b'held')
        time.sleep(60)


def test_one_writer(tmp_path):
    with forked(hold, tmp_path) as (pipe, _):
        assert pipe.read(4) == b'held'
        with pytest.raises(IndexInUse, match='another process'), index_lock(tmp_path):
            pass
    with index_lock(tmp_path), pytest.raises(IndexInUse), index_lock(tmp_path):
        pass
    with index_lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == ['lock'] and (tmp_path / 'lock').read_bytes() == b''


def test_index_moves_with_its_pictures(tmp_path):
    path = write_index(tmp_path / 'a' / 'index', unit_vectors(2), root='../pictures')
    assert Index(path).paths[0] == str(tmp_path / 'a' / 'pictures' / '0.jpg')
    shutil.move(tmp_path / 'a', tmp_path / 'b')
    assert Index(tmp_path / 'b' / 'index').paths[0] == str(tmp_path / 'b' / 'pictures' / '0.jpg')
