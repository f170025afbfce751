"""Extraction into a folder: the same for any number of processes and interruptions, damage, other settings."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import DamagedShard, Descriptors, iter_shards, shard_path
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.sources import find_images

from .tiny import tiny_model

COUNT = 23
FLAGS = ['--size', '48', '--protocol', 'longer-side', '--shard-size', '4', '--workers', '0', '--device', 'cpu']
PROTOCOL = Protocol.for_model(tiny_model(), size=48, kind='longer-side')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        shape = ((40, 30, 3), (30, 40, 3), (40, 40, 3))[i % 3]
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / f'{i:02d}.png')
    (root / '07.png').write_bytes(b'broken')
    os.rename(root / '11.png', os.fsencode(root) + b'/caf\xe9\n11.png')
    return root


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    return save_pretrained(tiny_model(), tmp_path_factory.mktemp('model') / 'model')


@pytest.fixture(scope='module')
def reference(tmp_path_factory, images):
    """The folder that an uninterrupted process writes."""
    folder = tmp_path_factory.mktemp('reference') / 'out'
    embed(images, folder)
    return folder


def embed(images, folder, model=None, protocol=PROTOCOL, **kwargs):
    return extract(model or tiny_model(), find_images(images), protocol, folder,
                   **{'shard_size': 4, 'workers': 0, **kwargs})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(folder, reference):
    """The same images with the same descriptors, and no other files."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in reference.iterdir())
    found, expected = Descriptors.load(folder), Descriptors.load(reference)
    assert (found.names, found.skipped, found.info) == (expected.names, expected.skipped, expected.info)
    torch.testing.assert_close(found.vectors, expected.vectors, atol=1e-5, rtol=0)


def environment(**kwargs):
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path), **kwargs}


def test_folder_equals_memory(images, reference):
    in_memory = embed(images, None, shard_size=4)
    read = Descriptors.load(reference)
    assert read.names == in_memory.names and torch.equal(read.vectors, in_memory.vectors) and len(read) == COUNT - 1
    assert read.skipped == in_memory.skipped and list(read.skipped) == ['07.png']
    assert read.info['protocol'] == PROTOCOL.to_dict() and read.info['shards'] == 6
    shards = list(iter_shards(reference))
    assert [len(names) for names, _ in shards] == [4, 3, 4, 4, 4, 3]
    assert sum((names for names, _ in shards), ()) == read.names
    assert torch.equal(torch.cat([vectors for _, vectors in shards]), read.vectors)
    assert sorted(contents(reference)) == ['manifest.json', *(f'shard-{i:05d}.safetensors' for i in range(6))]


def test_missing_and_damaged_shards_are_made_again(tmp_path, images, reference):
    embed(images, tmp_path / 'out', batch_size=3, workers=1)
    assert_same(tmp_path / 'out', reference)
    whole = contents(reference)
    shard_path(tmp_path / 'out', 1).unlink()
    (tmp_path / 'out' / '.shard-00005.safetensors-0badcafe').write_bytes(b'left by a killed process')
    damaged = shard_path(tmp_path / 'out', 3)
    for data in (b'', whole[damaged.name][:-1], whole[damaged.name][:-9] + b'x' + whole[damaged.name][-8:],
                 whole['shard-00002.safetensors']):
        damaged.write_bytes(data)
        with pytest.raises(DamagedShard, match='run the same extraction again'):
            list(iter_shards(tmp_path / 'out'))
        embed(images, tmp_path / 'out')
        assert_same(tmp_path / 'out', reference)
    damaged.write_bytes(b'')
    with pytest.raises(ValueError, match=r'shard-00003\.safetensors cannot be read'):
        Descriptors.load(tmp_path / 'out')
    before = {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}
    embed(images, reference)  # whole: only read
    assert before == {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}


