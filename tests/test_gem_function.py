"""The power mean and its gradients against the formula in float64, and where it must step aside for the formula."""
import math

import pytest
import torch
from torch.autograd import forward_ad

from timm_multigrain.layers import GeM, gem
from timm_multigrain.layers.gem_function import power_mean

DIMS = {'NCHW': (2, 3), 'NHWC': (1, 2), 'NLC': (1,)}


def make_map(input_fmt='NCHW', dtype=torch.float32, seed=0):
    """A map (3, 24, 7, 8) with dead channels and negatives."""
    x = torch.randn(3, 24, 7, 8, generator=torch.Generator().manual_seed(seed)) * 2
    x[:, 0], x[:, 1], x[:, 2] = 0, -1, 1e-7
    x = {'NCHW': x, 'NHWC': x.permute(0, 2, 3, 1), 'NLC': x.flatten(2).mT}[input_fmt]
    return x.contiguous().to(dtype)


def formula(x, p, eps, dim):
    """As equation 1 of the paper has it, for float64 and values that do not overflow it."""
    return x.clamp(min=eps).pow(p).mean(dim, keepdim=True).pow(1 / p)


def run(pool, x, p, dim, eps=1e-6):
    """Pooled x and the gradients of x, and of p if it is a tensor."""
    x = x.detach().requires_grad_()
    p = p.detach().requires_grad_() if isinstance(p, torch.Tensor) else p
    y = pool(x, p, eps, dim)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, p] if isinstance(p, torch.Tensor) else [x], grad)]


@pytest.mark.parametrize('input_fmt, p, dtype, rel', [
    *[('NCHW', p, torch.float32, 2e-6) for p in (0.5, 2.5, 3., 9., torch.tensor(2.7), 'channels')],
    *[(fmt, p, torch.float32, 2e-6) for fmt in ('NHWC', 'NLC') for p in (2.5, 'channels')],
    *[('NCHW', p, dtype, rel) for p in (3., 'channels')
      for dtype, rel in ((torch.float64, 1e-14), (torch.bfloat16, 1e-6), (torch.float16, 1e-6))]], ids=str)
