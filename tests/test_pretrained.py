"""Official weights by tag, from a server, a file, the Hub: the tags, and what a model has once they are loaded."""
import json
import math
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save
from timm.models import get_pretrained_cfg

from . import original
from .hub_server import hub_server, use
from .original_files import container, refused, write

URL = 'https://dl.fbaipublicfiles.com/multigrain/'
NAME = 'multigrain_resnet18'

# tag: file, what its description says, top-1, trunk, size of the test
OFFICIAL = {
    'multigrain_resnet50.fb_p3_l05_aa_in1k': (
        'multigrain_models/joint_3BAA_0.5.pth', ('p = 3,', 'lambda = 0.5', 'AutoAugment'), '78.2 at 224', None),
    'multigrain_resnet50.fb_p3_l05_in1k': (
        'multigrain_models/joint_3B_0.5.pth', ('p = 3,', 'lambda = 0.5', 'full augmentation'), '77.4 at 224', None),
    'multigrain_resnet50.fb_p1_l05_in1k': (
        'multigrain_models/joint_1B_0.5.pth', ('p = 1,', 'lambda = 0.5', 'full augmentation'), '77.0 at 224', None),
    'multigrain_resnet50.fb_p3_l1_in1k': (
        'multigrain_models/joint_3B_1.0.pth', ('p = 3,', 'lambda = 1 ', 'full augmentation'), '76.9 at 224', None),
    'multigrain_resnet50.fb_p1_l1_in1k': (
        'multigrain_models/joint_1B_1.0.pth', ('p = 1,', 'lambda = 1 ', 'full augmentation'), '76.8 at 224', None),
    'multigrain_senet154.fb_p16_400_in1k': (
        'finetuned_models/senet154-finetune400.pth', ('p = 1.6 fine-tuned at 400', 'lambda = 1'), '83.0 at 400', 400),
    'multigrain_pnasnet5large.fb_p17_500_in1k': (
        'finetuned_models/pnasnet5large-finetune500.pth', ('p = 1.7 fine-tuned at 500', 'lambda = 1'), '83.6 at 500',
        500),
    'multigrain_nasnetamobile.fb_p17_350_in1k': (
        'finetuned_models/nasnetamobile-finetune350.pth', ('p = 1.7 fine-tuned at 350', 'lambda = 1'), '75.1 at 350',
        350),
}


@pytest.fixture(scope='module')
def reference(golden):
    return load_file(golden / 'forward.safetensors')


def _cached(tmp_path):
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def _from(url, name=NAME, **kwargs):
    overlay = dict(url=url, **kwargs.pop('overlay', {}))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


# --- the tags


def test_tags_of_the_official_weights():
    assert set(timm.list_models('multigrain*', pretrained=True)) >= set(OFFICIAL)
    default = [name for name in OFFICIAL if get_pretrained_cfg(name.split('.')[0]).tag == name.split('.')[1]]
    assert default == [next(iter(OFFICIAL)), *list(OFFICIAL)[5:]]
    for name, (file, training, top1, test_size) in OFFICIAL.items():
        cfg = get_pretrained_cfg(name)
        arch, tag = name.split('.')
        trunk = get_pretrained_cfg({'senet154': 'legacy_senet154'}.get(arch[11:], arch[11:]))
        half = 'nasnet' in arch
        assert cfg.to_dict() == {
            'url': URL + file,
            'architecture': arch,
            'tag': tag,
            'custom_load': False,
            'input_size': trunk.input_size,
            **({'test_input_size': (3, test_size, test_size)} if test_size else {}),
            'fixed_input_size': False,
            'interpolation': 'bilinear',
            'crop_pct': 224 / 256,
            'crop_mode': 'center',
            'mean': (0.5, 0.5, 0.5) if half else (0.485, 0.456, 0.406),
            'std': (0.5, 0.5, 0.5) if half else (0.229, 0.224, 0.225),
            'num_classes': 1000,
            'pool_size': trunk.pool_size,
            'first_conv': f'trunk.{trunk.first_conv}',
            'classifier': 'head.fc',
            'license': 'cc-by-nc-4.0',
            'description': cfg.description,
            'notes': ('not for commercial use', 'top-1 as published by the authors of the paper'),
            'origin_url': 'https://github.com/facebookresearch/multigrain',
            'paper_name': 'MultiGrain: a unified image embedding for classes and instances',
            'paper_ids': 'arXiv:1902.05509',
        }
        assert all(part in cfg.description for part in (*training, f'top-1 {top1}'))


