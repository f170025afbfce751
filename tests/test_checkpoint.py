"""Original checkpoints through the filter: every reference number of the original implementation's forward."""
import math

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_multigrain
from timm_multigrain.models import checkpoint_filter_fn
from timm_multigrain.models.checkpoint import new_classifier

from . import original

SIZES = [(96, 96, 2), (64, 128, 2), (224, 160, 1), (97, 131, 1)]


@pytest.fixture(scope='module')
def reference(golden):
    return load_file(golden / 'forward.safetensors')


@pytest.fixture(scope='module')
def models():
    """Models with the reference weights, made once."""
    cache = {}

    def get(network, **kwargs):
        if network not in cache:
            cache[network] = _load(f'multigrain_{network}', original.state_dict(network))
        return cache[network]
    return get


def _load(name, state, **kwargs):
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, source=None), **kwargs).eval()


def _close(a, b, rel=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=rel * b.abs().max().item())


def test_rebuilt_inputs_are_the_reference_ones(shared_golden):
    inputs = load_file(shared_golden / 'forward_inputs.safetensors')
    for name, expected in inputs.items():
        height, width = map(int, name.removeprefix('input.').split('x'))
        torch.testing.assert_close(original.image(height, width, len(expected)), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize('network', ['resnet18', 'resnet50'])
@torch.inference_mode()
def test_forward(models, reference, network):
    model = models(network)
    for height, width, batch in SIZES:
        key = f'{network}.{height}x{width}.p3.0.'
        if key + 'logits' not in reference:
            continue
        x = original.image(height, width, batch)
        features = model.forward_features(x)
        _close(model.forward_head(features, pre_logits=True), reference[key + 'embedding'])
        _close(model(x), reference[key + 'logits'])
        _close(model.embed(x), reference[key + 'normalized'])
        if (height, width) == (96, 96):
            _close(features[:1], reference[f'{network}.96x96.features'])
    images = [original.image(96, 96, 2)[0], original.image(64, 128, 2)[1]]
    listed = reference[f'{network}.list.embedding']
    _close(model.embed(images), timm_multigrain.l2_normalize(listed))


@pytest.mark.parametrize('p', [1.0, 1.7, 3.0, math.inf])
@torch.inference_mode()
def test_exponent_of_the_checkpoint(reference, p):
    x = original.image(96, 96, 2)
    stored = torch.tensor(p) if p < 3 else torch.nn.Parameter(torch.tensor(p))
    model = _load('multigrain_resnet50', {**original.state_dict('resnet50'), 'pool.p': stored})
    assert model.gem_p == torch.tensor(p).item()
    _close(model(x), reference[f'resnet50.96x96.p{p}.logits'])
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    _close(embedding, reference[f'resnet50.96x96.p{p}.embedding'])


def test_integer_exponent_and_asked_for_exponent():
    state = {**original.state_dict('resnet18'), 'pool.p': torch.tensor(2)}
    assert _load('multigrain_resnet18', state).gem_p == 2.0
    assert _load('multigrain_resnet18', state, gem_p=4).gem_p == 4.0
    assert _load('multigrain_resnet18', state, global_pool='gem4').gem_p == 4.0
    learned = _load('multigrain_resnet18', state, gem_p=4, learn_p=True)
    assert learned.gem_p == 2.0 and isinstance(learned.head.pool.p, torch.nn.Parameter)


@pytest.mark.parametrize('network', ['resnet18', 'resnet50'])
@torch.inference_mode()
def test_whitened(reference, network):
    state = original.state_dict(network, whitened=True, p=1.7)
    model = _load(f'multigrain_{network}', state)
    x = original.image(96, 96, 2)
    embedding = reference[f'{network}.whitened.embedding']
    _close(model.forward_head(model.forward_features(x), pre_logits=True), embedding)
    _close(model(x), reference[f'{network}.whitened.logits'])
    _close(model.embed(x), timm_multigrain.l2_normalize(embedding))
    _close(model.embed(x, dim=64), timm_multigrain.l2_normalize(embedding[:, :64]))
    assert model.head_hidden_size == model.embed_dim == embedding.shape[1]


def test_cross_entropy_and_its_gradient_with_respect_to_p(reference):
    model = _load('multigrain_resnet18', original.state_dict('resnet18'), learn_p=True)
    loss = torch.nn.functional.cross_entropy(model(original.image(96, 96, 2)), torch.tensor([3, 700]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), reference['resnet18.cross_entropy_p3.0'], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        model.head.pool.p.grad, reference['resnet18.cross_entropy_grad_p'].reshape(1), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('network, sizes, rel', [
    ('senet154', [(96, 128), (97, 131)], 1e-5),
])
@torch.inference_mode()
def test_forward_of_large_networks(models, reference, network, sizes, rel):
    model = models(network)
    for height, width in sizes:
        key = f'{network}.{height}x{width}.p3.0.'
        x = original.image(height, width)
        _close(model.forward_head(model.forward_features(x), pre_logits=True), reference[key + 'embedding'], rel)
        _close(model(x), reference[key + 'logits'], rel)


@torch.inference_mode()
def test_containers_and_prefixes(models):
    state = original.state_dict('resnet18')
    x = original.image(64, 128, 2)
    expected = models('resnet18')(x)
    container = {'model_state': state, 'optimizer_state': {}, 'extra': {'beta': torch.nn.Parameter(torch.ones(()))}}
    for checkpoint in (
            container,
            {f'module.{k}': v for k, v in state.items()},
            {k.replace('features.', 'features.module.'): v for k, v in state.items()},
            models('resnet18').state_dict(),
    ):
        torch.testing.assert_close(_load('multigrain_resnet18', checkpoint)(x), expected, rtol=0, atol=0)


def test_files_of_the_original_saver(golden):
    # an 8-channel toy network: the filter finds the container and names the keys
    for name, whitened in (('joint', False), ('whitened', True)):
        container = torch.load(golden / f'tiny_container_{name}.pth', weights_only=True)
        assert 'model_state' in container
        model = timm.create_model('multigrain_resnet18', num_classes=5)
        state = checkpoint_filter_fn(container, model)
        assert model.whitened == whitened
        assert {k.split('.')[0] for k in state} == {'trunk', 'head'}
        assert ('head.whitening.proj' in state) == whitened


@torch.inference_mode()
def test_trunk_weights_of_timm():
    torch.manual_seed(0)
    trunk = timm.create_model('resnet18').eval()
    model = _load('multigrain_resnet18', trunk.state_dict())
    x = original.image(64, 64, 1)
    torch.testing.assert_close(model.forward_features(x), trunk.forward_features(x), rtol=0, atol=0)
    model.set_gem_p(1)
    torch.testing.assert_close(model(x), trunk(x))


def test_other_classes_channels_and_unknown_files():
    state = original.state_dict('resnet18')
    model = _load('multigrain_resnet18', state, num_classes=7, in_chans=1)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"neither a MultiGrain one nor weights of the trunk 'resnet18'.*conv1.weight"):
        _load('multigrain_resnet18', timm.create_model('convnext_atto').state_dict())
    with pytest.raises(ValueError, match="'surprise' does not belong"):
        _load('multigrain_resnet18', {**state, 'surprise': torch.zeros(1)})


def test_load_state_dict_takes_weights_of_the_trunk(tmp_path):
    trunk = timm.create_model('resnet10t', num_classes=7)
    path = tmp_path / 'timm.pth'
    torch.save({'state_dict': {f'module.{k}': v for k, v in trunk.state_dict().items()}}, path)
    model = timm.create_model('multigrain', trunk='resnet10t', num_classes=7, gem_p=2.5, checkpoint_path=path)
    assert torch.equal(model.trunk.layer2[0].conv1.weight, trunk.layer2[0].conv1.weight)
    assert torch.equal(model.head.fc.weight, trunk.fc.weight) and model.gem_p == 2.5
    with pytest.raises(RuntimeError, match='size mismatch'):  # as timm's own models answer
        timm.create_model('multigrain', trunk='resnet10t', num_classes=6, checkpoint_path=path)
    with pytest.raises(ValueError, match='neither a MultiGrain one'):
        model.load_state_dict({'blocks.0.weight': torch.zeros(1)})


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.module.'])
def test_prefixes_of_wrappers(prefix):
    trunk = timm.create_model('resnet10t', num_classes=7)
    model, other = (timm.create_model('multigrain', trunk='resnet10t', num_classes=7) for _ in range(2))
    for source in (trunk, other):
        model.load_state_dict({f'{prefix}{k}': v for k, v in source.state_dict().items()})
        convolution = (source.trunk if source is other else source).layer2[0].conv1.weight
        assert torch.equal(model.trunk.layer2[0].conv1.weight, convolution)
        assert torch.equal(model.head.fc.weight, source.get_classifier().weight)


def test_part_of_a_state_dict_loads_as_torch_does():
    model = timm.create_model('multigrain', trunk='resnet10t', num_classes=2)
    head = {'head.fc.bias': torch.tensor([3., 4.])}
    found = model.load_state_dict(head, strict=False)
    assert found == torch.nn.Module.load_state_dict(model, head, strict=False)
    assert 'head.fc.weight' in found.missing_keys
    assert model.head.fc.bias.tolist() == [3, 4]
    found = model.load_state_dict({'trunk.bn1.bias': torch.ones(64), 'head.unknown': torch.ones(1)}, strict=False)
    assert found.unexpected_keys == ['head.unknown'] and model.trunk.bn1.bias.sum() == 64
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({'head.fc.bias': torch.zeros(2)})


def test_starting_weights_of_other_classes(caplog, tmp_path):
    """What train.py starts from may be of other classes; what validate.py tests may not."""
    caplog.set_level('INFO')
    trunk = timm.create_model('resnet10t', num_classes=9)
    sources = [trunk, timm.create_model('multigrain', trunk='resnet10t', num_classes=9, gem_p=2.5),
               timm.create_model('multigrain', trunk='resnet10t', num_classes=0)]
    for number, source in enumerate(sources):
        path = tmp_path / f'{number}.pth'
        torch.save(source.state_dict(), path)
        torch.manual_seed(0)
        fresh = timm.create_model('multigrain', trunk='resnet10t', num_classes=4)
        torch.manual_seed(0)
        with new_classifier():
            model = timm.create_model('multigrain', trunk='resnet10t', num_classes=4, checkpoint_path=path)
        assert torch.equal(model.head.fc.weight, fresh.head.fc.weight)
        convolution = (source.trunk if number else source).conv1[0].weight
        assert torch.equal(model.trunk.conv1[0].weight, convolution)
        assert f'{"no" if number == 2 else 9} classes, the model 4: its classifier starts anew' in caplog.text
        caplog.clear()
        if number < 2:
            with pytest.raises(RuntimeError, match=r'size mismatch for head\.fc\.weight'):
                timm.create_model('multigrain', trunk='resnet10t', num_classes=4, checkpoint_path=path)
            with new_classifier():  # of as many classes it is taken
                model = timm.create_model('multigrain', trunk='resnet10t', num_classes=9, checkpoint_path=path)
            assert torch.equal(model.head.fc.weight, source.get_classifier().weight)
            assert 'anew' not in caplog.text and model.gem_p == (3, 2.5)[number]


@pytest.mark.parametrize('key, value', [
    ('features.layer1.0.conv1.weight', math.nan), ('features.bn1.running_var', math.inf),
    ('features.bn1.bias', -math.inf), ('classifier.weight', math.nan)])
def test_values_that_are_not_finite_are_named(key, value):
    state = original.state_dict('resnet18')
    state[key] = state[key].clone()
    state[key].view(-1)[3] = value
    ours = key.replace('features.', 'trunk.').replace('classifier.', 'head.fc.')
    with pytest.raises(ValueError, match=rf"'{ours}' in the checkpoint holds {'NaN' if math.isnan(value) else 'inf'}"):
        _load('multigrain_resnet18', state)
    with pytest.raises(ValueError, match='only p > 0'):
        _load('multigrain_resnet18', {**original.state_dict('resnet18'), 'pool.p': torch.tensor(0.0)})


def test_exponent_as_a_number_and_for_each_channel():
    state = original.state_dict('resnet18')
    for p in (2.5, 2, torch.tensor([2.0])):
        assert _load('multigrain_resnet18', {**state, 'pool.p': p}).gem_p == float(p)
    each = torch.linspace(1, 4, 512)
    assert _load('multigrain_resnet18', {**state, 'pool.p': torch.tensor(2.5)}, per_channel_p=True).gem_p == [2.5] * 512
    model = timm.create_model('multigrain_resnet18', per_channel_p=True)
    with torch.no_grad():
        model.head.pool.p.copy_(each)
    assert _load('multigrain_resnet18', model.state_dict(), per_channel_p=True).gem_p == each.tolist()
    with pytest.raises(RuntimeError, match=r'head\.pool\.p'):
        _load('multigrain_resnet18', model.state_dict())


def test_checkpoints_without_weights():
    for checkpoint in ({'epoch': 3}, {'model_state': {}, 'extra': {}}, {'model_state': None}):
        with pytest.raises(ValueError, match=r'holds no weights, only entries such as \['):
            checkpoint_filter_fn(checkpoint, timm.create_model('multigrain_resnet18'))
