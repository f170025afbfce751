"""The app as a Space: the folder stands on its own and gives nothing away, and is published, replaced, or undone."""
import json
import os
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.collection import Index
from timm_multigrain.collection.space import MARK, publish_space, write_space

from .copies_folder import make_index, make_pictures
from .hub_server import Fault
from .test_app import free_port

pytest.importorskip('gradio')
NAMES = ['../up.png', 'a/b.png', 'x\n<y>\udcff.png']


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp('space') / 'pictures of mine', 5)
    (folder / 'a').mkdir()
    for name in NAMES[1:]:
        image = Image.effect_noise((900, 700), 60).convert('RGB')
        exif = image.getexif()
        exif[0x010e] = 'a secret description'
        image.save(folder / name, exif=exif)
    return make_index(folder, folder.parent / 'index')


@pytest.fixture(scope='module')
def space(index, tmp_path_factory):
    return write_space(index, tmp_path_factory.mktemp('written') / 'space', title='Mine: "all" <b>\n of them')


def test_folder(index, space):
    assert {path.name for path in space.iterdir()} == {
        'README.md', 'app.py', 'index', 'pictures.zip', 'requirements.txt', 'timm_multigrain'}
    head = yaml.safe_load((space / 'README.md').read_text().split('---')[1])
    assert head['sdk'] == 'gradio' and head['app_file'] == 'app.py' and head['title'].startswith('Mine: "all" <b>')
    assert head['sdk_version'] and MARK in head['tags']
    compile((space / 'app.py').read_text(), 'app.py', 'exec')
    needed = (space / 'requirements.txt').read_text()
    assert 'timm>=' in needed and 'extra' not in needed.replace('--extra-index-url', '') and 'pytest' not in needed
    with zipfile.ZipFile(space / 'pictures.zip') as file:
        assert len(file.namelist()) == len(index)
        for name in file.namelist():
            assert not name.startswith('/') and '..' not in name.split('/')
            picture = Image.open(file.open(name))
            assert max(picture.size) <= 640 and not picture.getexif()
    everything = b''.join(path.read_bytes() for path in space.rglob('*') if path.is_file())
    assert b'secret description' not in everything and os.fsencode(index.path.parent) not in everything


def test_its_index_answers_the_same(index, space):
    copy = Index.open(space / 'index')
    assert len(copy) == len(index) and np.array_equal(copy.vectors, index.vectors)
    for row in range(len(index)):
        own, there = index.records(row), copy.records(row)
        assert (own.sha256, own.width, own.classes) == (there.sha256, there.width, there.classes)
        assert Path(there.path).is_relative_to(space / 'pictures')
    path = index.path_of(0)
    assert [hit.score for hit in copy.search_images([path], 3)[0]] == [
        hit.score for hit in index.search_images([path], 3)[0]]
    assert copy.label_names == ['boat', 'car', '<b>tree</b>']


def test_other_folders_are_left_alone(index, space, tmp_path):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'letter.txt').write_text('dear')
    with pytest.raises(FileExistsError, match='is no Space that was written before'):
        write_space(index, tmp_path / 'other')
    (tmp_path / 'readme').mkdir()
    (tmp_path / 'readme' / 'README.md').write_text('of something else')
    with pytest.raises(FileExistsError, match='name another folder'):
        write_space(index, tmp_path / 'readme')
    config = (space / 'index' / 'config.json').read_bytes()
    assert write_space(index, space, title='again') == space
    assert (space / 'index' / 'config.json').read_bytes() == config


@pytest.mark.slow
def test_it_runs_as_a_space_does(space, tmp_path):
    port = free_port()
    env = {**os.environ, 'GRADIO_SERVER_PORT': str(port), 'GRADIO_SERVER_NAME': '127.0.0.1', 'PYTHONPATH': '',
           'OMP_NUM_THREADS': '1'}
    with open(tmp_path / 'log', 'wb') as log:
        process = subprocess.Popen([sys.executable, 'app.py'], cwd=space, env=env, stdout=log, stderr=log)
    try:
        config = wait_for(f'http://127.0.0.1:{port}/config', process)
        assert config['analytics_enabled'] is False
        assert (space / 'pictures').is_dir()
    finally:
        process.kill()
        process.wait()


def wait_for(url, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.3)
    return pytest.fail(f'{url} does not answer')


def test_publish(hub, space, index, tmp_path):
    url = publish_space(space, 'photos')
    repo = hub.repos['me/photos']
    assert url == f'{hub.endpoint}/spaces/me/photos' and repo.private and repo.sdk == 'gradio'
    files = repo.files()
    assert files['app.py'] == (space / 'app.py').read_bytes() and 'timm_multigrain/__init__.py' in files
    assert files['pictures.zip'] == (space / 'pictures.zip').read_bytes() and not any('__pycache__' in n for n in files)
    repo.commit('main', {**repo.commits[repo.refs['main']], 'index/old.bin': (b'', False), 'mine.txt': (b'', False)})
    assert publish_space(space, 'me/photos') == url
    assert 'index/old.bin' not in repo.files() and 'mine.txt' in repo.files()


def test_publish_refuses(hub, space, tmp_path):
    with pytest.raises(ValueError, match='is no folder of a Space'):
        publish_space(tmp_path, 'me/photos')
    hub.add_repo('me/other', {'app.py': b'', 'README.md': b'mine'})
    with pytest.raises(ValueError, match='is another app'):
        publish_space(space, 'me/other')
    publish_space(space, 'me/open', private=False)
    assert not hub.repos['me/open'].private
    with pytest.raises(ValueError, match='everybody would see the pictures'):
        publish_space(space, 'me/open')
    publish_space(space, 'me/open', private=False)


def test_a_failed_upload_leaves_no_space(hub, space):
    hub.faults.append(Fault('POST', '/commit/', status=500))
    with pytest.raises(RuntimeError, match='the Hub has trouble'):
        publish_space(space, 'me/photos')
    assert 'me/photos' not in hub.repos


def test_commands(hub, index, tmp_path, capsys):
    assert main(['app', str(index.path), '--space', str(tmp_path / 'space'), '--title', 'Mine']) == 0
    assert 'is ready' in capsys.readouterr().out
    assert main(['publish', str(tmp_path / 'space'), 'me/mine', '--space']) == 0
    assert f'Published {hub.endpoint}/spaces/me/mine' in capsys.readouterr().out and hub.repos['me/mine'].private