def test_no_weights_are_said_to_be_free_software():
    for name in timm.list_models('multigrain*', pretrained=True):
        assert 'apache' not in json.dumps(get_pretrained_cfg(name).to_dict()).lower()
    for name in timm.list_models('multigrain*'):
        assert get_pretrained_cfg(name).license in (None, 'cc-by-nc-4.0')


# --- loading


@pytest.mark.parametrize('network, p', [('resnet18', 3.0), ('resnet50', 1.0), ('resnet50', 1.7)])
@torch.inference_mode()
def test_by_tag_from_a_server(server, tmp_path, reference, network, p):
    path = write(
        tmp_path / 'joint_3B_0.5.pth', container(original.state_dict(network, p=p)), zipped=p == 1.7)
    name = 'multigrain_resnet50.fb_p3_l05_in1k' if network == 'resnet50' else NAME
    url = server.add('multigrain_models/joint_3B_0.5.pth', path.read_bytes())
    for _ in range(2):  # from the server, then from the cache
        model = _from(url, name)
        _close(model(original.image(96, 96, 2)), reference[f'{network}.96x96.p{p}.logits'])
        assert model.gem_p == torch.tensor(p).item() and not isinstance(model.head.pool.p, torch.nn.Parameter)
    assert server.ranges == [None] and _cached(tmp_path) == ['joint_3B_0.5.pth']
    assert 'file' not in model.pretrained_cfg and model.pretrained_cfg['url'] == url
    if network == 'resnet50':
        assert model.pretrained_cfg['license'] == 'cc-by-nc-4.0'


@pytest.mark.parametrize('stored, p', [
    (torch.tensor(1), 1.0), (torch.tensor(3), 3.0), (torch.tensor(1.6), 1.6), (torch.tensor(math.inf), math.inf),
    (torch.nn.Parameter(torch.tensor(1.7)), 1.7)])
def test_the_exponent_is_the_checkpoints(tmp_path, stored, p):
    state = {**original.state_dict('resnet18'), 'pool.p': stored}
    file = str(write(tmp_path / 'checkpoint_0.pth', container(state)))
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=file))
    assert model.gem_p == torch.tensor(p).item() and model.head.pool.p.dtype == torch.float32
    for kwargs in (dict(per_channel_p=True), dict(learn_p=True)):
        if p == math.inf:
            with refused(RuntimeError, 'head.pool.p: A learnable or per-channel p has to be finite'):
                timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=file), **kwargs)
            continue
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=file), **kwargs)
        assert isinstance(model.head.pool.p, torch.nn.Parameter) == ('learn_p' in kwargs)
        assert model.gem_p == ([torch.tensor(p).item()] * 512 if 'per_channel_p' in kwargs else torch.tensor(p).item())


