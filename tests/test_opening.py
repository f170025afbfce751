"""Models by folder, file and name."""
import argparse

import pytest
import timm
import torch

from timm_multigrain.hub import save_pretrained
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.opening import open_model, weights_sha256

from .tiny import image_for, tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(tiny_model(), tmp_path / 'model')


def test_folder(folder):
    model = tiny_model()
    for name in (folder, str(folder), f'local-dir:{folder}'):
        opened = open_model(name)
        assert not opened.training and torch.equal(opened(image_for(model)), model(image_for(model)))
        assert weights_sha256(opened) == weights_sha256(model)


def test_any_timm_model(monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kwargs: (
        asked.append((name, pretrained)), create(name, pretrained=False, **kwargs))[1])
    model = open_model('test_resnet.r160_in1k')
    assert isinstance(model, MultiGrain) and model.num_classes == 0 and model.global_pool == 'gem' and model.gem_p == 3
    assert asked == [('test_resnet.r160_in1k', True)]
    open_model('test_resnet', pretrained=False)
    assert asked[1:] == [('test_resnet', False)]


def test_folder_of_a_plain_timm_model(tmp_path):
    from timm.models import save_for_hf
    torch.manual_seed(0)
    plain = timm.create_model('test_resnet', num_classes=4).eval()
    save_for_hf(plain, str(tmp_path), safe_serialization=True)
    model = open_model(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.forward_features(x), plain.forward_features(x))


def test_checkpoint_of_a_plain_timm_model(tmp_path):
    plain = timm.create_model('test_resnet', num_classes=4, global_pool='avg').eval()
    args = argparse.Namespace(model='test_resnet', num_classes=4, gp=None, model_kwargs={})
    torch.save({'args': args, 'state_dict': plain.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(open_model(tmp_path / 'last.pth.tar').forward_features(x), plain.forward_features(x))
    args.model = 'test_byobnet'
    torch.save({'args': args, 'state_dict': plain.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
    with pytest.raises(ValueError, match='does not fit the test_byobnet'):
        open_model(tmp_path / 'last.pth.tar')


def test_registered_names():
    assert open_model('multigrain_resnet18', pretrained=False).num_classes == 1000
    assert open_model('multigrain_resnet18', pretrained=False, num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match='names no pretrained weights'):
        open_model('multigrain_resnet18')


@pytest.mark.parametrize('pool, kind, p', [
    ('gem', 'gem', 3), ('avg', 'gem', 1), ('mac', 'mac', None), ('spoc', 'spoc', None), ('rmac', 'rmac', None),
    ('crow', 'crow', None), ('max', 'gem', float('inf')), ('gem4', 'gem', 4)])
def test_pooling(folder, pool, kind, p):
    model = open_model(folder, pool=pool)
    assert (model.global_pool, model.gem_p) == (kind, p)
    assert torch.equal(model.head.fc.weight, tiny_model().head.fc.weight)


def test_exponent(folder):
    assert open_model(folder, p=4.5).gem_p == 4.5
    assert open_model(folder, pool='mac', p=None).gem_p is None
    with pytest.raises(ValueError, match='no exponent to set'):
        open_model(folder, pool='mac', p=2)
    with pytest.raises(ValueError, match='p > 0'):
        open_model(folder, p=-1)


def test_whitened(tmp_path):
    folder = save_pretrained(tiny_model(whitening=9), tmp_path / 'model')
    assert open_model(folder, pool='gem', p=3).whitened
    with pytest.raises(ValueError, match='whitened for its own pooling'):
        open_model(folder, pool='mac')
    with pytest.warns(UserWarning, match=r'whitened for p = 3\.0, not for 4'):
        open_model(folder, p=4)


def test_bad_names(tmp_path, folder):
    (tmp_path / 'x.pth').write_bytes(b'nothing')
    for name, error, message in (
            ('no/such/model', FileNotFoundError, 'is no folder, no file and no model of timm'),
            ('resnet9000', FileNotFoundError, 'is no folder, no file'),
            (tmp_path / 'x.pth', ValueError, 'no checkpoint that can be read'),
            (tmp_path, FileNotFoundError, r'has no config\.json')):
        with pytest.raises(error, match=message):
            open_model(name)
    with pytest.raises(ValueError, match='holds weights'):
        open_model(folder, pretrained=False)
    with pytest.raises(ValueError, match='Unknown global_pool'):
        open_model(folder, pool='sum')
    with pytest.raises(ValueError, match='gives a map'):
        open_model(folder, pool='')


def test_weights_sha256():
    model, other = tiny_model(), tiny_model()
    assert weights_sha256(model) == weights_sha256(other) != weights_sha256(tiny_model(1))
    other.head.fc.bias.data[0] += 1e-6
    assert weights_sha256(model) != weights_sha256(other)
    other = tiny_model()
    other.set_gem_p(4)
    assert weights_sha256(model) != weights_sha256(other)
    pooled = tiny_model(global_pool='mac')
    assert weights_sha256(pooled) != weights_sha256(model)
