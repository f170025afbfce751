"""Saved folders load back in a fresh process, bit by bit, and a failed write leaves nothing behind."""
import json
import math
import os
import resource

import pytest
import timm
import torch

import timm_multigrain
from timm_multigrain import open_model, save_pretrained
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.models.save import model_folder

from .tiny import tiny_model


@pytest.mark.parametrize('kwargs', [
    {}, dict(gem_p=math.inf), dict(learn_p=True, gem_p=2.5), dict(per_channel_p=True, learn_p=True), dict(whitening=20),
    dict(in_chans=1), dict(global_pool='crow')])
@torch.inference_mode()
def test_round_trip(tmp_path, kwargs):
    model = tiny_model(**kwargs).train()
    path = save_pretrained(model, tmp_path / 'model', label_names=['a', 'b', 'c'])
    assert model.training and {p.name for p in path.iterdir()} == {'config.json', 'model.safetensors'}
    loaded = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    x = torch.randn(2, model.in_chans, 64, 64)
    assert torch.equal(loaded(x), model.eval()(x)) and loaded.gem_p == model.gem_p
    config = json.loads((path / 'config.json').read_text(), parse_constant=pytest.fail)  # strict JSON
    assert config['architecture'] == 'multigrain' and config['label_names'] == ['a', 'b', 'c']


@torch.inference_mode()
def test_a_model_made_by_its_class_adapts_as_timms(tmp_path):
    model, x = timm_multigrain.MultiGrain('regnetx_002', num_classes=3, gem_p=2).eval(), torch.randn(1, 3, 64, 64)
    path = save_pretrained(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x)) and loaded.pretrained_cfg['first_conv'] == 'trunk.stem.conv'
    grey = timm.create_model(f'local-dir:{path}', pretrained=True, in_chans=1, num_classes=5).eval()
    assert grey(x[:, :1]).shape == (1, 5)
    torch.testing.assert_close(
        grey.trunk.stem.conv.weight, model.trunk.stem.conv.weight.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_bad_input_leaves_nothing(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match='2 label names for 3 classes'):
        save_pretrained(model, tmp_path / 'model', label_names=['a', 'b'])
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'photo.jpg').write_bytes(b'x')
    with pytest.raises(FileExistsError, match='is not a saved model'):
        save_pretrained(model, tmp_path / 'mine')
    with torch.no_grad():
        model.head.fc.weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r'head\.fc\.weight of the model holds NaN'):
        save_pretrained(model, tmp_path / 'model')
    assert [p.name for p in tmp_path.iterdir()] == ['mine'] and (tmp_path / 'mine' / 'photo.jpg').exists()


def test_the_card_is_there_while_the_folder_is_replaced(tmp_path, monkeypatch):
    path = save_pretrained(tiny_model(), tmp_path / 'model')
    (path / 'README.md').write_text('mine')
    replace, seen = os.replace, []

    def watched(source, target):
        seen.append((path / 'README.md').read_text())
        if str(target) == str(path / 'model.safetensors'):
            with pytest.raises(RuntimeError, match=r'it is not the file that config\.json was saved with'):
                timm.create_model(f'local-dir:{path}', pretrained=True)  # the new config.json, the old weights
        replace(source, target)
        seen.append((path / 'README.md').read_text())

    monkeypatch.setattr(os, 'replace', watched)
    save_pretrained(tiny_model(1), path)
    assert set(seen) == {'mine'} and len(seen) >= 4
    assert weights_sha256(open_model(path)) == weights_sha256(tiny_model(1)) and len(list(tmp_path.iterdir())) == 1
    (path / 'more.safetensors').write_bytes(b'')
    with pytest.raises(FileExistsError, match='is not a saved model'):
        save_pretrained(tiny_model(), path)


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = save_pretrained(tiny_model(), tmp_path / 'model')
        save_pretrained(tiny_model(), path)  # once more, over the first
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in path.iterdir()} == dict.fromkeys(
        ('config.json', 'model.safetensors'), 0o666 & ~umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_leftovers_of_a_killed_run_go_and_those_of_a_running_one_stay(tmp_path):
    left = tmp_path / '.model.unfinished'
    left.mkdir()
    (left / 'model.safetensors').write_bytes(bytes(1000))
    save_pretrained(tiny_model(), tmp_path / 'model')
    assert [p.name for p in tmp_path.iterdir()] == ['model']
    with model_folder(tmp_path / 'model') as running:
        (running / 'config.json').write_text('{}')
        with pytest.raises(RuntimeError, match='another process saves to'):
            save_pretrained(tiny_model(1), tmp_path / 'model')
        assert (running / 'config.json').exists()
    left.mkdir()
    (left / 'photo.jpg').touch()  # nothing that this package leaves
    with pytest.raises(FileExistsError, match='unfinished exists and is not a saved model'):
        save_pretrained(tiny_model(), tmp_path / 'model')
    assert (left / 'photo.jpg').exists()


def test_damage_of_the_same_size_is_found(tmp_path):
    path = save_pretrained(tiny_model(), tmp_path / 'model')
    weights = path / 'model.safetensors'
    body = bytearray(weights.read_bytes())
    for place in (len(body) - 1, len(body) // 2, len(body) - 5000):
        weights.write_bytes(body[:place] + bytes([body[place] ^ 1]) + body[place + 1:])
        for load in (open_model, lambda path: timm.create_model(f'local-dir:{path}', pretrained=True)):
            with pytest.raises(RuntimeError, match=r'it is not the file that config\.json was saved with .*again\.'):
                load(path)
    weights.write_bytes(body)
    open_model(path)
    config = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps({**config, 'label_names': ['x', 'y', 'z']}))  # people may edit it
    assert open_model(path).pretrained_cfg['label_names'] == ['x', 'y', 'z']


def test_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond: the write itself fails
    try:
        with pytest.raises(OSError, match=rf'could not be written to {tmp_path}/model: .*free space'):
            save_pretrained(tiny_model(), tmp_path / 'model')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
