"""Pretrained weights that cannot be had, read or used: one sentence with the file, the cause and the way out."""
import math
import os
import pickle
import random
import re
import resource

import pytest
import timm
import torch
from safetensors.torch import save

from timm_multigrain.hub import save_pretrained
from timm_multigrain.models.download import download
from timm_multigrain.models.weights import UnreadableWeightsError, Weights, read_file

from . import original
from .original_files import container, refused, write

NAME = 'multigrain_resnet18'
BY_HAND = 'give the file: pretrained_cfg_overlay=dict(file=PATH)'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file of the original's saver."""
    path = tmp_path_factory.mktemp('weights') / 'checkpoint_120.pth'
    return write(path, container(original.state_dict('resnet18'))).read_bytes()


def _cached(tmp_path):
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def _from(url, **kwargs):
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url), **kwargs)


def _load(path, name=NAME, overlay=None, **kwargs):
    overlay = dict(overlay or {}, file=str(path))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


# --- of the server


def test_server_that_is_not_there_or_refuses(server, tmp_path):
    busy = server.add('busy.pth', status=503)
    with refused(RuntimeError, f'{busy} could not be downloaded: ', 'answered 503 ', 'try again later', BY_HAND):
        _from(busy)
    missing = busy.replace('busy', 'missing')
    with refused(FileNotFoundError, f'{missing} could not be', 'does not have it (404 ', 'check the address', BY_HAND):
        _from(missing)
    with refused(RuntimeError, 'answered 403 ', 'check the address'):
        _from(server.add('secret.pth', status=403))
    with refused(RuntimeError, 'http://127.0.0.1:1/a.pth could', 'no connection (', 'refused', 'the network', BY_HAND):
        _from('http://127.0.0.1:1/a.pth')
    assert _cached(tmp_path) == []


def test_cut_connection_is_resumed_once(server, tmp_path, weights):
    _from(server.add('cut.pth', weights, cuts=1))
    assert server.ranges == [None, f'bytes={len(weights) // 2}-']
    assert (tmp_path / 'torch/hub/checkpoints/cut.pth').read_bytes() == weights
    server.ranges.clear()
    download(server.add('anew.pth', weights, cuts=1, etag=None), tmp_path / 'anew.pth')  # no telling if it is the same
    assert server.ranges == [None, None] and (tmp_path / 'anew.pth').read_bytes() == weights
    twice = server.add('twice.pth', weights, cuts=2)
    with refused(RuntimeError, f'{twice} could not', 'was cut 2 times', f' of {len(weights)} bytes came', BY_HAND):
        _from(twice)
    assert _cached(tmp_path) == ['cut.pth']


def test_file_that_changes_between_its_parts(server, tmp_path):
    url = server.add('f', b'a' * 1000, cuts=1)
    first = server.files['/f']

    class Changing(dict):
        def get(self, path):
            return first if first.cuts else type(first)(b'b' * 900, etag='"2"')
    server.files = Changing()
    assert download(url, tmp_path / 'f').read_bytes() == b'b' * 900
    assert server.ranges == [None, 'bytes=500-']


def test_what_killed_downloads_have_left_goes(server, tmp_path):
    url = server.add('w.pth', b'weights')
    old, running, other = (tmp_path / name for name in ('.w.pth-1.partial', '.w.pth-2.partial', '.v.pth-1.partial'))
    for path in (old, running, other):
        path.write_bytes(b'part')
    for path in (old, other):
        os.utime(path, (0, 0))
    assert download(url, tmp_path / 'w.pth').read_bytes() == b'weights'
    assert (old.exists(), running.exists(), other.exists()) == (False, True, True)


def test_cut_file_in_the_cache_is_fetched_again(server, tmp_path, weights):
    url = server.add('a.pth', weights)
    cached = tmp_path / 'torch' / 'hub' / 'checkpoints' / 'a.pth'
    cached.parent.mkdir(parents=True)
    cached.write_bytes(weights[:30_000])
    assert _from(url).gem_p == 3.0 and cached.read_bytes() == weights and len(server.ranges) == 1
    # again, and the server cuts it too, with nothing to tell its length by
    cached.write_bytes(weights[:30_000])
    server.add('a.pth', weights, cuts=1, announced=False)
    with refused(RuntimeError, f'{cached} (from {url})', 'it is cut off, ', 'it was deleted; ', BY_HAND):
        _from(url)
    assert _cached(tmp_path) == []
    assert _from(url).gem_p == 3.0  # nothing is left to break this one


