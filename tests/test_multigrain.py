"""MultiGrain models keep timm's conventions: what timm's own model tests ask of every model, and what is ours."""
import copy
import io

import pytest
import timm
import torch
from PIL import Image
from timm.models import group_parameters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import timm_multigrain
from timm_multigrain.hub import save_pretrained
from timm_multigrain.layers import GeM
from timm_multigrain.models.trunk import create_trunk, find_input_sizes

NAMES = timm.list_models('multigrain*')
SMALL = ['multigrain_resnet18', 'multigrain_efficientnet_b0', 'multigrain_convnext_tiny']
VIT = 'multigrain_vit_small_patch14_dinov2'


def _size(name, size=64):
    return (56, 84) if name == VIT else (size, size)


def _small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize('name', NAMES)
def test_structure_without_weights(name):
    """Everything about every model that its shapes tell, on the meta device."""
    model = timm.create_model(name, device='meta').eval()
    cfg = model.pretrained_cfg
    state = model.state_dict()
    assert f'{cfg["first_conv"]}.weight' in state and f'{cfg["classifier"]}.weight' in state
    assert model.get_classifier(name_only=True) == cfg['classifier']
    x = torch.empty(2, *cfg['input_size'], device='meta')
    features = model.forward_features(x)
    channel = {'NCHW': 1, 'NHWC': 3, 'NLC': 2}[model.output_fmt]
    assert features.shape[channel] == model.num_features
    if cfg.get('pool_size'):
        assert features.shape[2:] == cfg['pool_size']
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, 1000)
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape
    model.reset_classifier(5)  # GeM comes back with the classes
    assert isinstance(model.head.pool, GeM) and model(x).shape == (2, 5)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {'meta'}
    with pytest.raises(TypeError):
        timm.create_model(name, device='meta', not_a_model_arg=1)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert len(set(groups.values())) > 2 and groups['head.fc.weight'] == max(groups.values())
    assert all(n.split('.')[0] in ('trunk', 'head') for n in model.no_weight_decay())


def test_layer_groups_are_those_of_the_trunk():
    model = timm.create_model('multigrain_convnext_tiny', device='meta')
    trunk = group_parameters(model.trunk, model.trunk.group_matcher(), reverse=True)
    own = group_parameters(model, model.group_matcher(), reverse=True)
    order = sorted(trunk, key=trunk.get)
    assert sorted(order, key=lambda n: own[f'trunk.{n}']) == order


@pytest.mark.parametrize('name', [*SMALL, VIT])
@torch.no_grad()
def test_intermediates_and_features_only(name):
    model = _small(name).eval()
    x = torch.randn(2, 3, *_size(name))
    last, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    assert [i.shape[1] for i in intermediates] == [info['num_chs'] for info in model.feature_info]
    backbone = _small(name, features_only=True).eval()
    backbone.model.set_grad_checkpointing()
    assert [f.shape[1] for f in backbone(x)] == backbone.feature_info.channels()
    for feature, intermediate in zip(backbone(x), intermediates, strict=True):
        torch.testing.assert_close(feature, intermediate)
    modules = dict(model.named_modules())
    assert all(info['module'] in modules for info in model.feature_info)


def test_creation_of_fake_tensors():
    for kwargs in ({}, {'global_pool': 'gem4'}, {'per_channel_p': True, 'whitening': 16}, {'global_pool': 'rmac'}):
        with FakeTensorMode():
            model = timm.create_model('multigrain', trunk='test_resnet', num_classes=3, **kwargs)
            assert type(model.head.fc.weight) is FakeTensor and model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
            assert model.embed(torch.randn(1, 3, 64, 70)).shape == (1, model.embed_dim) and 'MultiGrain' in repr(model)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['multigrain_resnet18', 'multigrain_convnext_tiny'])