def test_other_settings_are_refused(tmp_path, images, reference):
    before = contents(reference)
    other = tiny_model(1)
    for kwargs, message in (
            (dict(model=other), 'of another extraction .*weights_sha256'),
            (dict(protocol=Protocol(48)), r"protocol kind 'longer-side', now 'crop'"),
            (dict(descriptor=False), 'settings descriptor True, now False'),
            (dict(dtype=torch.bfloat16), "settings dtype 'float32', now 'bfloat16'"),
            (dict(shard_size=5), 'shard_size 4, now 5')):
        with pytest.raises(ValueError, match=message):
            embed(images, reference, **kwargs)
    manifest = json.loads((shutil.copytree(reference, tmp_path / 'odd') / 'manifest.json').read_text())
    for name, value in (('a\nb', 1), ('components', '\x1b[2J\n'), ('fast', ['\ud800\n']), ('new', None)):
        odd = {**manifest, 'settings': {**manifest['settings'], name: value}}
        (tmp_path / 'odd' / 'manifest.json').write_text(json.dumps(odd))
        with pytest.raises((ValueError, FileExistsError)) as e:
            embed(images, tmp_path / 'odd')
        assert str(e.value).isprintable()
    (tmp_path / 'one').mkdir()
    Image.new('RGB', (9, 9)).save(tmp_path / 'one' / 'x.png')
    with pytest.raises(ValueError, match='images number 23, now 1'):
        embed(tmp_path / 'one', reference)
    with pytest.raises(FileExistsError, match='has no descriptors, it has no manifest'):
        embed(images, tmp_path / 'one')
    (tmp_path / 'one' / 'manifest.json').write_text('{"format": "photos"}')
    with pytest.raises(FileExistsError, match='of something else'):
        embed(images, tmp_path / 'one')
    with pytest.raises(FileExistsError, match='cannot be read'):
        embed(images, tmp_path / 'one' / 'x.png')
    with pytest.raises(ValueError, match='shard_size=0'):
        embed(images, tmp_path / 'two', shard_size=0)
    with pytest.raises(FileNotFoundError, match='has no descriptors'):
        Descriptors.load(tmp_path / 'nothing')
    assert contents(reference) == before


def command(model_folder, images, out):
    return [sys.executable, '-m', 'timm_multigrain', 'embed', str(model_folder), str(images), '-o', str(out), *FLAGS]


@pytest.mark.slow
def test_several_processes(tmp_path, images, model_folder, reference):
    out, processes = tmp_path / 'out', 2
    embed(images, out)  # they go on where one process stopped
    for number in (0, 2, 4, 5):
        shard_path(out, number).unlink()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    running = [subprocess.Popen(
        command(model_folder, images, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                        MASTER_PORT=port)) for rank in range(processes)]
    outputs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    assert_same(out, reference)
    assert '22 descriptors of 96 components' in outputs[0][0] and not outputs[1][0]
    # what the first process refuses, all of them refuse
    running = [subprocess.Popen(
        [*command(model_folder, images, out), '--flip'], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=environment(WORLD_SIZE='2', RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)) for rank in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 2 and 'protocol flip False, now True' in errors


def test_terminated(tmp_path, images, model_folder):
    many = tmp_path / 'list.json'
    names = [str(images / f'{i % 6:02d}.png') for i in range(20_000)]
    many.write_text(json.dumps(names))
    out = tmp_path / 'out'
    process = subprocess.Popen(
        [*command(model_folder, many, out)[:-4], '--workers', '1'], env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(out.glob('shard-*')):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == 'timm-multigrain embed: terminated'
    assert 'Traceback' not in errors and not list(out.glob('.*'))
    with pytest.raises(ProcessLookupError):  # the worker has ended, too
        os.killpg(process.pid, 0)


def test_command(tmp_path, images, model_folder, reference, capsys):
    assert main(command(model_folder, images, tmp_path / 'out')[3:]) == 0
    out = capsys.readouterr().out
    assert out.startswith('23 images, longer side 48, smaller images enlarged\n22 descriptors of 96 components in ')
    assert '1 image could not be read' in out and '07.png: is not an image' in out
    assert_same(tmp_path / 'out', reference)
    for source, folder, flags, message in (
            (tmp_path / 'nowhere', 'new', [], 'is not a folder, a list'), (images, images, [], 'has no descriptors'),
            (images, 'new', ['--strict'], '07.png: is not an'), (images, 'out', ['--strict'], '07.png: is not an')):
        assert main([*command(model_folder, source, tmp_path / folder)[3:], *flags]) == 2
        assert message in capsys.readouterr().err