@pytest.mark.parametrize('body, cause', [
    (b'', 'the file is empty'), (b'<!DOCTYPE html><html>Sign in', 'it is a web page'), (b'weights', 'it is cut off, ')])
def test_something_else_instead_of_weights(server, tmp_path, body, cause):
    url = server.add('a.pth', body)
    with refused(RuntimeError, f'a.pth (from {url}) cannot be read as weights: {cause}', BY_HAND):
        _from(url)
    assert len(server.ranges) == 1 and _cached(tmp_path) == []


def test_disk_that_is_full(server, tmp_path, weights):
    url = server.add('big.pth', weights)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, hard))
    try:
        with refused(RuntimeError, 'big.pth could not be written (File too large): free space', 'TORCH_HOME'):
            _from(url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _cached(tmp_path) == [] and _from(url).gem_p == 3.0
    (tmp_path / 'file').touch()
    with refused(RuntimeError, 'could not be written (File exists)', 'another folder', 'cache_dir'):
        _from(url, cache_dir=str(tmp_path / 'file'))


# --- of the file


def test_missing_and_cut_files(tmp_path, weights):
    path = tmp_path / 'w.pth'
    with refused(FileNotFoundError, f'{path} does not exist: check the path'):
        _load(path)
    with refused(RuntimeError, 'cannot be read as weights: it is a folder'):
        _load(tmp_path)
    zipped = write(tmp_path / 'z.pth', original.state_dict('resnet18'), zipped=True).read_bytes()
    for whole in (weights, zipped):
        for length in (0, 1, 10, 200, 5_000, 20_000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with refused(RuntimeError, f'{path} cannot be read as weights: ', '; copy or download it again.'):
                _load(path)
            assert path.exists()  # only the cache is ours to clean


def test_files_of_other_content(tmp_path):
    path = tmp_path / 'w.pth'
    for content in ([1, 2], torch.zeros(3)):
        with refused(RuntimeError, f'{path} cannot be read as weights: '):
            _load(write(path, content))
    for content, entries in (({'epoch': 3}, "only entries such as ['epoch']"), ({}, 'nothing')):
        with refused(ValueError, f'{path}: The checkpoint holds no weights, {entries}.'):
            _load(write(path, content))
    garbage = tmp_path / 'g.safetensors'
    for body in (b'garbage' * 10, save({'a': torch.zeros(9)})[:-4], b''):
        garbage.write_bytes(body)
        with refused(RuntimeError, f'{garbage} cannot be read as weights: '):
            _load(garbage)
    path.write_bytes(save({'a': torch.zeros(9)}))
    with refused(RuntimeError, 'expected under a name that ends in .safetensors'):
        _load(path)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_damaged_bytes_give_one_sentence(tmp_path, golden):
    whole = (golden / 'tiny_container_joint.pth').read_bytes()
    path, refusals = tmp_path / 'w.pth', []
    for seed in range(200):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_file(Weights('w.pth', path))
        except UnreadableWeightsError as e:
            refusals.append(str(e))
    assert len(refusals) > 50  # most of the rest differ in the value of a weight
    assert all(re.fullmatch(r'w\.pth cannot be read as weights: .+; give another file\.', text) for text in refusals)
    assert not any('weights_only' in text for text in refusals)


def test_saved_folder_with_damaged_weights(tmp_path):
    folder = save_pretrained(timm.create_model(NAME, num_classes=3), tmp_path / 'model')
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-9])
    with refused(RuntimeError, f'{weights} cannot be read as weights: ', 'save or convert the model again'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    weights.unlink()
    with refused(RuntimeError, f'{folder} cannot be read as weights: No suitable checkpoints found'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def calling_open(target, prelude=b''):
    """A file in the old layout that calls open(target, 'w') when it is unpickled, behind opcodes of an OrderedDict."""
    def text(s):
        return b'X' + len(s).to_bytes(4, 'little') + s.encode()
    head = b''.join(pickle.dumps(o, 2) for o in (
        0x1950a86a20f9469cfc6c, 1001,
        dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4))))
    call = b'cbuiltins\nopen\n(' + text(str(target)) + text('w') + b'tR0'
    return head + b'\x80\x02ccollections\nOrderedDict\n)R' + prelude + call + b'.' + pickle.dumps([], 2)