def test_equals_the_formula(input_fmt, p, dtype, rel):
    if isinstance(p, str):
        p = torch.rand(24, generator=torch.Generator().manual_seed(2)) * 4 + 0.5
        p = p[:, None, None] if input_fmt == 'NCHW' else p
    x, dim = make_map(input_fmt, dtype), DIMS[input_fmt]
    exact = run(formula, x.double(), p.double() if isinstance(p, torch.Tensor) else p, dim)
    found = run(power_mean, x, p, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    assert [t.dtype for t in found] == [wide, x.dtype, torch.float32][:len(found)]
    for value, expected in zip(found, exact, strict=True):
        assert value.shape == expected.shape
        tolerance = max(rel, torch.finfo(value.dtype).eps)
        assert (value.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert (found[1][x.to(wide) <= 1e-6] == 0).all()


@pytest.mark.parametrize('p', [0.1, 3., 8., 40., torch.tensor(3.), torch.tensor(100.)], ids=str)
def test_nothing_overflows_or_underflows(p):
    x = make_map()
    x[:, 4], x[:, 5], x[:, 6] = x[:, 4].abs() * 1e10, x[:, 5].abs() * 1e30, 10
    x[:, 7] = 0
    x[:, 7, 3, 3] = 30
    x[:, 8] = x[:, 8].abs().clamp(min=0.1) * 1e-5
    y, *grads = run(power_mean, x, p, (2, 3))
    for channel, scale in {4: 1e10, 5: 1e30, 6: 1., 7: 1., 8: 1e-5}.items():  # scaled, float64 holds every power here
        part = (x[:, channel:channel + 1].double() / scale).clamp(min=1e-6 / scale)
        exact = run(formula, part, p.double() if isinstance(p, torch.Tensor) else p, (2, 3), eps=1e-6 / scale)
        torch.testing.assert_close(y[:, channel].double(), exact[0][:, 0] * scale, rtol=3e-6, atol=0)
    assert all(g.isfinite().all() for g in grads)


def test_not_a_number_stays_with_its_channel():
    x = make_map()
    x[1, 9, 2, 2], x[2, 9, 2, 2] = math.nan, math.inf
    for p in (2.5, torch.tensor(2.7)):
        y = power_mean(x, p, 1e-6, (2, 3)).flatten(1)
        assert torch.equal(y.isnan().nonzero(), torch.tensor([[1, 9], [2, 9]]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kwargs', [{}, {'p': 1.7}, {'learn_p': True}], ids=str)
def test_keeps_the_map_and_what_it_returns(kwargs, dtype):
    x, found = make_map(dtype=dtype).requires_grad_(), {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert GeM(**kwargs)(x).requires_grad
    found.pop(x.untyped_storage().data_ptr())
    assert sum(found.values()) <= 3 * 24 * 4 + 4  # the result and p


@pytest.mark.parametrize('p', [3., 2.5, torch.tensor(2.3, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize('input_fmt', ['NCHW', 'NLC'])
def test_derivatives_of_every_order(input_fmt, p):
    dim = DIMS[input_fmt]
    x = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    x = (x if input_fmt == 'NCHW' else x.flatten(2).mT.contiguous()).requires_grad_()
    if isinstance(p, torch.Tensor):
        inputs, function = (x, p.clone().requires_grad_()), lambda x, p: power_mean(x, p, 1e-6, dim)
    else:
        inputs, function = (x,), lambda x: power_mean(x, p, 1e-6, dim)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}], ids=str)
def test_transforms_get_the_formula(kwargs):
    x, pool = make_map(), GeM(**kwargs)
    p = pool.p.detach() if kwargs else 3.
    expected = run(power_mean, x, p, (2, 3))
    grad = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1))
    slope = torch.func.grad(lambda x: (gem(x, p, keepdim=True) * grad).sum())(x)
    torch.testing.assert_close(slope, expected[1], rtol=1e-5, atol=1e-7)
    batched = torch.func.vmap(lambda x: gem(x, p))(torch.stack([x, x]))
    torch.testing.assert_close(batched[1], expected[0].flatten(1), rtol=1e-6, atol=0)
    with forward_ad.dual_level():
        value, slope = forward_ad.unpack_dual(gem(forward_ad.make_dual(x, torch.ones_like(x)), 3.))
    assert value.shape == slope.shape == (3, 24)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}], ids=str)
def test_compiled_training(kwargs):
    torch._dynamo.reset()
    x, pool = make_map().requires_grad_(), GeM(**kwargs)
    y, z = pool(x), torch.compile(pool, fullgraph=True)(x)
    torch.testing.assert_close(z, y, rtol=2e-6, atol=0)
    inputs = [x, *pool.parameters()]
    for value, other in zip(
            torch.autograd.grad(z.square().sum(), inputs), torch.autograd.grad(y.square().sum(), inputs), strict=True):
        assert (value - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize('p', [2.5, torch.tensor(2.7)], ids=str)
def test_no_value_is_read_back(p):
    x = torch.empty(3, 24, 7, 8, device='meta', requires_grad=True)
    p = p.to('meta').requires_grad_() if isinstance(p, torch.Tensor) else p
    y = power_mean(x, p, 1e-6, (2, 3))
    y.sum().backward()
    assert y.shape == (3, 24, 1, 1) and x.grad.shape == x.shape


def test_fake_tensors_and_checkpointing():
    from torch.utils.checkpoint import checkpoint
    x, pool = make_map().requires_grad_(), GeM()
    mode = torch._subclasses.FakeTensorMode()
    fake = mode.from_tensor(x.detach())
    with mode:
        assert GeM()(fake).shape == (3, 24)
    again, = torch.autograd.grad(checkpoint(pool, x, use_reentrant=False).sum(), x)
    once, = torch.autograd.grad(pool(x).sum(), x)
    assert torch.equal(again, once)
