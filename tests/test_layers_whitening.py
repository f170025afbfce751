"""The stored whitening against the original's numbers, and against plain float64 arithmetic."""
import pytest
import torch
from safetensors.torch import load_file

from timm_multigrain.layers import GeM, Whitening, l2_normalize

from .original import close


def test_folded_whitening_of_the_original(golden):
    g = load_file(golden / 'whitening.safetensors')
    layer = Whitening(12, 13)
    layer.load_state_dict({'mean': g['mean'], 'proj': g['proj']})
    embedding = layer(GeM(p=3.0)(g['test_maps']))
    close(embedding, g['stage3_folded.embedding'])
    normalized = l2_normalize(embedding)
    torch.testing.assert_close(normalized, g['stage3_folded.normalized_embedding'], rtol=0, atol=1e-5)
    logits = torch.nn.functional.linear(embedding, g['stage3_folded.weight'], g['stage3_folded.bias'])
    close(logits, g['stage3_folded.logits'], 1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_against_float64(dtype, tolerance):
    torch.manual_seed(0)
    layer = Whitening(6, 4)
    layer.load_state_dict({'mean': 0.1 * torch.randn(7), 'proj': torch.randn(7, 4)})
    x = torch.rand(5, 6, dtype=dtype)
    z = torch.cat([x.double(), torch.ones(5, 1, dtype=torch.float64)], dim=1)
    z = z / (z.norm(dim=1, keepdim=True) + 1e-6)
    expected = (z - layer.mean.double()) @ layer.proj.double()
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_float32_under_autocast():
    torch.manual_seed(0)
    layer = Whitening(512, 64)
    layer.load_state_dict({'mean': 0.01 * torch.randn(513), 'proj': torch.randn(513, 64)})
    x = torch.rand(4, 512)
    expected = layer(x)
    for module in (layer, torch.fx.symbolic_trace(layer), torch.compile(layer, backend='eager', fullgraph=True)):
        with torch.autocast('cpu', torch.bfloat16):
            found, half = module(x), module(x.bfloat16())
        assert torch.equal(found, expected) and torch.equal(half, layer(x.bfloat16()))


def test_fresh_layer_and_bad_sizes():
    x = torch.rand(3, 6)
    z = torch.cat([x, torch.ones(3, 1)], dim=1)
    torch.testing.assert_close(Whitening(6, 4)(x), (z / z.norm(dim=1, keepdim=True))[:, :4], rtol=1e-5, atol=1e-6)
    for components in (0, 8):
        with pytest.raises(ValueError, match=f'whitening={components} .* choose 1 to 7'):
            Whitening(6, components)