# b'Nb' gives the OrderedDict the state None, at which torch's restricted unpickler raises a TypeError
@pytest.mark.parametrize('prelude', [b'', b'Nb'])
def test_code_in_a_file_is_not_run(server, tmp_path, prelude):
    target, path = tmp_path / 'created', tmp_path / 'evil.pth'
    path.write_bytes(calling_open(target, prelude))
    cause = 'it is cut off' if prelude else 'it asks to run Python code (open), which is never done'
    for load in (lambda: _from(server.add('evil.pth', path.read_bytes())), lambda: _load(path)):
        with refused(RuntimeError, 'evil.pth', f' cannot be read as weights: {cause}'):
            load()
        assert not target.exists()
    assert _cached(tmp_path) == []
    torch.load(path, weights_only=False)
    assert target.exists()  # the file does what this test says it does


# --- of the weights


@pytest.mark.slow
def test_weights_of_another_network(tmp_path, weights):
    path = tmp_path / 'w.pth'
    path.write_bytes(weights)
    for classes in (1000, 7):  # timm loads what fits where the classes differ
        with refused(ValueError, f"{path}: The weights are not those of the trunk 'resnet50': ", 'are of multigrain_'):
            _load(path, 'multigrain_resnet50', num_classes=classes)
        with refused(ValueError, "'trunk.layer1.2.conv1.weight' is missing in them", 'are of multigrain_resnet18.'):
            _load(path, 'multigrain_resnet34', num_classes=classes)
    write(path, timm.create_model('multigrain', trunk='resnet10t').state_dict())
    with refused(ValueError, "not those of the trunk 'resnet18': ", 'take the model that the weights are of'):
        _load(path)
    write(path, {k.replace('layer1', 'layer9'): v for k, v in original.state_dict('resnet18').items()})
    with refused(ValueError, "not those of the trunk 'resnet18': 'trunk.layer1.0.conv1.weight' is missing in them"):
        _load(path, num_classes=7)
    write(path, timm.create_model('convnext_atto').state_dict())
    with refused(ValueError, f'{path}: The checkpoint is neither a MultiGrain one nor weights of the trunk'):
        _load(path)


def test_wrong_number_of_classes(tmp_path):
    state = original.state_dict('resnet18')
    state.update({k: state[k][:10] for k in ('classifier.weight', 'classifier.bias')})
    path = write(tmp_path / 'ten.pth', container(state))
    with refused(ValueError, f'{path}: The classifier is of 10 classes, the model of 1000: ', 'num_classes=10 to '):
        _load(path)
    assert torch.equal(_load(path, overlay=dict(num_classes=10)).head.fc.weight, state['classifier.weight'])
    assert _load(path, overlay=dict(num_classes=-1)).num_classes == 1000
    write(path, timm.create_model(NAME, num_classes=0).state_dict())
    with refused(ValueError, "lack 'head.fc.weight' of the model: add num_classes=-1"):
        _load(path)
    assert _load(path, overlay=dict(num_classes=-1), num_classes=4).num_classes == 4


@pytest.mark.parametrize('key, value, message', [
    ('features.layer2.0.bn1.weight', math.nan, "'trunk.layer2.0.bn1.weight' in the checkpoint holds NaN"),
    ('classifier.bias', -math.inf, "'head.fc.bias' in the checkpoint holds infinity"),
    ('pool.p', math.nan, 'exponent p in the checkpoint is nan'),
    ('pool.p', -2.0, 'exponent p in the checkpoint is -2.0: only p > 0'),
])
def test_weights_that_are_not_finite(tmp_path, key, value, message):
    state = {k: v.clone() for k, v in original.state_dict('resnet18').items()}
    state[key].view(-1)[-1] = value
    path = write(tmp_path / 'w.pth', container(state))
    with refused(ValueError, f'{path}: ', message):
        _load(path)


def test_image_channels_that_cannot_be_adapted(tmp_path):
    state = original.state_dict('resnet18')
    state['features.conv1.weight'] = state['features.conv1.weight'][:, :2]
    path = write(tmp_path / 'w.pth', container(state))
    with refused(RuntimeError, f'{path} cannot be loaded into {NAME}: ', 'trunk.conv1'):
        _load(path)


def test_errors_of_the_model_are_not_said_to_be_the_files(tmp_path, weights):
    (tmp_path / 'w.pth').write_bytes(weights)
    with pytest.raises(ValueError, match=r"^Unknown global_pool 'nothing'"):
        _load(tmp_path / 'w.pth', global_pool='nothing')
    with pytest.raises(RuntimeError, match=r'^No pretrained weights exist for multigrain_resnet18'):
        timm.create_model(NAME, pretrained=True)
