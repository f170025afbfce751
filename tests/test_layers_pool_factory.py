"""`global_pool='gem'` in timm: names, every way in, every family of models, and nothing else changed."""
import copy
import math
import pickle
import sys

import pytest
import timm
import torch
from timm.layers import ClNormMlpClassifierHead, SelectAdaptivePool2d
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from timm_multigrain.layers import MAC, RMAC, CroW, GeM, SPoC, create_pool, gem, is_multigrain_pool, pool_factory

from .test_layers_gem import random_map

NATIVE = ('', 'avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax')
SCRIPT = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')


@pytest.fixture(autouse=True)
def installed():
    pool_factory.install()


def gems(model):
    return [m for m in model.modules() if isinstance(m, GeM)]


# --- names


@pytest.mark.parametrize('name, p, learn_p', [
    ('gem', 3, False), ('gem2.5', 2.5, False), ('gem1', 1, False), ('geminf', math.inf, False), ('gem_learn', 3, True),
    ('gem2.5_learn', 2.5, True)])
def test_gem_by_name(name, p, learn_p):
    pool = create_pool(name, input_fmt='NLC', flatten=False, num_prefix_tokens=2)
    assert is_multigrain_pool(name) and type(pool) is GeM and (pool.p, pool.learn_p) == (p, learn_p)
    assert (pool.input_fmt, pool.flatten, pool.num_prefix_tokens) == ('NLC', False, 2)
    assert list(pool.state_dict()) == (['p'] if learn_p else [])


def test_other_names():
    for name, layer in (('mac', MAC), ('spoc', SPoC), ('rmac', RMAC), ('crow', CroW)):
        assert is_multigrain_pool(name) and type(create_pool(name)) is layer
    for name in ('gem-3', 'gem0', 'gemx', 'gem_', 'gem3x', 'gem.5', 'gem3.', 'geminf_learn', 'gemnan', 'gem 3', 'GeM',
                 'gem+3', 'gem1e2', 'gem\n', 'avg', ''):
        assert not is_multigrain_pool(name)
        with pytest.raises(ValueError, match=r"'gem' \(p = 3\).*'gem2.5'.*'geminf', 'gem_learn'.*'mac', 'spoc'"):
            create_pool(name)
    assert not is_multigrain_pool(None)


# --- timm's layers


@SCRIPT
@pytest.mark.parametrize('name, input_fmt, flatten', [
    ('gem2.5', 'NCHW', True), ('gem_learn', 'NCHW', False), ('gem', 'NHWC', True), ('mac', 'NCHW', True),
    ('rmac', 'NHWC', False), ('crow', 'NCHW', True)])
