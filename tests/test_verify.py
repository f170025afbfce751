"""Downloads from a Hub on loopback: damaged copies are noticed, faults are one sentence, pickles stay unread."""
from pathlib import Path

import pytest
import timm
import torch

from timm_multigrain.hub import publish

from .hub_server import Fault
from .tiny import tiny_model


@pytest.fixture
def published(hub):
    publish(tiny_model(), 'me/model', license='mit')
    return hub


def _load(name='me/model'):
    return timm.create_model(f'hf-hub:{name}', pretrained=True)


def _cached() -> Path:
    from huggingface_hub import constants
    return next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors'))


@pytest.mark.parametrize('links', [True, False])
def test_a_damaged_copy_in_the_cache_is_downloaded_again(published, monkeypatch, links):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_DISABLE_SYMLINKS', not links)
    content = published.repos['me/model'].files()['model.safetensors']
    other = bytearray(content)
    other[-5] ^= 1  # still a safetensors file, with another number in it
    own = tiny_model().state_dict()
    _load()
    for damaged in (bytes(other), content[:-7], b''):
        path = _cached()
        assert path.is_symlink() == links
        path.write_bytes(damaged)
        assert all(torch.equal(own[name], value) for name, value in _load().state_dict().items())
        assert path.read_bytes() == content
    requests = len(published.requests)
    _load()
    assert not any(method == 'GET' for method, _ in published.requests[requests:])  # from the cache
    path.write_bytes(other)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='could not be downloaded: offline mode is on'):
        _load()


def test_downloads_that_are_damaged_each_time(published):
    published.faults.append(Fault('GET', 'model.safetensors', corrupt=True))
    with pytest.raises(RuntimeError, match=r'model.safetensors of me/model cannot be read as weights'):
        _load()
    published.faults.clear()
    _load()


@pytest.mark.parametrize('fault, error', [
    (Fault('HEAD', 'model.safe', 503), r'could not be downloaded: the Hub has trouble \(503'),
    (Fault('GET', 'model.safe', 403), r'could not be .* the token may not read it \(403: .*ask its owner for access'),
    (Fault('HEAD', 'model.safe', 401), r'could not be downloaded: the Hub does not accept the token \(401'),
    (Fault('GET', 'model.safe', cut='response'), 'could not be downloaded: the connection to .* failed'),
])
def test_faults_of_downloads(published, fault, error):
    published.faults.append(fault)
    with pytest.raises(RuntimeError, match=f'model.safetensors of me/model {error}') as caught:
        _load()
    assert '\n' not in str(caught.value)


def test_missing_things_and_pickles(published):
    for name, problem in (('me/nothing', '404'), ('me/model@v9', '404'), ('me/a--b', 'name it USER/NAME')):
        with pytest.raises((FileNotFoundError, ValueError), match=f'model.safetensors of {name} .*{problem}'):
            timm.create_model('multigrain_resnet18', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=name))
    files = published.repos['me/model'].files()
    published.add_repo('me/pickle', {'config.json': files['config.json'], 'pytorch_model.bin': b'x'})
    with pytest.raises(FileNotFoundError, match=r'model\.safetensors of me/pickle could not be downloaded'):
        _load('me/pickle')
    assert not any(path.endswith('.bin') for _, path in published.requests)
