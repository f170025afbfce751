"""The NASNet trunks: the original's padding by its definition, and its reference numbers with odd and even sizes."""
import copy
import json

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import group_parameters

from timm_multigrain.models.trunk import create_trunk

from . import original
from .original import close

BODY = 'features.0.base_net.'


def _check_forward(model, reference, network, sizes, rel):
    for height, width in sizes:
        key = f'{network}.{height}x{width}.p3.0.'
        features = model.forward_features(original.image(height, width))
        embedding = model.forward_head(features, pre_logits=True)
        close(embedding, reference[key + 'embedding'], rel)
        close(model.head.classify(embedding), reference[key + 'logits'], rel)


def _mobile(num_classes=1000):
    torch.manual_seed(0)
    model = timm.create_model('multigrain', trunk='nasnetamobile', num_classes=num_classes).eval()
    for module in model.modules():  # every layer counts, and rows of a batch differ
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.6, 1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model


def _side_of_map(side):
    """Side of NASNet-A-Mobile's last map: a 3x3 convolution of stride 2, then four halvings, the first of them up."""
    side = (side - 1) // 2
    for down in (False, True, True, True):
        side = side // 2 if down else -(-side // 2)
    return side


@pytest.fixture(scope='module')
def mobile():
    """NASNet-A-Mobile with the reference weights under the original's keys, filled from the names of the model."""
    model = timm.create_model('multigrain', trunk='nasnetamobile', num_classes=1001).eval()
    keys = {f'{BODY}{k}': tuple(v.shape) for k, v in model.trunk.state_dict().items()}
    keys.update({f'{name}.{part}': (1001, 1056)[:n] for name in (f'{BODY}last_linear', 'classifier')
                 for part, n in (('weight', 2), ('bias', 1))}, **{'pool.p': ()})
    state = {key: original.fill(key, shape) for key, shape in keys.items()}
    assert model.load_state_dict(state) == ([], [])
    return model, keys


@torch.inference_mode()
def test_forward_of_nasnetamobile(mobile, golden):
    reference = load_file(golden / 'forward_nasnetamobile.safetensors')
    _check_forward(mobile[0], reference, 'nasnetamobile', [(96, 128), (97, 131)], 1e-5)


@torch.inference_mode()
def test_all_keys_and_numbers_of_nasnetamobile(mobile, shared_golden):
    model, keys = mobile
    stored = json.loads((shared_golden / 'checkpoint_keys_nasnetamobile.json').read_text())['without_whitening']
    assert keys == {key: tuple(shape) for key, (shape, _) in stored.items()}
    reference = load_file(shared_golden / 'forward_other.safetensors')
    for height, width in ((96, 128), (97, 131)):
        normalized = reference[f'nasnetamobile.{height}x{width}.p3.0.normalized']
        close(model.embed(original.image(height, width)), normalized, 1e-5)


@pytest.mark.slow
@torch.inference_mode()
def test_forward_of_pnasnet5large(golden):
    reference = load_file(golden / 'forward.safetensors')
    model = timm.create_model('multigrain_pnasnet5large').eval()
    model.load_state_dict(original.state_dict('pnasnet5large'))
    # float32 rounding grows through the cells: the original itself differs by 5e-5 between releases of torch
    _check_forward(model, reference, 'pnasnet5large', [(96, 128), (97, 131), (139, 107), (331, 331)], 1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_restored_padding_of_pnasnet5large():
    restored = create_trunk('pnasnet5large').eval()
    x = torch.randn(1, 3, 97, 131)
    last, taps = restored.forward_intermediates(x)
    assert torch.equal(last, restored(x)) and torch.equal(taps[-1], last)
    assert [tuple(t.shape[2:]) for t in taps] == [(48, 65), (24, 33), (12, 17), (6, 8), (3, 4)]
    traced = torch.fx.symbolic_trace(restored)
    for size in ((97, 131), (64, 96)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(traced(x), restored(x))
    torch.testing.assert_close(torch.jit.script(restored)(x), restored(x))


@pytest.mark.slow
def test_size_of_the_map_for_every_remainder_of_32():
    trunk = create_trunk('nasnetamobile', device='meta').eval()
    for side in range(64, 80):
        out = trunk(torch.empty(1, 3, side, side + 16, device='meta'))
        assert out.shape[2:] == (_side_of_map(side), _side_of_map(side + 16))


@torch.no_grad()
def test_nasnetamobile_as_a_timm_model():
    model = timm.create_model('nasnetamobile', num_classes=5, drop_rate=0.2).eval()
    x = torch.randn(2, 3, 96, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.last_linear(features.mean((2, 3))))
    model.reset_classifier(0, '')
    assert torch.equal(model(x), features) and features.shape == (2, 1056, 3, 2) and features.min() >= 0
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('nasnetamobile', pretrained=True)


@pytest.mark.slow
@torch.no_grad()
def test_intermediates_pruning_and_layer_order_of_nasnetamobile():
    model = _mobile()
    x = torch.randn(1, 3, 65, 97)
    expected = model.forward_features(x)
    last, taps = model.forward_intermediates(x)
    assert torch.equal(last, expected) and torch.equal(taps[-1], expected)
    assert [tuple(t.shape[1:]) for t in taps] == [
        (32, 32, 48), (44, 16, 24), (264, 8, 12), (528, 4, 6), (1056, 2, 3)]
    for i in range(5):
        stopped, (tap,) = model.forward_intermediates(x, indices=[i], stop_early=True)
        assert torch.equal(tap, taps[i]) and torch.equal(stopped, tap)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i - 5]) == [i]
        assert torch.equal(pruned(x), tap) and pruned.num_features == tap.shape[1]
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [groups[f'trunk.{name}.{leaf}'] for name in model.trunk.layer_names
             for leaf in (('conv.weight',) if name == 'conv0' else ('conv_1x1.conv.weight',))]
    # as in timm's NASNet-A-Large, a reduction cell shares the group of the cell behind it
    assert order == [0, 0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 10, 11, 12]
    assert groups['head.fc.weight'] == max(groups.values())


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='torch 2.6 exports the crop for the sizes shown')
@pytest.mark.slow
@torch.no_grad()
def test_script_fx_compile_export_of_nasnetamobile():
    """Of a cell that crops: the rest of the network is timm's, and takes these tools a minute."""
    model = _mobile(num_classes=3)
    cell, x, (odd_before, even_before) = model.trunk.cell_12, torch.randn(2, 704, 2, 3), (
        torch.randn(2, 528, *size) for size in ((5, 7), (4, 6)))  # with and without a position to crop
    dims = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    for form in (torch.export.export(cell, (x, odd_before), dynamic_shapes=(dims, dims)).module(),
                 torch.compile(cell, backend='aot_eager', fullgraph=True), torch.jit.script(cell),
                 torch.fx.symbolic_trace(cell)):
        for before in (odd_before, even_before):
            torch.testing.assert_close(form(x, before), cell(x, before))
    odd = torch.randn(2, 3, 65, 97)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(odd), model(odd), rtol=1e-3, atol=1e-5)
    assert model.bfloat16()(odd.bfloat16()).dtype == torch.bfloat16