def test_select_adaptive_pool(name, input_fmt, flatten):
    x = random_map(2, 5, 4, 6)
    x = x if input_fmt == 'NCHW' else x.permute(0, 2, 3, 1)
    layer = SelectAdaptivePool2d(pool_type=name, flatten=flatten, input_fmt=input_fmt)
    expected = create_pool(name, input_fmt=input_fmt, flatten=flatten)(x)
    for other in (layer, SelectAdaptivePool2d(1, name, flatten, input_fmt), torch.jit.script(layer),
                  torch.fx.symbolic_trace(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    assert layer.pool_type == name and layer.feat_mult() == 1 and not layer.is_identity()
    assert f'pool_type={name}' in repr(layer)


def test_select_adaptive_pool_refuses():
    with pytest.raises(ValueError, match=r"'gem' pools to a single cell, got output_size=\(2, 2\)"):
        SelectAdaptivePool2d((2, 2), 'gem')
    with pytest.raises(ValueError, match="Unknown pooling 'gem-3', expected 'gem'"):
        SelectAdaptivePool2d(pool_type='gem-3')
    with pytest.raises(AssertionError, match='Invalid pool type: median'):
        SelectAdaptivePool2d(pool_type='median')


def test_native_names_are_timms():
    for name in NATIVE:
        for flatten, input_fmt in ((True, 'NCHW'), (False, 'NHWC')):
            kwargs = {'pool_type': name, 'flatten': flatten, 'input_fmt': input_fmt}
            if input_fmt == 'NHWC' and name and not name.startswith('fast'):
                kwargs['pool_type'] = f'fast{name}'
            plain = SelectAdaptivePool2d.__new__(SelectAdaptivePool2d)
            SelectAdaptivePool2d.__init__.__wrapped__(plain, **kwargs)
            layer, x = SelectAdaptivePool2d(**kwargs), random_map(2, 4, 4, 4)
            assert vars(layer).keys() == vars(plain).keys() and repr(layer) == repr(plain)
            assert torch.equal(layer(x), plain(x))


@SCRIPT
@pytest.mark.parametrize('input_fmt, hidden', [('NHWC', None), ('NLC', 5)])
def test_channels_last_head(input_fmt, hidden):
    x = random_map(2, 3, 4, 6)
    x = x if input_fmt == 'NHWC' else x.flatten(1, 2)
    dim = (1, 2) if input_fmt == 'NHWC' else (1,)
    head = ClNormMlpClassifierHead(6, 4, hidden, pool_type='gem4', input_fmt=input_fmt).eval()
    expected = head.fc(head.pre_logits(head.norm(gem(x, 4., dim=dim))))
    assert head.pool_type == 'gem4'
    assert list(head.state_dict()) == list(ClNormMlpClassifierHead(6, 4, hidden).state_dict())
    for other in (head, torch.jit.script(head), copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(x), expected)
    head.train().reset(4, 'gem_learn')
    assert 'pool.p' in head.state_dict() and head.pool.training
    head.eval().reset(3, 'gem2.5')
    assert not head.pool.training and head(x).shape == (2, 3) and 'pool.p' not in head.state_dict()
    head.reset(5)
    assert head.pool_type == 'gem2.5' and torch.equal(head._global_pool(x), gem(x, 2.5, dim=dim))
    head.reset(5, 'avg')
    assert type(head) is ClNormMlpClassifierHead and not gems(head) and not hasattr(head, 'pool')
    assert torch.equal(head._global_pool(x), x.mean(dim))
    with pytest.raises(ValueError, match="Unknown pooling 'gem-3'"):
        head.reset(4, 'gem-3')
    head.reset(4, 'gem')
    with pytest.raises(AssertionError, match='Only avg, max or avgmax'):
        head.reset(4, 'catavgmax')
    assert head.pool_type == '' and not gems(head)


TINY = {'img_size': 32, 'patch_size': 8, 'embed_dim': 16, 'depth': 1, 'num_heads': 2, 'num_classes': 4}


def make_vit(name, **kwargs):
    return VisionTransformer(**TINY, global_pool=name, reg_tokens=2, **kwargs).eval()


def make_eva(name, **kwargs):
    return Eva(**TINY, global_pool=name, num_reg_tokens=2, **kwargs).eval()


@SCRIPT
@pytest.mark.parametrize('make', [make_vit, make_eva])
class TestTokens:

    def test_prefix_tokens_are_left_out(self, make):
        torch.manual_seed(0)
        model, x = make('gem2.5'), random_map(2, 3, 32, 32)
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 3 + 16, 16)
        expected = model.head(model.fc_norm(gem(tokens[:, 3:], 2.5, dim=(1,))))
        assert torch.equal(model(x), expected) and model.global_pool == 'gem2.5'
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        tokens[:, :3] = 1e3
        assert torch.equal(model.forward_head(tokens), expected)

    def test_built_as_for_avg(self, make):
        assert list(make('gem').state_dict()) == list(make('avg').state_dict())
        assert set(make('gem_learn').state_dict()) - set(make('avg').state_dict()) == {'attn_pool.p'}
        assert list(make('gem', **{'fc_norm' if make is make_vit else 'use_fc_norm': False}).state_dict()) == \
            list(make('token').state_dict())

    @pytest.mark.parametrize('start', ['token', 'avg', 'map', '', 'gem_learn'])
    def test_resets(self, make, start):
        model, x = make(start), random_map(1, 3, 32, 32)
        model.reset_classifier(7, 'gem4')
        assert model.global_pool == 'gem4' and [m.p.item() for m in gems(model)] == [4] and model(x).shape == (1, 7)
        assert not any(k.startswith('attn_pool') for k in model.state_dict())
        model.reset_classifier(3)
        assert model.global_pool == 'gem4' and model(x).shape == (1, 3)
        tokens = model.forward_features(x)
        for name, pooled in (('token', tokens[:, 0]), ('avg', tokens[:, 3:].mean(1)), ('max', tokens[:, 3:].amax(1))):
            model.reset_classifier(3, name)
            assert model.global_pool == name and not gems(model) and torch.equal(model.pool(tokens), pooled)
            model.reset_classifier(3, 'gem')
        model.reset_classifier(0, '')
        assert model(x).shape == (1, 19, 16) and not gems(model)

def test_a_timm_of_other_seams_is_refused_and_left(monkeypatch):
    methods = [getattr(seam.find(), name) for seam in pool_factory._SEAMS for name in seam.wraps]
    pool_factory.install()  # twice wraps once
    assert methods == [getattr(seam.find(), name) for seam in pool_factory._SEAMS for name in seam.wraps]
    assert len(methods) == 7 and not any(hasattr(m.__wrapped__, '__wrapped__') for m in methods)
    original = SelectAdaptivePool2d.__init__.__wrapped__
    for what, owner, name, new in (
            ('eva.Eva', sys.modules['timm.models.eva'], 'Eva', None), ('eva.Eva', Eva, 'pool', None),
            ('ClNormMlpClassifierHead .*reset does not use pool_type', ClNormMlpClassifierHead, 'reset',
             lambda self, num_classes, pooling=None: None),
            ('VisionTransformer .*pool does not use attn_pool, num_prefix_tokens', VisionTransformer, 'pool',
             lambda self, x: x.mean(1))):
        with monkeypatch.context() as patch:
            patch.setattr(SelectAdaptivePool2d, '__init__', original)
            patch.setattr(owner, name, new)
            with pytest.raises(RuntimeError, match=f'is built on what .*{what}.*install timm'):
                pool_factory.install()
            assert SelectAdaptivePool2d.__init__ is original


# Families that pool in code of their own and refuse any other name than theirs.
UNSUPPORTED = {
    'beit', 'cait', 'coat', 'convit', 'cpubone', 'crossvit', 'deepseek_vit', 'efficientformer', 'efficientformer_v2',
    'efficientvim', 'gemma4_vit', 'iformer', 'levit', 'mlp_mixer', 'mvitv2', 'naflexvit', 'pit', 'pvt_v2', 'qwen3_vit',
    'repvit', 'swiftformer', 'tnt', 'twins', 'vision_transformer_relpos', 'volo', 'xcit'}
SMALL = ('test_', 'atto', 'femto', 'pico', 'nano', 'tiny', 'xxs', '18', 'b0', 'm0', 't0', 'mini', 'small', '_s')


@pytest.mark.slow
@pytest.mark.parametrize('family', [m for m in timm.list_modules() if hasattr(timm.models, m)])
def test_family(family):
    """Its smallest model by name, built without memory on the meta device; the forward goes through GeM, once."""
    name = min(timm.list_models(module=family), key=lambda name: (
        next((i for i, part in enumerate(SMALL) if part in name), len(SMALL)), len(name), name))
    with torch.device('meta'):
        if family in UNSUPPORTED:
            with pytest.raises(AssertionError):
                timm.create_model(name, global_pool='gem', num_classes=10)
            return
        model = timm.create_model(name, global_pool='gem', num_classes=10).eval()
        if name == 'mobilenetv5_300m_enc':  # takes any option, and has neither pooling nor classifier
            return
        features = model.forward_features(torch.empty(1, *model.pretrained_cfg['input_size']))
        for _ in range(2):
            calls = []
            pool, = gems(model)
            pool.register_forward_hook(lambda *args, calls=calls: calls.append(args))
            assert model.forward_head(features).shape == (1, 10) and len(calls) == 1
            model.reset_classifier(10, 'avg')
            assert not gems(model)
            model.reset_classifier(10, 'gem')