@torch.no_grad()
def test_script_fx_compile_deepcopy_channels_last(name):
    model = _small(name).eval()
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    with timm.layers.set_scriptable(True):
        scripted = torch.jit.script(_small(name).eval())
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert model.embed(x).dtype == torch.float32
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16 and model.gem_p == 3.0


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='torch 2.6 exports ONNX of fixed sides')
@pytest.mark.slow
def test_onnx_with_dynamic_sides(tmp_path):
    pytest.importorskip('onnxscript')
    ort = pytest.importorskip('onnxruntime')
    model = _small('multigrain_resnet18', num_classes=10).eval()
    path = tmp_path / 'model.onnx'
    dims = {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(
        model, (torch.randn(2, 3, 96, 64),), str(path), input_names=['input'], dynamo=True, dynamic_shapes=(dims,),
        verbose=False)
    session = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for size in ((96, 64), (64, 128)):
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            expected = model(x)
        out = torch.from_numpy(session.run(None, {'input': x.numpy()})[0])
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('trunk, kwargs, size, steps', [
    ('vit_small_patch14_dinov2', dict(depth=1), (336, 504), 14), ('test_vit', {}, (336, 496), 16),
    ('swin_tiny_patch4_window7_224', dict(depths=(1, 1, 1, 1)), (332, 500), 4),
    ('eva02_tiny_patch14_224', dict(depth=1), (336, 504), 14), ('xcit_nano_12_p8_224', dict(depth=1), (333, 500), 1),
    ('test_convnext', {}, (333, 500), 1), ('test_efficientnet', {}, (333, 500), 1),
    ('mobilevit_xxs', {}, (333, 500), 1),
    ('maxvit_pico_rw_256', {}, (256, 512), 256), ('beit_base_patch16_224', dict(depth=1), (224, 224), None),
    ('cait_xxs24_224', dict(depth=1), (224, 224), None)])
@torch.no_grad()
def test_images_of_any_size(trunk, kwargs, size, steps, tmp_path):
    """333 x 500 pixels become the nearest multiples of patch, window or stride, or the one size the trunk is for."""
    torch.manual_seed(0)
    model = timm.create_model('multigrain', trunk=trunk, num_classes=3, **kwargs).eval()
    assert model.input_sizes.step == steps and model.input_sizes.nearest(333, 500) == size
    assert model.training is False and model.trunk.training is False
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 9, 12), size=(333, 500), mode='bicubic')
    found = model.embed([image[0], torch.rand(3, 70, 140)])
    assert found.shape == (2, model.embed_dim)
    taken = torch.nn.functional.interpolate(image, size=size, mode='bilinear', antialias=True)
    embedding = model.forward_head(model.forward_features(taken), pre_logits=True)
    torch.testing.assert_close(found[:1], timm_multigrain.l2_normalize(embedding), rtol=1e-4, atol=1e-5)
    again = timm.create_model(f'local-dir:{save_pretrained(model, tmp_path / "model")}', pretrained=True).eval()
    assert torch.equal(again.embed(image), model.embed(image)) and again.input_sizes == model.input_sizes


@pytest.mark.parametrize('trunk, step', [
    ('hrnet_w18_small', 32), ('tresnet_m', 4), ('levit_128s', None), ('coatnet_rmlp_nano_rw_224', None),
    ('mvitv2_tiny', None), ('hiera_tiny_224', None)])
def test_input_sizes_are_not_met_by_chance(trunk, step):
    """Sizes that have as many positions, round to as many cells, or read beyond a table of positions."""
    with torch.device('meta'):
        assert find_input_sizes(create_trunk(trunk)).step == step


def test_reset_classifier_keeps_the_pooling_and_its_exponent():
    model = _small('multigrain_resnet18', gem_p=2.2, per_channel_p=False).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        for steps in ([(5, None)], [(5, 'gem')], [(0, ''), (5, None)], [(0, ''), (0, 'gem')]):
            for step in steps:
                model.reset_classifier(*step)
            torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
        model.reset_classifier(5, 'gem4')
        assert model.gem_p == 4 and model(x).shape == (2, 5)
        with pytest.raises(ValueError, match="Unknown global_pool 'nothing'"):
            model.reset_classifier(5, 'nothing')
        assert model.gem_p == 4 and model.global_pool == 'gem'  # a refused change changes nothing
    frozen = _small('multigrain_resnet18').requires_grad_(False)
    frozen.reset_classifier(0, '')
    assert not [p for p in frozen.parameters() if p.requires_grad]
    model.double().reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float64 and not model.head.fc.training


