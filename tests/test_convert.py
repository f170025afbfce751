"""`timm-multigrain convert`: the original's files become folders that give the original's outputs."""
import dataclasses
import hashlib
import json
import re
import resource

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_multigrain.cli.main import main
from timm_multigrain.hub.convert import Conversion, convert_checkpoint
from timm_multigrain.models.weights import recognize_model

from . import original
from .original_files import container, refused, write


@pytest.fixture(scope='module')
def reference(golden):
    return load_file(golden / 'forward.safetensors')


@pytest.fixture
def official(server, monkeypatch):
    """Lets the tag of the published ResNet-50 name a file of the test's server; its address."""
    def serve(body, **kwargs):
        url = server.add('multigrain_models/joint_3B_0.5.pth', body, **kwargs)
        tag = 'multigrain_resnet50.fb_p3_l05_in1k'
        cfg = dataclasses.replace(timm.models.get_pretrained_cfg(tag), url=url)
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, tag, cfg)
        return url
    return serve


def _config(folder):
    return json.loads((folder / 'config.json').read_text())


def _loaded(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@torch.inference_mode()
def test_a_file_of_ones_own(tmp_path, capsys, reference):
    path = write(tmp_path / 'checkpoint_120.pth', container(original.state_dict('resnet18')))
    out = tmp_path / 'model'
    assert main(['convert', str(path), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f'multigrain_resnet18 in {out}: 123 tensors, 11,689,512 parameters' in printed
    for name in ('config.json', 'model.safetensors'):
        assert f'sha256 {hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}' in printed
    model = _loaded(out)
    _close(model(original.image(96, 96, 2)), reference['resnet18.96x96.p3.0.logits'])
    config = _config(out)
    assert config['architecture'] == 'multigrain_resnet18' and config['num_classes'] == 1000
    assert config['pretrained_cfg']['crop_pct'] == 0.875 and config['pretrained_cfg']['interpolation'] == 'bilinear'
    # whose weights they are is not known, even where the model's default tag has a license
    assert not {'license', 'description', 'origin_url', 'tag', 'notes', 'url', 'file'} & set(config['pretrained_cfg'])
    assert 'apache' not in (out / 'config.json').read_text().lower()


@torch.inference_mode()
def test_the_authors_file_by_tag_address_and_name(tmp_path, server, official, reference):
    body = write(tmp_path / 'joint_3B_0.5.pth', container(original.state_dict('resnet50', p=1.7))).read_bytes()
    url = official(body, cuts=1)
    tag = 'multigrain_resnet50.fb_p3_l05_in1k'
    results = [convert_checkpoint(source, tmp_path / 'model') for source in (tag, url, tmp_path / 'joint_3B_0.5.pth')]
    assert len(server.ranges) == 2 and server.ranges[1].startswith('bytes=')  # resumed, then taken from the cache
    assert len(set(results)) == 1
    assert results[0] == Conversion(
        'multigrain_resnet50', tmp_path / 'model', 321, 25_557_032, results[0].config_sha256, results[0].weights_sha256)
    cfg = timm.models.get_pretrained_cfg(tag)
    stored = _config(tmp_path / 'model')['pretrained_cfg']
    for key in ('license', 'description', 'origin_url', 'paper_ids', 'paper_name', 'tag', 'interpolation', 'crop_pct'):
        assert stored[key] == getattr(cfg, key)
    for key in ('mean', 'std', 'input_size', 'notes'):
        assert stored[key] == list(getattr(cfg, key))
    assert stored['license'] == 'cc-by-nc-4.0' and 'url' not in stored
    model = _loaded(tmp_path / 'model')
    assert model.gem_p == torch.tensor(1.7).item() and model.pretrained_cfg['license'] == 'cc-by-nc-4.0'
    _close(model(original.image(96, 96, 2)), reference['resnet50.96x96.p1.7.logits'])


def test_the_authors_name_on_another_network(tmp_path):
    path = write(tmp_path / 'joint_3B_0.5.pth', original.state_dict('resnet18'))
    assert convert_checkpoint(path, tmp_path / 'model').model_name == 'multigrain_resnet18'
    assert 'license' not in _config(tmp_path / 'model')['pretrained_cfg']


@torch.inference_mode()
def test_whitened_file_by_address_with_other_classes(tmp_path, server):
    state = original.state_dict('resnet18', whitened=True, p=1.7)
    state.update({k: state[k][:10] for k in ('classifier.weight', 'classifier.bias')})
    url = server.add('any/checkpoint_0.pth', write(tmp_path / 'w', {'model_state': state}, zipped=True).read_bytes())
    result = convert_checkpoint(url, tmp_path / 'model')
    model = _loaded(tmp_path / 'model')
    assert model.whitened and model.num_classes == 10 and model.embed_dim == 513
    assert model.gem_p == torch.tensor(1.7).item() and result.num_tensors == len(model.state_dict())
    assert torch.equal(model.head.fc.weight, state['classifier.weight'])
    assert not (tmp_path / 'torch').exists()  # another address may end in the same name: nothing is kept of it


@pytest.mark.slow
def test_every_network_is_recognized():
    for network in ('resnet18', 'resnet50', 'senet154', 'pnasnet5large'):
        assert recognize_model(container(original.state_dict(network))) == f'multigrain_{network}'
    for name in ('resnet34', 'resnet101', 'resnet152'):
        with torch.device('meta'):
            trunk = timm.create_model(name)
        state = {f'features.{k}': v for k, v in trunk.state_dict().items() if not k.startswith('fc.')}
        state.update({'pool.p': torch.tensor(3.0), 'classifier.weight': trunk.fc.weight})
        assert recognize_model({f'module.{k}': v for k, v in state.items()}) == f'multigrain_{name}'
    with pytest.raises(ValueError, match=r'trunk of the checkpoint \(\d+ weights.* is none of multigrain_resnet50, '):
        recognize_model(timm.create_model('multigrain', trunk='resnet10t').state_dict())


@pytest.mark.slow
def test_nasnet(shared_golden):
    keys = json.loads((shared_golden / 'checkpoint_keys_nasnetamobile.json').read_text())['without_whitening']
    state = {k: torch.empty(shape, device='meta') for k, (shape, _) in keys.items()}
    assert recognize_model(state) == 'multigrain_nasnetamobile'


def test_model_by_name(tmp_path):
    path = write(tmp_path / 'w.pth', timm.create_model('multigrain_efficientnet_b0', num_classes=3).state_dict())
    convert_checkpoint(path, tmp_path / 'model', 'multigrain_efficientnet_b0')
    assert _loaded(tmp_path / 'model').num_classes == 3
    with refused(ValueError, "MultiGrain model 'multigrain_resnet5' not found: did you mean multigrain_resnet50"):
        convert_checkpoint(path, tmp_path / 'model', 'multigrain_resnet5')
    with refused(ValueError, f"{path}: The weights are not those of the trunk 'resnet18'"):
        convert_checkpoint(path, tmp_path / 'other', 'multigrain_resnet18')


def test_what_cannot_be_converted(tmp_path, server, capsys):
    out = tmp_path / 'model'
    assert main(['convert', 'nowhere/joint_3B_0.5.pth', str(out)]) == 2
    err = capsys.readouterr().err
    assert 'nowhere/joint_3B_0.5.pth is neither a folder, nor a file, nor a model of timm' in err
    assert len(err.splitlines()) == 1
    path = tmp_path / 'w.pth'
    path.write_bytes(b'')
    with refused(RuntimeError, f'{path} cannot be read as weights: the file is empty'):
        convert_checkpoint(path, out)
    with refused(ValueError, f"{path}: It is no checkpoint of the original implementation: it starts with ['conv1.w"):
        convert_checkpoint(write(path, timm.create_model('resnet18').state_dict()), out)
    url = server.add('a/page.pth', b'<html>')
    with refused(RuntimeError, f'{url} cannot be read as weights: it is a web page'):
        convert_checkpoint(url, out)
    with refused(FileNotFoundError, '/none.pth could not be downloaded: ', '(404 ', 'other means and give the file.'):
        convert_checkpoint(url.replace('page', 'none'), out)
    state = original.state_dict('resnet18')
    state['classifier.weight'] = state['classifier.weight'] * float('nan')
    url = server.add('nan.pth', write(path, state).read_bytes())
    with refused(ValueError, f"{url}: 'head.fc.weight' in the checkpoint holds NaN"):
        convert_checkpoint(url, out)
    assert not out.exists()


def test_folders_that_are_not_written(tmp_path):
    path = write(tmp_path / 'w.pth', original.state_dict('resnet18'))
    out = tmp_path / 'mine'
    out.mkdir()
    (out / 'photo.jpg').write_bytes(b'x')
    with refused(FileExistsError, f'{out} exists and is not a saved model'):
        convert_checkpoint(path, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, hard))
    try:
        with refused(OSError, f'model.safetensors could not be written to {tmp_path / "model"}: ', 'free space'):
            convert_checkpoint(path, tmp_path / 'model')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'w.pth']


def test_broken_file_of_a_tag_in_the_cache(tmp_path, server, official):
    body = write(tmp_path / 'w', container(original.state_dict('resnet50'))).read_bytes()
    official(body)
    cached = tmp_path / 'torch' / 'hub' / 'checkpoints' / 'joint_3B_0.5.pth'
    cached.parent.mkdir(parents=True)
    cached.write_bytes(body[:1000])
    convert_checkpoint('multigrain_resnet50.fb_p3_l05_in1k', tmp_path / 'model')
    assert cached.read_bytes() == body and len(server.ranges) == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        main(['convert', '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and re.search('FILE_OR_URL.*OUT_DIR', text) and '--model NAME' in text