@torch.inference_mode()
def test_whitened_and_adapted(server, tmp_path, reference):
    state = original.state_dict('resnet18', whitened=True, p=1.7)
    url = server.add('whitened.pth', write(tmp_path / 'w.pth', {'model_state': state}).read_bytes())
    x = original.image(96, 96, 2)
    model = _from(url, cache_dir=str(tmp_path / 'mine'))
    _close(model(x), reference['resnet18.whitened.logits'])
    assert model.whitened and _cached(tmp_path) == [] and (tmp_path / 'mine' / 'whitened.pth').exists()
    grey = _from(url, in_chans=1, num_classes=7, cache_dir=str(tmp_path / 'mine'))
    assert grey(x[:, :1]).shape == (2, 7) and grey.gem_p == torch.tensor(1.7).item()
    torch.testing.assert_close(
        grey.trunk.conv1.weight, model.trunk.conv1.weight.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    maps = _from(url, features_only=True, out_indices=(3,), cache_dir=str(tmp_path / 'mine'))(x)
    assert maps[0].shape == (2, 256, 6, 6)


@torch.inference_mode()
def test_what_train_py_does_with_pretrained_path(tmp_path, reference):
    path = write(tmp_path / 'checkpoint_120.pth', container(original.state_dict('resnet18')))
    x = original.image(96, 96, 2)
    for classes in (None, 5):
        overlay = dict(file=str(path), num_classes=-1)
        model = timm.create_model(NAME, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay).eval()
        assert model(x).shape == (2, classes or 1000) and model.pretrained_cfg['file'] == str(path)
        _close(model.forward_head(model.forward_features(x), True), reference['resnet18.96x96.p3.0.embedding'])


@torch.inference_mode()
def test_safetensors_and_training_checkpoints_by_address(server, tmp_path, reference):
    model = timm.create_model(NAME, num_classes=3, gem_p=2.5).eval()
    x = torch.randn(1, 3, 64, 64)
    addresses = (
        server.add('model.safetensors', save(model.state_dict())),
        server.add('model_best.pth.tar', write(
            tmp_path / 'm', {'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}}).read_bytes()))
    for url in addresses:
        again = _from(url, overlay=dict(num_classes=3))
        assert torch.equal(again(x), model(x)) and again.gem_p == 2.5


@torch.inference_mode()
def test_weights_from_the_hub(tmp_path, monkeypatch):
    model = timm.create_model(NAME, num_classes=3, gem_p=2.5).eval()
    config = {'architecture': NAME, 'num_classes': 3, 'model_args': {'trunk': 'resnet18'},
              'pretrained_cfg': {'input_size': [3, 224, 224], 'hf_hub_filename': 'pytorch_model.bin'}}
    pickled = write(tmp_path / 'p', model.state_dict()).read_bytes()
    x = torch.randn(1, 3, 64, 64)
    with hub_server() as server:
        use(server, monkeypatch, tmp_path)
        server.add_repo('me/safe', {'model.safetensors': save(model.state_dict())})
        server.add_repo('me/pickled', {'pytorch_model.bin': pickled, 'config.json': json.dumps(config).encode()})

        def load(**overlay):
            return timm.create_model(
                NAME, pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(num_classes=3, **overlay),
                cache_dir=str(tmp_path / 'cache')).eval()
        for hub_id in ('me/safe', 'me/safe@main'):
            again = load(hf_hub_id=hub_id)
            assert torch.equal(again(x), model(x)) and again.pretrained_cfg['hf_hub_id'] == hub_id
            assert 'file' not in again.pretrained_cfg
        with refused(FileNotFoundError, 'model.safetensors of me/pickled', 'hf_hub_filename=NAME'):
            load(hf_hub_id='me/pickled')
        assert torch.equal(load(hf_hub_id='me/pickled', hf_hub_filename='pytorch_model.bin')(x), model(x))
        # a repository cannot choose for its users
        with refused(ValueError, 'me/pickled names pytorch_model.bin', "hf_hub_filename='pytorch_model.bin'"):
            timm.create_model('hf-hub:me/pickled', pretrained=True)
        chosen = timm.create_model(
            'hf-hub:me/pickled', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_filename='pytorch_model.bin'))
        assert torch.equal(chosen.eval()(x), model(x)) and chosen.pretrained_cfg['source'] == 'hf-hub'
        with pytest.raises(FileNotFoundError, match='me/nothing') as e:
            load(hf_hub_id='me/nothing')
        assert 'hf_hub_filename' not in str(e.value)


def test_weights_of_the_originals_own_saver(golden):
    for name in ('joint', 'whitened'):  # written by torch 1.0
        state = torch.load(golden / f'tiny_container_{name}.pth', weights_only=True)
        assert set(state) == ({'model_state'} if name == 'whitened' else set(container({})))
    assert isinstance(torch.load(golden / 'tiny_container_joint.pth', weights_only=True)['extra']['beta'],
                      torch.nn.Parameter)


def test_densenet_weights_are_not_taken_for_the_originals(tmp_path):
    # its names begin with features. and end in classifier.weight, as the original's do
    trunk = timm.create_model('densenet121', num_classes=4)
    path = write(tmp_path / 'w.pth', trunk.state_dict())
    model = timm.create_model('multigrain', trunk='densenet121', num_classes=4, checkpoint_path=path)
    assert torch.equal(model.trunk.features.conv0.weight, trunk.features.conv0.weight)
    assert torch.equal(model.head.fc.weight, trunk.classifier.weight)


@pytest.mark.slow
def test_the_import_stays_cheap():
    code = 'import sys, timm; before = set(sys.modules); import timm_multigrain; print(*(set(sys.modules) - before))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'timm_multigrain.models.registry' in out and 'timm_multigrain.models.pretrained' not in out
    assert not {'timm_multigrain.models.download', 'timm_multigrain.hub', 'timm_multigrain.hub.convert'} & set(out)
