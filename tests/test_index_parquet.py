"""Export to Parquet: every value comes back, the file appears whole, and one that is up to date is left alone."""
import json
import os

import numpy as np
import pytest

from timm_multigrain.index import Index, export
from timm_multigrain.index.export import METADATA, export_index, export_parquet
from timm_multigrain.index.records import path_from_text

from .small_index import unit_vectors, write_index

pq = pytest.importorskip('pyarrow.parquet')


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_everything_comes_back(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(export, 'ROWS', 16)
    names = ['a\nb.jpg', 'not \udcff utf-8.jpg', *(f'{i}.jpg' for i in range(48))]
    index = Index.open(write_index(tmp_path / 'index', unit_vectors(50), names, dtype=dtype))
    done = export_parquet(index, tmp_path / 'new' / 'photos.parquet', progress=False)
    assert (done.images, done.unchanged) == (50, False) and '50 images' in str(done)
    file = pq.ParquetFile(done.path)
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


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    index = Index.open(write_index(tmp_path / 'index', unit_vectors(5)))
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, 'write_table', lambda *a: (_ for _ in ()).throw(OSError('no room')))
        with pytest.raises(OSError, match=r'no room.*free space'):
            export_parquet(index, tmp_path / 'a.parquet', progress=False)
    assert sorted(os.listdir(tmp_path)) == ['index']
