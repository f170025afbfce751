"""Export to Milvus and search there, with milvus-lite; export to Parquet: every value comes back, only changes go."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.index import Index, OtherModel, export
from timm_multigrain.index.ann import update_structure
from timm_multigrain.index.export import (
    METADATA,
    MilvusIndex,
    export_index,
    export_milvus,
    export_parquet,
    parse_address,
    path_from_text,
    path_to_text,
)
from timm_multigrain.index.model import protocol_from_json

from .copies_folder import make_index, make_pictures
from .small_index import CLASSES, add_images, unit_vectors, write_index, writer_of

pytest.importorskip('pymilvus')
pytest.importorskip('milvus_lite')
pq = pytest.importorskip('pyarrow.parquet')

NAMES = ['a\nb.jpg', 'é/日本.jpg', 'not \udcff utf-8.jpg', 'bytes:%20.jpg', '"quotes\'.jpg']


@pytest.fixture
def index(tmp_path):
    paths = [*NAMES, *(f'{i}.jpg' for i in range(150 - len(NAMES)))]
    return Index(write_index(tmp_path / 'index', unit_vectors(150), paths))


@pytest.fixture
def address(tmp_path):
    return f'milvus:{tmp_path / "photos.db"}'


def test_addresses():
    for text, parts in {
            'milvus:a.db': ('a.db', 'multigrain'), 'milvus:/x/a b.db#photos_2': ('/x/a b.db', 'photos_2'),
            'milvus:https://host:19530/base#c': ('https://host:19530/base', 'c')}.items():
        assert parse_address(text) == parts
    for text in ('milvus:', 'milvus:folder', 'a.db', 'milvus:a.db#1x', 'milvus:a.db#a b'):
        with pytest.raises(ValueError, match=r'give milvus:|take letters'):
            parse_address(text)


def test_paths_as_text():
    for path in (*NAMES, '', 'bytes:', '\udc80\udcff', '/a/b c%41.jpg'):
        text = path_to_text(path)
        assert path_from_text(text) == path and isinstance(text.encode('utf-8'), bytes)
        assert path not in NAMES[:2] or text == path


def test_same_neighbours(index, address):
    done = export_milvus(index, address, batch_size=64, progress=False)
    assert (done.written, done.unchanged, done.removed, done.others) == (150, 0, 0, 0) and '150' in str(done)
    there = MilvusIndex(address)
    assert len(there) == 150 and there.config['model']['label_names'] == CLASSES
    queries = np.concatenate([unit_vectors(20, seed=5), index.vectors[:len(NAMES)]])
    for class_name in (None, 'car'):
        scores, rows = index.search(queries, 7, class_name)
        for found, own_scores, own_rows in zip(there.hits(queries, 7, class_name), scores, rows, strict=True):
            assert [hit.path for hit in found] == [index.path_of(row) for row in own_rows]
            assert [hit.record for hit in found] == [index.records(row) for row in own_rows]
            assert np.abs(np.array([hit.score for hit in found]) - own_scores).max() < 1e-6
    for bad, options in ((queries[:, :5], {}), (queries, {'k': 0}), (queries, {'class_name': 'ship'})):
        with pytest.raises(ValueError, match=r"shape|k is 0|does not know the class 'ship'"):
            there.hits(bad, **options)
    with pytest.raises(ValueError, match='not re-ranked: leave dba out'):
        there.hits(queries, category=None, dba=(3, 3.))
    there.client.close()


def test_hnsw_finds_nearly_the_same(tmp_path):
    """Of a collection in clusters, as descriptors lie, with equal ones among them."""
    vectors = np.repeat(unit_vectors(50, dim=512), 40, axis=0) + 0.8 * unit_vectors(2000, dim=512, seed=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[-20:] = vectors[:20]
    folder = write_index(tmp_path / 'index', vectors, [f'{i:04}.jpg' for i in range(2000)])
    queries = vectors[::100] + 0.3 * unit_vectors(20, dim=512, seed=2)
    exact = Index(folder).search(queries, 10)[1]
    with writer_of(folder) as writer:
        update_structure(writer, 'hnsw', progress=False)
    index = Index(folder)
    assert index.structure and np.mean(index.search(queries, 10)[1] == exact) > 0.95


def test_exporting_again_sends_what_has_changed(index, address):
    export_milvus(index, address, progress=False)
    again = export_milvus(index, address, progress=False)
    assert (again.written, again.unchanged) == (0, 150)
    with writer_of(index.path) as writer:
        writer.remove([0, 9])
        add_images(writer, unit_vectors(3, seed=3), ['0.jpg.new', 'n1.jpg', 'n2.jpg'])
    changed = Index(index.path)
    third = export_milvus(changed, address, progress=False)
    assert (third.written, third.unchanged, third.others) == (3, 148, 2) and 'not in this index' in str(third)
    mirrored = export_milvus(changed, address, mirror=True, progress=False)
    assert (mirrored.written, mirrored.removed, mirrored.others) == (0, 2, 0)
    there = MilvusIndex(address)
    assert len(there) == len(changed)
    found = there.hits(index.vectors[:1], 1)[0]
    assert found[0].path != index.path_of(0)
    there.client.close()


def test_other_models_and_collections_are_refused(index, address, tmp_path):
    from pymilvus import MilvusClient

    export_milvus(index, address, progress=False)
    narrower = Index(write_index(tmp_path / 'other', unit_vectors(5, dim=8)))
    with pytest.raises(OtherModel, match='dim: 16, here 8'):
        export_milvus(narrower, address, progress=False)
    export_milvus(narrower, f'{address}#other', progress=False)
    assert len(MilvusIndex(f'{address}#other')) == 5
    with pytest.raises(FileNotFoundError, match=r'does not have a collection third \(it has: multigrain, other\)'):
        MilvusIndex(f'{address}#third')
    client = MilvusClient(address.removeprefix('milvus:'))
    client.create_collection('foreign', dimension=16)
    client.close()
    for use in (MilvusIndex, lambda a: export_milvus(index, a, progress=False)):
        with pytest.raises(ValueError, match='was not made by timm-multigrain export'):
            use(f'{address}#foreign')
    assert len(MilvusIndex(address)) == 150


def test_a_preprocessing_that_nobody_means():
    there = Protocol(64).to_dict()
    assert protocol_from_json(there) == Protocol(64)
    for odd in ({'flip': 'x' * 9}, {'flip': 10 ** 18}, {'exif': []}, {'mean': [0.5]}, {'size': '64'},
                {'scales': [10 ** 400]}):
        with pytest.raises(ValueError, match='The preprocessing of the index cannot be used'):
            protocol_from_json({**there, **odd})


def test_what_cannot_be_reached(index, tmp_path):
    with pytest.raises(FileNotFoundError, match='was not found'):
        MilvusIndex(f'milvus:{tmp_path}/none.db')
    with pytest.raises(FileNotFoundError, match='was not found'):
        export_milvus(index, f'milvus:{tmp_path}/none/a.db', progress=False)
    with pytest.raises(RuntimeError, match=r'127\.0\.0\.1:9 could not be opened .*check the address'):
        MilvusIndex('milvus:http://127.0.0.1:9')
    with pytest.raises(ValueError, match=r'ends in \.parquet'):
        export_index(index.path, 'photos.csv')


@pytest.mark.slow
def test_a_killed_export_goes_on(tmp_path, address):
    folder = write_index(tmp_path / 'index', unit_vectors(5_000, dim=64))
    database = Path(address.removeprefix('milvus:'))
    command = [sys.executable, '-m', 'timm_multigrain', 'export', str(folder), '-o', address, '--batch-size', '50']
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and sum(
                os.path.getsize(path) for path in database.rglob('*') if os.path.exists(path)) < 200_000:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done = export_index(folder, address, progress=False)
    assert done.written + done.unchanged == 5_000 and done.others == 0
    queries = unit_vectors(5, dim=64, seed=8)
    _, rows = Index(folder).search(queries, 5)
    assert [[hit.path for hit in part] for part in MilvusIndex(address).hits(queries, 5)] == [
        [f'/pictures/{row}.jpg' for row in part] for part in rows.tolist()]


def test_commands(tmp_path, address, capfd):
    pictures = make_pictures(tmp_path / 'pictures', 6)
    index = make_index(pictures, tmp_path / 'index')
    assert main(['export', str(index.path), '-o', f'{address}#mine']) == 0
    assert '9 images written' in capfd.readouterr().out
    answers = []
    for where in (str(index.path), f'{address}#mine'):
        assert main(['search', where, str(pictures / '3.png'), '-k', '4', '--json', '-', '--exact']) == 0
        answers.append(json.loads(capfd.readouterr().out))
    own, theirs = answers
    assert [line['path'] for line in own] == [line['path'] for line in theirs] and len(own) == 4
    assert main(['search', f'{address}#none', str(pictures / '3.png')]) == 2
    assert 'does not have a collection none' in capfd.readouterr().err


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_everything_comes_back(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(export, 'ROWS', 16)
    names = ['a\nb.jpg', 'not \udcff utf-8.jpg', *(f'{i}.jpg' for i in range(48))]
    index = Index(write_index(tmp_path / 'index', unit_vectors(50), names, dtype=dtype))
    done = export_parquet(index, tmp_path / 'new' / 'photos.parquet', progress=False)
    assert (done.written, done.unchanged) == (50, 0) and '50 images' in str(done)
    file = pq.ParquetFile(done.target)
    assert file.num_row_groups == 4
    table = file.read().to_pydict()
    assert np.array_equal(np.array(table['vector'], dtype=np.float32), np.asarray(index.vectors, dtype=np.float32))
    for row in range(50):
        record = index.records(row)
        assert path_from_text(table['path'][row]) == record.path
        for name in ('width', 'height', 'bytes', 'mtime_ns', 'sha256'):
            assert table[name][row] == getattr(record, name)
        assert [(c['name'], pytest.approx(c['probability'])) for c in table['classes'][row]] == list(record.classes)
    about = json.loads(file.schema_arrow.metadata[METADATA])
    assert about['config']['model']['dim'] == 16
    assert os.listdir(tmp_path / 'new') == ['photos.parquet']


def test_what_is_up_to_date_is_left_alone(tmp_path):
    index = write_index(tmp_path / 'index', unit_vectors(5))
    path = tmp_path / 'photos.parquet'
    export_index(index, str(path), progress=False)
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert export_index(index, str(path), progress=False).unchanged
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    path.write_bytes(path.read_bytes()[:-100])
    assert not export_index(index, str(path), progress=False).unchanged
    write_index(tmp_path / 'other', unit_vectors(5, seed=1))
    assert not export_index(tmp_path / 'other', str(path), progress=False).unchanged
    assert np.allclose(pq.read_table(path)['vector'].to_pylist(), unit_vectors(5, seed=1))
