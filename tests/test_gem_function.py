"""The fused power mean against the plain formula in float64, and where it must step aside for the plain one."""
import copy
import math
import warnings

import pytest
import torch
from torch.autograd import forward_ad

from timm_multigrain.layers import GeM, gem, gem_function
from timm_multigrain.layers.gem_function import fused_power_mean, power_mean, takes

DIMS = {'NCHW': (2, 3), 'NHWC': (1, 2), 'NLC': (1,)}
EXPONENTS = [0.5, 1.7, 2., 2.5, 3., 4., 9.]


@pytest.fixture(params=[1, 2])
def threads(request):
    """How many threads torch has: with one, logarithms are numpy's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_map(input_fmt='NCHW', dtype=torch.float32, batch=3, channels=384, height=7, width=8, seed=0):
    """A map large enough to be fused, with dead channels and negatives."""
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2
    x[:, 0], x[:, 1], x[:, 2] = 0, -1, 1e-7
    x = {'NCHW': x, 'NHWC': x.permute(0, 2, 3, 1), 'NLC': x.flatten(2).mT}[input_fmt]
    return x.contiguous().to(dtype)


def run(pool, x, p, dim, seed=1, eps=1e-6):
    """Pooled x and the gradients of x, and of p if it is a tensor."""
    x = x.detach().requires_grad_()
    p = p.detach().requires_grad_() if isinstance(p, torch.Tensor) else p
    y = pool(x, p, eps, dim)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, p] if isinstance(p, torch.Tensor) else [x], grad)]


def fused(x, p, eps, dim):
    assert takes(x, p, dim)
    return fused_power_mean(x, p, eps, dim)


def check(x, p, dim, rel):
    exact = run(power_mean, x.double(), p.double() if isinstance(p, torch.Tensor) else p, dim)
    found = run(fused, x, p, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    assert [t.dtype for t in found] == [wide, x.dtype, torch.float32][:len(found)]
    for value, expected in zip(found, exact, strict=True):
        assert value.shape == expected.shape
        tolerance = max(rel, torch.finfo(value.dtype).eps)
        assert (value.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert (found[1][x.to(wide) <= 1e-6] == 0).all()


@pytest.mark.parametrize('dtype, rel', [
    (torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)], ids=str)
@pytest.mark.parametrize('input_fmt', DIMS)
@pytest.mark.parametrize('p', [*EXPONENTS, torch.tensor(2.7)], ids=str)
def test_equals_the_plain_formula(threads, input_fmt, p, dtype, rel):
    check(make_map(input_fmt, dtype), p, DIMS[input_fmt], rel * max(1, float(p) / 4))


@pytest.mark.parametrize('input_fmt', DIMS)
def test_one_exponent_per_channel(threads, input_fmt):
    p = torch.rand(384, generator=torch.Generator().manual_seed(2)) * 4 + 0.5
    check(make_map(input_fmt), p[:, None, None] if input_fmt == 'NCHW' else p, DIMS[input_fmt], 2e-6)


@pytest.mark.parametrize('block', [1, 5000, 2 ** 30])
@pytest.mark.parametrize('p', [1.7, 2.5, 3., torch.tensor(2.7)], ids=str)
@pytest.mark.parametrize('input_fmt', DIMS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_blocks_do_not_change_a_bit(monkeypatch, dtype, input_fmt, p, block):
    x = make_map(input_fmt).to(dtype).requires_grad_()
    expected = fused(x, p, 1e-6, DIMS[input_fmt])
    grad, = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr(gem_function, '_BLOCK', block)
    y = fused(x, p, 1e-6, DIMS[input_fmt])
    assert torch.equal(y, expected)
    # the exponential of base 2 rounds the last few values of a block differently
    rtol = 0. if isinstance(p, float) and p in (2.5, 3.) else 2 ** -20 if dtype == torch.float32 else 2 ** -7
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], grad, rtol=rtol, atol=0)


@pytest.mark.parametrize('threads', [1, 3], indirect=True)
@pytest.mark.parametrize('kwargs', [
    {}, {'p': 2.5}, {'p': 1.7}, {'p': 4.}, {'learn_p': True}, {'num_channels': 50}], ids=str)
@pytest.mark.parametrize('shape', [(7, 8), (19, 31), (1, 51)])
@pytest.mark.parametrize('input_fmt', ['NCHW', 'NHWC', 'NLC', 'channels_last'])
def test_the_batch_does_not_change_a_bit(input_fmt, shape, kwargs, threads):
    fmt = 'NCHW' if input_fmt == 'channels_last' else input_fmt
    x = make_map(fmt, batch=40, channels=50, height=shape[0], width=shape[1])
    x.select(-1 if fmt != 'NCHW' else 1, 5)[2] *= 1e20  # one that has to be computed anew
    if input_fmt == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    pool = GeM(input_fmt=fmt, **kwargs)
    with torch.no_grad():
        together = pool(x)
        assert torch.equal(together, torch.cat([pool(x[i:i + 1]) for i in range(40)]))
        assert torch.equal(together[1:4], pool(x[1:4]))
        assert torch.equal(together, pool(x.flip(0)).flip(0))


@pytest.mark.parametrize('p', [0.1, 2., 2.5, 3., 4., 7.5, 8., 31., torch.tensor(3.), torch.tensor(100.)], ids=str)
def test_nothing_overflows_or_underflows(threads, p):
    x = make_map()
    x[:, 4], x[:, 5], x[:, 6] = x[:, 4].abs() * 1e20, x[:, 5].abs() * 1e30, 10
    x[:, 7] = 0
    x[:, 7, 3, 3] = 30
    y, *grads = run(fused, x, p, (2, 3))
    wide = p.double() if isinstance(p, torch.Tensor) else p
    exact = run(power_mean, x.double(), wide, (2, 3))
    assert ((y / exact[0] - 1).abs() < 3e-6).all()
    largest = exact[1].abs().amax((2, 3))
    assert ((grads[0] - exact[1]).abs().amax((2, 3)) <= 1e-5 * max(1, float(p) / 10) * largest).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize('p', [2., 2.5, 3., 4., 1.7], ids=str)
def test_tiny_values(p):
    x = make_map(batch=1).abs().clamp(min=0.1) * 1e-14
    found = run(fused, x, p, (2, 3), eps=1e-17)
    exact = run(power_mean, x.double(), p, (2, 3), eps=1e-17)
    for value, expected in zip(found, exact, strict=True):
        assert ((value / expected - 1).abs() < 3e-6).all()


@pytest.mark.parametrize('p', [2., 2.5, 3., 4.], ids=str)
def test_the_mean_of_one_value_is_that_value(p):
    values = torch.logspace(-5, 5, 2000, dtype=torch.float64).float()
    y = fused(values[None, :, None, None].expand(1, 2000, 32, 32).contiguous(), p, 1e-6, (2, 3)).flatten()
    assert ((y.double() / values - 1).abs() < 2.5e-7).all()


def test_not_a_number_stays_with_its_channel(threads):
    x = make_map()
    x[1, 9, 2, 2], x[2, 9, 2, 2] = math.nan, math.inf
    for p in (2.5, 3., torch.tensor(2.7)):
        y = fused(x, p, 1e-6, (2, 3)).flatten(1)
        plain = power_mean(x, p, 1e-6, (2, 3)).flatten(1)
        assert torch.equal(y.isnan(), plain.isnan())
        assert torch.equal(y.isnan().nonzero(), torch.tensor([[1, 9], [2, 9]]))


@pytest.mark.parametrize('p', [3., 1.7, torch.tensor(2.7)], ids=str)
def test_memory_formats_and_slices(p):
    x = make_map()
    last = x.contiguous(memory_format=torch.channels_last)
    expected, found = run(fused, x, p, (2, 3)), run(fused, last, p, (2, 3))
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    tokens = make_map('NLC')
    torch.testing.assert_close(run(fused, tokens[:, 3:], p, (1,)), run(fused, tokens[:, 3:].clone(), p, (1,)))
    assert not takes(x.transpose(2, 3)[:, ::2], p, (2, 3))
    pool = GeM(3., input_fmt='NLC', num_prefix_tokens=3)
    assert torch.equal(pool(tokens), GeM(3., input_fmt='NLC')(tokens[:, 3:].clone()))


def kept_bytes(function, besides):
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    found.pop(besides.untyped_storage().data_ptr(), None)
    assert result.requires_grad
    return sum(found.values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kwargs, vectors', [({}, 1), ({'p': 1.7}, 1), ({'learn_p': True}, 2)], ids=str)
def test_keeps_the_map_and_what_it_returns(kwargs, vectors, dtype):
    x = make_map(dtype=dtype).requires_grad_()
    pool = GeM(**kwargs)
    assert kept_bytes(lambda: pool(x), x) <= vectors * 3 * 384 * 4 + 4


@pytest.mark.parametrize('p', [3., 2.5, torch.tensor(2.3, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize('input_fmt', ['NCHW', 'NLC'])
def test_derivatives_of_every_order(threads, monkeypatch, input_fmt, p):
    monkeypatch.setattr(gem_function, '_SMALL', 1)
    dim = DIMS[input_fmt]
    x = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    x = (x if input_fmt == 'NCHW' else x.flatten(2).mT.contiguous()).requires_grad_()
    if isinstance(p, torch.Tensor):
        inputs, function = (x, p.clone().requires_grad_()), lambda x, p: fused(x, p, 1e-6, dim)
    else:
        inputs, function = (x,), lambda x: fused(x, p, 1e-6, dim)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_exponent_alone_has_a_gradient():
    x, pool = make_map(), GeM(3., learn_p=True)
    pool(x).sum().backward()
    p = torch.tensor(3., dtype=torch.float64, requires_grad=True)
    power_mean(x.double(), p, 1e-6, (2, 3)).sum().backward()
    torch.testing.assert_close(pool.p.grad.double(), p.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}], ids=str)
def test_transforms_get_the_plain_formula(kwargs):
    x, pool = make_map(), GeM(**kwargs)
    p = pool.p.detach()
    expected = run(power_mean, x, p if kwargs else 3., (2, 3))
    grad = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1))

    def loss(x):
        return (gem(x, p if kwargs else 3., keepdim=True) * grad).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), expected[1], rtol=1e-5, atol=1e-7)
    batched = torch.func.vmap(lambda x: gem(x, p if kwargs else 3.))(torch.stack([x, x]))
    torch.testing.assert_close(batched[1], expected[0].flatten(1), rtol=1e-6, atol=0)
    with forward_ad.dual_level():
        value, slope = forward_ad.unpack_dual(gem(forward_ad.make_dual(x, torch.ones_like(x)), 3.))
    assert value.shape == slope.shape == (3, 384)
    rows = torch.autograd.functional.jacobian(lambda x: gem(x, 3.)[0, 10:12], x, vectorize=True)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(lambda x: gem(x, 3.)[0, 10:12], x))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('kwargs', [{}, {'p': 2.5}, {'learn_p': True}, {'num_channels': 384}], ids=str)
def test_tools_on_large_maps(kwargs):
    x, pool = make_map(), GeM(**kwargs).eval()
    y = pool(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tools = [torch.jit.script(pool), torch.jit.trace(pool, x), torch.fx.symbolic_trace(pool), copy.deepcopy(pool),
                 torch.export.export(pool, (x,)).module()]
    for tool in tools:
        torch.testing.assert_close(tool(x).detach(), y, rtol=1e-6, atol=0)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(pool(x), y) and torch.equal(pool(x.bfloat16()), pool(x.bfloat16()))


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}], ids=str)
def test_compiled_training(kwargs):
    torch._dynamo.reset()
    x, pool = make_map().requires_grad_(), GeM(**kwargs)
    compiled = torch.compile(pool, fullgraph=True)
    inputs = [x, *pool.parameters()]
    for _ in range(2):
        y, z = pool(x), compiled(x)
        torch.testing.assert_close(z, y, rtol=2e-6, atol=0)
        for value, other in zip(
                torch.autograd.grad(z.square().sum(), inputs), torch.autograd.grad(y.square().sum(), inputs),
                strict=True):
            assert (value - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize('p', [2.5, 3., 1.7, torch.tensor(2.7)], ids=str)
@pytest.mark.parametrize('input_fmt', ['NCHW', 'NLC'])
def test_as_on_a_gpu(monkeypatch, input_fmt, p):
    """One block, and no value is read back: a tensor without data would show it."""
    monkeypatch.setattr(gem_function, '_on_host', lambda maps: False)
    check(make_map(input_fmt), p, DIMS[input_fmt], 1e-6)
    x = torch.empty(3, 384, 7, 8, device='meta', requires_grad=True)
    p = p.to('meta').requires_grad_() if isinstance(p, torch.Tensor) else p
    y = fused_power_mean(x, p, 1e-6, (2, 3))
    y.sum().backward()
    assert y.shape == (3, 384, 1, 1) and x.grad.shape == x.shape


def test_fake_tensors_and_checkpointing():
    from torch.utils.checkpoint import checkpoint
    x, pool = make_map().requires_grad_(), GeM()
    mode = torch._subclasses.FakeTensorMode()
    fake = mode.from_tensor(x.detach())
    with mode:
        assert pool(fake).shape == (3, 384)
    again, = torch.autograd.grad(checkpoint(pool, x, use_reentrant=False).sum(), x)
    once, = torch.autograd.grad(pool(x).sum(), x)
    assert torch.equal(again, once)


def test_what_is_not_fused():
    x = make_map()
    for p, dim in ((40., (2, 3)), (3., (0, 1)), (3., (1, 3)), (torch.ones(5, 1, 1, 1, 1), (2, 3))):
        assert not takes(x, p, dim)
    assert not takes(x[:, :10], 3., (2, 3)) and not takes(x.to('meta'), 3., (2, 3)) and not takes(x[:0], 3., (2, 3))
