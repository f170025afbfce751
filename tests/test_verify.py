"""Downloads from a Hub on loopback: damaged copies are noticed, faults are one sentence, pickles stay unread."""
import errno
from pathlib import Path

import pytest
import timm
import torch

from timm_multigrain.hub import publish, verified_hub_file

from .hub_server import Fault
from .tiny import tiny_model


@pytest.fixture
def published(hub):
    publish(tiny_model(), 'me/model', license='mit')
    return hub


def _blob(path):
    return path.resolve()


def test_downloads_are_verified(published, monkeypatch):
    expected = published.repos['me/model'].files()
    for name in ('model.safetensors', 'config.json'):
        path = verified_hub_file('me/model', name)
        assert path.read_bytes() == expected[name]
        gets = [r for r in published.requests if r[0] == 'GET' and 'resolve' in r[1]]
        assert verified_hub_file('me/model', name) == path  # from the cache
        assert [r for r in published.requests if r[0] == 'GET' and 'resolve' in r[1]] == gets
        content = bytearray(expected[name])
        content[-1] ^= 1
        for damaged in (expected[name][:-7], bytes(content), b''):
            _blob(path).write_bytes(damaged)
            path = verified_hub_file('me/model', name, 'main')
            assert path.read_bytes() == expected[name]
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert verified_hub_file('me/model', 'model.safetensors').is_file()
    _blob(verified_hub_file('me/model', 'model.safetensors')).write_bytes(b'damaged')
    with pytest.raises(RuntimeError, match=r'was damaged in the cache .*could not be downloaded again: offline mode'):
        verified_hub_file('me/model', 'model.safetensors')


def test_downloads_that_are_damaged_each_time(published):
    published.faults.append(Fault('GET', 'model.safetensors', corrupt=True))
    with pytest.raises(RuntimeError, match=r'model.safetensors of me/model came damaged twice \(SHA-256'):
        verified_hub_file('me/model', 'model.safetensors')
    assert len([r for r in published.requests if r == ('GET', '/me/model/resolve/main/model.safetensors')]) == 2
    assert not _cached('model.safetensors', 'blobs')
    published.faults.clear()
    assert verified_hub_file('me/model', 'model.safetensors').is_file()


def _cached(*patterns):
    from huggingface_hub import constants
    folder = Path(constants.HF_HUB_CACHE)
    return [p for pattern in patterns for p in folder.rglob(pattern if pattern != 'blobs' else 'blobs/*')]


@pytest.mark.parametrize('fault, kind, error', [
    (Fault('HEAD', 'resolve', 503), RuntimeError, r'could not be downloaded: the Hub has trouble \(503'),
    (Fault('GET', 'resolve', 403), RuntimeError, r'could not be .* the token may not read it \(403: .*ask for access'),
    (Fault('HEAD', 'resolve', 401), RuntimeError, r'could not be downloaded: the Hub does not accept the token \(401'),
    (Fault('GET', 'resolve', cut='response'), RuntimeError, 'could not be downloaded: the connection to .* failed'),
])
def test_faults_of_downloads(published, fault, kind, error):
    published.faults.append(fault)
    with pytest.raises(kind, match=f'model.safetensors of me/model {error}') as caught:
        verified_hub_file('me/model', 'model.safetensors')
    assert '\n' not in str(caught.value) and not _cached('model.safetensors', 'blobs')


def test_a_download_that_breaks_once_is_resumed(published):
    published.faults.append(Fault('GET', 'resolve', cut='response', times=1))
    path = verified_hub_file('me/model', 'model.safetensors')
    assert path.read_bytes() == published.repos['me/model'].files()['model.safetensors']


def test_missing_things_and_pickles(published):
    with pytest.raises(FileNotFoundError, match=r'model.safetensors of me/nothing could not be downloaded: .*\(404'):
        verified_hub_file('me/nothing', 'model.safetensors')
    with pytest.raises(FileNotFoundError, match=r'model.safetensors of me/model at v9 could not be .*\(404'):
        verified_hub_file('me/model', 'model.safetensors', 'v9')
    with pytest.raises(ValueError, match='name it USER/NAME'):
        verified_hub_file('me/a--b', 'model.safetensors')


def test_a_pickle_is_not_taken_in_place_of_safetensors(published):
    files = published.repos['me/model'].files()
    published.add_repo('me/pickle', {'config.json': files['config.json'], 'pytorch_model.bin': b'x'})
    with pytest.raises(FileNotFoundError, match=r'model\.safetensors of me/pickle could not be downloaded'):
        timm.create_model('hf-hub:me/pickle', pretrained=True)
    assert not any(path.endswith('.bin') for _, path in published.requests)


def test_a_model_is_made_of_verified_weights(published):
    blob = verified_hub_file('me/model', 'model.safetensors').resolve()
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1  # still a safetensors file, with another number in it
    blob.write_bytes(content)
    loaded = timm.create_model('hf-hub:me/model', pretrained=True)
    own = tiny_model().state_dict()
    assert all(torch.equal(own[name], value) for name, value in loaded.state_dict().items())


def test_full_disk_while_downloading(published, monkeypatch):
    import builtins
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            raise OSError(errno.ENOSPC, 'No space left on device')

    def open_full(path, mode='r', *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return Full(file) if 'incomplete' in str(path) else file
    monkeypatch.setattr(Path, 'open', open_full)
    assert builtins.open is open
    with pytest.raises(OSError, match=r'could not be downloaded: no room is left on the disk .*set HF_HOME'):
        verified_hub_file('me/model', 'model.safetensors')
    monkeypatch.undo()
    assert not _cached('*.incomplete')


def test_a_cache_without_links(published, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_DISABLE_SYMLINKS', True)
    path = verified_hub_file('me/model', 'model.safetensors')
    assert not path.is_symlink()
    path.write_bytes(path.read_bytes()[:-50])
    path = verified_hub_file('me/model', 'model.safetensors')
    assert path.read_bytes() == published.repos['me/model'].files()['model.safetensors']
