"""MAC, SPoC, R-MAC and CroW against loops in float64."""
import copy
import itertools
import math
import pickle

import pytest
import torch

from timm_multigrain.layers import MAC, RMAC, CroW, SPoC
from timm_multigrain.layers.regional import _region_grid

from .test_layers_gem import to_format

POOLS = (MAC, SPoC, RMAC, CroW)
FORMATS = ('NCHW', 'NHWC', 'NLC')
SIZES = ((1, 1), (2, 2), (1, 4), (7, 7), (6, 9), (9, 6), (12, 7), (8, 31))
FORMATS_OF = [(pool, fmt) for pool in POOLS for fmt in FORMATS if (pool, fmt) != (RMAC, 'NLC')]


def relu_map(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu()
    x[:, 1] = 0  # a dead channel
    return x


def cells(x):
    return [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]


def slow_mac(x):
    return torch.tensor([[max(c[i][j] for i in range(len(c)) for j in range(len(c[0]))) for c in n]
                         for n in x.tolist()], dtype=torch.float64)


def slow_spoc(x):
    return sum(x[:, :, i, j].double() for i, j in cells(x))


def slow_regions(height, width, levels=3):
    """Top, left, side as the authors' program gives them: regions by their centres, 2 to 7 along the longer side."""
    side = min(height, width)
    overlaps = {m: 1 - (max(height, width) - side) / (m - 1) / side for m in range(2, 8)}
    m = min(overlaps, key=lambda m: abs(overlaps[m] - 0.4)) if height != width else 1
    regions = []
    for level in range(1, levels + 1):
        size = max(1, math.floor(2 * side / (level + 1)))
        rows, cols = (level + m - 1 if height > width else level), (level + m - 1 if width > height else level)
        for i in range(rows):
            for j in range(cols):
                top = math.floor(i * (height - size) / (rows - 1) + 1e-9) if rows > 1 else 0
                left = math.floor(j * (width - size) / (cols - 1) + 1e-9) if cols > 1 else 0
                regions.append((top, left, size))
    return regions


def slow_rmac(x):
    y = torch.zeros(x.shape[:2], dtype=torch.float64)
    for n in range(len(x)):
        for top, left, side in slow_regions(*x.shape[2:]):
            region = x[n, :, top:top + side, left:left + side].double().flatten(1)
            vector = torch.tensor([max(c.tolist()) for c in region], dtype=torch.float64)
            y[n] += vector / (math.sqrt(math.fsum(v * v for v in vector.tolist())) + 1e-6)
    return y


def slow_crow(x, eps=1e-6):
    x = x.double()
    count, channels, height, width = x.shape
    y = torch.zeros(count, channels, dtype=torch.float64)
    for n in range(count):
        total = {(i, j): max(0., sum(x[n, :, i, j].tolist())) for i, j in cells(x)}
        norm = math.sqrt(sum(v ** 2 for v in total.values()))
        share = [sum(x[n, c, i, j].item() > 0 for i, j in cells(x)) / (height * width) for c in range(channels)]
        for c in range(channels):
            value = sum(math.sqrt(total[i, j] / norm if norm else 0) * x[n, c, i, j].item() for i, j in cells(x))
            y[n, c] = value * math.log((channels * eps + sum(share)) / (eps + share[c]))
    return y


SLOW = {MAC: slow_mac, SPoC: slow_spoc, RMAC: slow_rmac, CroW: slow_crow}


@pytest.mark.parametrize('pool', POOLS)
def test_equals_loop(pool):
    for size in SIZES:
        x = relu_map(2, 6, *size)
        torch.testing.assert_close(pool()(x).double(), SLOW[pool](x), rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(pool()(x.double()), SLOW[pool](x), rtol=1e-12, atol=1e-12)
    signed = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(pool()(signed), SLOW[pool](signed), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float16, torch.bfloat16):
        half = (relu_map(2, 6, 7, 7) * 20).to(dtype)
        y = pool()(half)
        assert y.dtype == dtype
        torch.testing.assert_close(y, SLOW[pool](half).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize('pool, input_fmt', FORMATS_OF)
def test_formats(pool, input_fmt):
    x = relu_map(2, 6, 6, 9).double()
    expected = SLOW[pool](x)
    torch.testing.assert_close(pool(input_fmt)(to_format(x, input_fmt)), expected, rtol=1e-12, atol=1e-12)
    y = pool(input_fmt, flatten=False)(to_format(x, input_fmt))
    assert y.shape == {'NCHW': (2, 6, 1, 1), 'NHWC': (2, 1, 1, 6), 'NLC': (2, 1, 6)}[input_fmt]
    torch.testing.assert_close(y.reshape(2, 6), expected, rtol=1e-12, atol=1e-12)
    if input_fmt == 'NLC':
        tokens = torch.cat([torch.full((2, 2, 6), 1e3, dtype=x.dtype), to_format(x, 'NLC')], 1)
        layer = pool('NLC', num_prefix_tokens=2)
        torch.testing.assert_close(layer(tokens), expected, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match='2 tokens of which the first 2 are prefix tokens'):
            layer(tokens[:, :2])


def test_region_grid():
    for height, width in itertools.product(range(1, 40), repeat=2):
        regions = _region_grid(height, width)
        side = min(height, width)
        assert all(0 <= t <= height - s and 0 <= left <= width - s for t, left, s in regions)
        assert {s for _, _, s in regions} == {max(1, 2 * side // (level + 1)) for level in (1, 2, 3)}
        if max(height, width) <= 4 * side:  # beyond this the authors' program stops at 7 regions and leaves gaps
            assert regions == slow_regions(height, width)
        covered = {(t + i, left + j) for t, left, s in regions for i in range(s) for j in range(s)}
        assert len(covered) == height * width


@pytest.mark.parametrize('layer', [MAC(), SPoC(), RMAC(), CroW()], ids=repr)
def test_gradients(layer):
    for x in (relu_map(2, 6, 5, 7), torch.zeros(2, 6, 5, 7), torch.randn(2, 6, 5, 7)):
        x.requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
    assert torch.autograd.gradcheck(layer, (torch.rand(1, 3, 3, 4, dtype=torch.float64) + 0.1).requires_grad_())


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('layer, input_fmt', [
    (MAC(), 'NCHW'), (SPoC(), 'NCHW'), (RMAC('NHWC'), 'NHWC'), (CroW('NLC'), 'NLC')], ids=repr)
def test_tools(layer, input_fmt):
    x = to_format(relu_map(2, 5, 4, 6), input_fmt)
    for other in (torch.jit.script(layer), torch.fx.symbolic_trace(layer), copy.deepcopy(layer),
                  pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and torch.equal(other(x.double()), layer(x.double()))
    assert not layer.state_dict()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    for size in ((4, 6), (7, 7)):
        x = to_format(relu_map(2, 5, *size), input_fmt)
        torch.testing.assert_close(compiled(x), layer(x))


def test_errors():
    with pytest.raises(ValueError, match='R-MAC needs the rows and columns of the map'):
        RMAC('NLC')
    for pool in POOLS:
        with pytest.raises(ValueError, match='Unknown input_fmt'):
            pool('NCL')
        with pytest.raises(ValueError, match="num_prefix_tokens=1 needs input_fmt='NLC'"):
            pool(num_prefix_tokens=1)
