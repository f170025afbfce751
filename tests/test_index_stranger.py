"""An index that somebody else has made: nothing is written, deleted, fetched or run for what is in it."""
import json
import os
import random
import shutil
import socket
import sqlite3
from contextlib import closing, suppress

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.index import Index, OtherModel, build_index, store
from timm_multigrain.index.dedup import find_copies
from timm_multigrain.index.records import RECORD, REGION, DamagedIndex
from timm_multigrain.index.store import FILE

from .pictures import noise, write_noise
from .test_files import change_tree
from .tiny import tiny_model

REFUSALS = (ValueError, OSError, RuntimeError)  # what a command says in a sentence


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Pictures, an index of them with a structure and its model in it, and a picture that is not indexed yet."""
    base = tmp_path_factory.mktemp('stranger')
    write_noise(base / 'pictures', [f'{i}.png' for i in range(120)], (16, 16))
    (base / 'pictures' / 'broken.png').write_bytes(b'x')
    model = tiny_model()
    model.pretrained_cfg['label_names'] = ['boat', 'car', 'tree']
    build_index([base / 'pictures'], base / 'index', model, Protocol(32), workers=0, progress=False, kind='hnsw',
                boxes=lambda image: [(0, 0, 9, 9, 'part')], local=True)
    noise((16, 16), seed=1).save(base / 'pictures' / 'new.png')
    assert len(list((base / 'index').glob('faiss*'))) == 1
    return base


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / 'copy')
    return tmp_path / 'copy'


def use(base):
    """Read everything, search, look for copies, update; the sentences of what was refused."""
    refused = []

    def read():
        index = Index(base / 'index')
        index.store.check()
        index.search_images([base / 'pictures' / '0.png'], 2)
        index.search(np.asarray(index.vectors[:1]), 2, exact=True)
        return index.records(0), index.info, index.skipped

    for call in (read, lambda: find_copies(Index(base / 'index'), 0.99, look=False),
                 lambda: build_index([base / 'pictures'], base / 'index', workers=0, progress=False, kind='hnsw')):
        try:
            call()
        except REFUSALS as e:
            refused.append(str(e))
    return refused


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


@pytest.mark.parametrize('kind', ['link', 'link to other content', 'hard link', 'fifo'])
def test_links_in_place_of_the_files_are_neither_read_nor_written(made, tmp_path, kind):
    assert use(shutil.copytree(made, tmp_path / 'whole')) == []
    names = names_in(made / 'index')
    assert len(names) >= 6
    for i, name in enumerate(names):
        base, victim = tmp_path / str(i), tmp_path / f'{i}.victim'
        shutil.copytree(made, base)
        path = base / 'index' / name
        if kind == 'link to other content':
            victim.write_bytes(b'dear diary')
        else:
            shutil.copyfile(path, victim)
        content = victim.read_bytes()
        path.unlink()
        if kind == 'fifo':
            os.mkfifo(path)
        else:
            (os.link if kind == 'hard link' else os.symlink)(victim, path)
        refused = use(base)
        assert victim.read_bytes() == content, name
        assert kind == 'hard link' or name.startswith('model/README') or refused, name
        assert not any('\n' in sentence for sentence in refused)
        shutil.rmtree(base)


def test_a_folder_that_was_prepared_for_a_new_index(made, tmp_path):
    for i, name in enumerate([*names_in(made / 'index'), 'model', '.faiss.1.bin', f'.{FILE}-0123abcd',
                              *(f'{FILE}-{end}' for end in ('wal', 'shm', 'journal'))]):
        out, victim = tmp_path / str(i), tmp_path / f'{i}.victim'
        (out / name).parent.mkdir(parents=True)
        if name == 'model':
            victim.mkdir()
            (victim / 'config.json').write_text('mine')
        else:
            victim.write_text('mine')
        os.symlink(victim, out / name)
        try:
            build_index([made / 'pictures'], out, tiny_model(), Protocol(32), workers=0, progress=False, kind='hnsw')
        except REFUSALS as e:
            assert '\n' not in str(e)
        assert (victim / 'config.json' if name == 'model' else victim).read_text() == 'mine', name
        assert victim.is_file() or os.listdir(victim) == ['config.json']


def rewrite(folder, setting, change):
    """Change a setting and give it the checksum that belongs to it, as anybody can."""
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        value = json.loads(db.execute('SELECT value FROM settings WHERE name = ?', (setting,)).fetchone()[0])
        change(value)
        row = store._row('settings', setting, json.dumps(value))
        db.execute('REPLACE INTO settings VALUES (?, ?, ?)', row)


@pytest.mark.parametrize('number', ['../../mine', '../mine.txt', -1, 0, None, 2 ** 70])
@pytest.mark.parametrize('setting', ['faiss', 'generation'])
def test_no_path_in_an_index_is_written_or_deleted(copy, setting, number):
    mine = copy / 'mine.txt'
    mine.write_text('mine')
    rewrite(copy / 'index', 'state', lambda state: state.update(
        {'faiss': {**state['faiss'], 'number': number}} if setting == 'faiss' else {'generation': number}))
    with pytest.raises(DamagedIndex, match='is damaged'):
        build_index([copy / 'pictures'], copy / 'index', workers=0, progress=False, kind='exact')
    assert mine.read_text() == 'mine'


@pytest.mark.parametrize('statement', [
    "CREATE TRIGGER t AFTER DELETE ON images BEGIN DELETE FROM roots; END",
    "CREATE VIEW v AS SELECT 1",
    "DROP TABLE skipped; CREATE VIEW skipped AS SELECT id, path, '', 0, 0, 0 FROM images",
    "ALTER TABLE images ADD COLUMN x GENERATED ALWAYS AS (zeroblob(id))",
    'CREATE INDEX i ON images (path)'])
def test_tables_of_another_schema_are_refused(copy, statement):
    with closing(sqlite3.connect(copy / 'index' / FILE, isolation_level=None)) as db:
        db.executescript(statement)
    refused = use(copy)
    assert len(refused) == 3 and all('its tables are not those of an index' in sentence for sentence in refused)


@pytest.mark.parametrize('name', [f'{FILE}-journal', 'lock-journal'])
def test_a_journal_that_names_files_to_delete_is_not_followed(copy, name):
    mine = copy / 'mine.txt'
    mine.write_text('mine')
    text = str(mine).encode()
    header = b'\xd9\xd5\x05\xf9\x20\xa1\x63\xd7' + bytes(504)
    tail = (len(text).to_bytes(4, 'big') + (sum(text) & 0xffffffff).to_bytes(4, 'big')
            + b'\xd9\xd5\x05\xf9\x20\xa1\x63\xd7')
    (copy / 'index' / name).write_bytes(header + text + tail)
    refused = use(copy)
    assert len(refused) == 3 and all('it is not a file of an index' in sentence for sentence in refused)
    assert mine.read_text() == 'mine'


@pytest.mark.parametrize('source', [
    'hf-hub:somebody/model', 'https://example.org/model.pth', 'resnet50.a1_in1k', 'multigrain_resnet50', '\x1b[2J'])
def test_the_model_that_an_index_names_is_not_fetched(copy, monkeypatch, source):
    monkeypatch.setattr(socket.socket, 'connect', lambda *args: pytest.fail('the network was asked'))
    rewrite(copy / 'index', 'config', lambda value: value['model'].update(source=source))
    for call in (lambda: Index(copy / 'index').search_images([copy / 'pictures' / '0.png']),
                 lambda: build_index([copy / 'pictures'], copy / 'index', workers=0, progress=False)):
        with pytest.raises(OtherModel, match='which is not looked for') as e:
            call()
        assert '\x1b' not in str(e.value) and 'name it with --model' in str(e.value)


@pytest.mark.parametrize('options', [{'architecture': 'hf-hub:somebody/model'}, {'p': 'x'}, {'pool': []}])
def test_options_of_its_model_are_those_of_an_index(copy, monkeypatch, options):
    monkeypatch.setattr(socket.socket, 'connect', lambda *args: pytest.fail('the network was asked'))
    weights = str(copy / 'index' / 'model' / 'model.safetensors')
    rewrite(copy / 'index', 'config', lambda value: value['model'].update(source=weights, options=options))
    index = Index(copy / 'index')
    for call in (index.model, lambda: index.model(weights)):
        with pytest.raises(ValueError, match='options'):
            call()


def test_an_index_made_by_name_holds_its_model(made, tmp_path, monkeypatch):
    options = {'pool': 'gem', 'p': 4., 'pretrained': False}
    build_index([made / 'pictures'], tmp_path / 'index', 'test_resnet', Protocol(32), model_options=options, workers=0,
                progress=False)
    monkeypatch.setattr(socket.socket, 'connect', lambda *args: pytest.fail('the network was asked'))
    index = Index(tmp_path / 'index')
    query = made / 'pictures' / '3.png'
    assert index.search_images([query], 1)[0][0].path == str(query) and index.model().gem_p == 4


def test_names_are_printed_without_control_characters(copy, capsys):
    evil = '\x1b]0;title\x07\u202e'
    rewrite(copy / 'index', 'config', lambda value: value['model'].update(
        label_names=[evil + str(i) for i in range(3)], name=evil))
    assert main(['search', str(copy / 'index'), str(copy / 'pictures' / '0.png'), '-k', '3']) == 0
    out = capsys.readouterr().out
    assert '\\x1b]0;title\\x07\\u202e' in out and not [c for c in out if c != '\n' and not c.isprintable()]
    assert main(['search', str(copy / 'index'), str(copy / 'pictures' / '0.png'), '--class', evil]) == 2
    err = capsys.readouterr().err
    assert 'does not know the class' in err and not [c for c in err if c != '\n' and not c.isprintable()]


CELLS = [None, -1, 0, 1, 2 ** 31, 2 ** 62, -2 ** 63, 1.5, 1e300, '', 'x', '1', b'', b'x', b'a\0b', b'/', b'..',
         b'../..', bytes(RECORD.itemsize), b'\xff' * RECORD.itemsize, '\x1b[31m']


def mutate(folder, rng):
    """Something odd in the tables of an index, with the checksums that belong to it."""
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        table = ('settings', 'settings', 'roots', 'images', 'regions', 'skipped', 'local', 'chunks')[rng.integers(8)]
        rows = [list(row[:-1]) for row in db.execute(f'SELECT * FROM {table}')]
        row = rows[rng.integers(len(rows))]
        if table == 'settings':
            value = json.loads(row[1])
            row[1] = json.dumps(change_tree({'value': value}, random.Random(int(rng.integers(1 << 30)))).get('value'))
        elif table in ('images', 'regions') and rng.random() < 0.5:
            record = np.frombuffer(row[2], dtype=RECORD if table == 'images' else REGION).copy()
            name = record.dtype.names[rng.integers(len(record.dtype.names))]
            record[name] = np.frombuffer(rng.bytes(record[name].nbytes), dtype=record[name].dtype).reshape(
                record[name].shape) if rng.random() < 0.5 else 0
            row[2] = record.tobytes()
        else:
            row[rng.integers(len(row))] = CELLS[rng.integers(len(CELLS))]
        if rng.random() < 0.2:
            rows.remove(row)
        if rng.random() < 0.1:
            rows = []
        db.execute(f'DELETE FROM {table}')
        total = 0
        for row in rows:
            try:
                row = store._row(table, *row)
            except TypeError:  # of another type: nobody can give it a checksum that is right
                row = *row, 0
            with suppress(UnicodeEncodeError, sqlite3.IntegrityError):
                db.execute(f'REPLACE INTO {table} VALUES ({", ".join("?" * len(row))})', row)
                total += row[-1]
    if table != 'settings':
        rewrite(folder, 'state', lambda state: state['totals'].update({table: [len(rows), total]}))


def fuzz(copy, seeds):
    """Commands on indexes with something odd in them; how many were refused. Other errors come through."""
    shutil.rmtree(copy / 'pictures')
    (copy / 'pictures').mkdir()
    (copy / 'pictures' / 'broken.png').write_bytes(b'x')
    query = copy / 'query.png'
    Image.new('RGB', (9, 9)).save(query)
    original = copy.parent / 'original'
    shutil.copytree(copy / 'index', original)
    refused = 0
    for seed in seeds:
        shutil.rmtree(copy / 'index')
        shutil.copytree(original, copy / 'index')
        mutate(copy / 'index', np.random.default_rng(seed))
        index = str(copy / 'index')
        for arguments in (['search', index, str(query), '-k', '2', '--local', '2'],
                          ['search', index, str(query), '--json', '-', '--category', 'part'],
                          ['dedup', index, '--no-look', '--json', '-'], ['dedup', index, '--list', '-0', '--identical'],
                          ['index', '-o', index, '--remove-missing', '--workers', '0', '--list-skipped']):
            refused += main(arguments) == 2
    return refused


def test_odd_values_are_refused_in_a_sentence(copy, capfd, monkeypatch):
    model = tiny_model()  # opening it is no part of this, and takes most of the time
    for module in ('index', 'build'):
        monkeypatch.setattr(f'timm_multigrain.index.{module}.open_described', lambda *args: model)
    assert fuzz(copy, range(30)) > 20
    err = capfd.readouterr().err
    assert 'Traceback' not in err and not [c for c in err if c != '\n' and not c.isprintable()]