@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_pruned_trunk_gets_a_head_of_its_width(name):
    model = _small(name).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    last = len(model.feature_info) - 1
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(whole(x), expected)
    tap = model.forward_intermediates(x, intermediates_only=True)[last - 1]
    model.prune_intermediate_layers([last - 1], prune_norm=True)
    torch.testing.assert_close(model(x), tap)
    model.reset_classifier(7, 'avg')
    assert model.head_hidden_size == model.embed_dim == model.num_features == tap.shape[1]
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model.forward_head(tap, pre_logits=True), tap.mean((2, 3)))


@pytest.mark.parametrize('kwargs, message', [
    (dict(trunk='resnet5'), r"Unknown trunk 'resnet5'\. Did you mean resnet"),
    (dict(trunk='zzz'), r"Unknown trunk 'zzz'\. timm.list_models"),
    (dict(trunk='multigrain_resnet18'), 'is a MultiGrain model itself'),
    (dict(trunk='crossvit_9_240'), "'crossvit_9_240'"),
    (dict(trunk='resnet18', gem_p=0), 'p > 0, got 0'),
    (dict(trunk='resnet18', gem_p='three'), "'three'"),
    (dict(trunk='resnet18', global_pool='catavgmax'), "Unknown global_pool 'catavgmax'"),
    (dict(trunk='resnet18', global_pool=''), 'not an input for 1000 classes'),
    (dict(trunk='resnet18', global_pool='mac', gem_p=2), "'mac' and gem_p=2 disagree"),
    (dict(trunk='resnet18', whitening=600), 'choose 1 to 513'),
    (dict(trunk='resnet18', global_pool='gem-3'), 'gem-3'),
    (dict(trunk='resnet18', global_pool='gem4', gem_p=2), "'gem4' and gem_p=2 disagree"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm_multigrain.MultiGrain(**kwargs)


@torch.no_grad()
def test_embed():
    model = _small('multigrain_resnet18').eval()
    x = torch.randn(3, 3, 64, 64)
    embedding = model.embed(x)
    raw = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(embedding, raw / (raw.norm(dim=1, keepdim=True) + 1e-6))
    torch.testing.assert_close(model.embed(list(x)), embedding, rtol=1e-4, atol=1e-6)
    assert model.embed([x[0], torch.randn(3, 40, 90)]).shape == (2, 512)
    for bad, message in (
            (lambda: model.embed([]), 'empty list'),
            (lambda: model.embed(x[0]), r'takes images \(N, 3, H, W\).* got torch.float32 of shape \(3, 64, 64\)'),
            (lambda: model.embed(x.permute(0, 2, 3, 1)), r'got torch.float32 of shape \(3, 64, 64, 3\)'),
            (lambda: model.embed(x.to(torch.uint8)), 'got torch.uint8 of shape'),
            (lambda: model.embed([x[0], x[1, :1]]), r'got torch.float32 of shape \(1, 1, 64, 64\)'),
            (lambda: model.embed(x.numpy()), 'got ndarray'),
            (lambda: model.embed([Image.new('RGB', (64, 64))]), 'got Image'),
            (lambda: model.embed(x, dim=16), 'not whitened')):
        with pytest.raises(ValueError, match=message):
            bad()
    whitened = _small('multigrain_resnet18', whitening=64).eval()
    assert whitened.embed(x, dim=16).shape == (3, 16) and whitened.embed(x).shape == (3, 64)
    with pytest.raises(ValueError, match='dim=65'):
        whitened.embed(x, dim=65)


def test_class_and_register_multigrain():
    name = timm_multigrain.register_multigrain('resnet10t')
    assert name == timm_multigrain.register_multigrain('resnet10t') == 'multigrain_resnet10t'
    model = timm.create_model(name, num_classes=3)
    direct = timm_multigrain.MultiGrain('resnet10t', num_classes=3)
    assert model.state_dict().keys() == direct.state_dict().keys()
    assert model.pretrained_cfg['architecture'] == 'multigrain'
    assert model._model_args['trunk'] == direct._model_args['trunk'] == 'resnet10t'
    with pytest.raises(ValueError, match="Unknown trunk 'nonsense'"):
        timm_multigrain.register_multigrain('nonsense')


def test_set_input_size():
    _small('multigrain_resnet18').set_input_size((96, 96))  # fully convolutional: nothing to change
    vit = _small('multigrain', trunk='vit_tiny_patch16_224', num_classes=3)
    vit.set_input_size(img_size=96)
    assert vit(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    assert timm.models.get_model_args(vit)['img_size'] == (96, 96)
