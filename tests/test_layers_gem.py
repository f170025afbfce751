"""GeM against the original implementation's numbers, loops in float64, and the tools a layer has to survive."""
import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch.autograd import forward_ad
from torch.func import functional_call

from timm_multigrain.layers import GeM, gem, l2_normalize

from .original import close

INF = math.inf
CASES = ('square', 'rect', 'one', 'edge')


@pytest.fixture(scope='module')
def numbers(golden):
    return load_file(golden / 'gem.safetensors')


def slow_gem(x, p, eps=1e-6):
    """(N, C, H, W) -> (N, C) by loops in float64; p a number, or one per channel. In logarithms, exact for any p."""
    x = x.double()
    y = torch.empty(x.shape[:2], dtype=torch.float64)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            q = p if isinstance(p, float) else float(p[c])
            logs = [q * math.log(max(v.item(), eps)) for v in x[n, c].flatten()]
            top = max(logs)
            mean = math.fsum(math.exp(v - top) for v in logs) / len(logs)
            y[n, c] = math.exp((top + math.log(mean)) / q)
    return y


def to_format(x, input_fmt):
    return {'NCHW': x, 'NHWC': x.permute(0, 2, 3, 1), 'NLC': x.flatten(2).mT}[input_fmt]


def random_map(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x > -0.3, x.abs(), x)


# --- the original's numbers


@pytest.mark.parametrize('p', ['1.0', '2.0', '2.5', '3.0', '4.0', 'inf'])
def test_golden_values_and_gradients(numbers, p):
    for case in CASES:
        x, upstream = numbers[f'x.{case}'], numbers[f'upstream.{case}']
        close(GeM(float(p))(x), numbers[f'y.{case}.p{p}'], 1e-6)
        if f'grad_x.{case}.p{p}' in numbers:
            pool, leaf = GeM(float(p), learn_p=True), x.clone().requires_grad_()
            (upstream * pool(leaf)).sum().backward()
            close(leaf.grad, numbers[f'grad_x.{case}.p{p}'], 1e-6)
            assert abs(pool.p.grad - numbers[f'grad_p.{case}.p{p}']) <= 1e-5
            assert (leaf.grad[leaf < 1e-6] == 0).all()
        if f'grad_x_frozen_p.{case}.p{p}' in numbers:  # a mean and a maximum without the clamp
            leaf = x.clone().requires_grad_()
            (upstream * GeM(float(p))(leaf)).sum().backward()
            close(leaf.grad, numbers[f'grad_x_frozen_p.{case}.p{p}'], 1e-6)


def test_golden_of_other_kinds(numbers):
    for case in CASES:
        learned = GeM(1., learn_p=True)(numbers[f'x.{case}'])
        close(learned.detach(), numbers[f'y_learnable.{case}.p1.0'], 1e-6)
        y = GeM()(numbers[f'x.{case}'])
        close(torch.cat([y, torch.ones(len(y), 1)], 1), numbers[f'y_with_bias.{case}.p3.0'], 1e-6)
    close(l2_normalize(numbers['l2n.x']), numbers['l2n.y'], 1e-6)

def test_l2_normalize():
    x = torch.tensor([[3., 4.], [0., 0.], [1e-6, 0.]], dtype=torch.float64, requires_grad=True)
    expected = [[v / (math.hypot(*row) + 1e-6) for v in row] for row in x.tolist()]
    torch.testing.assert_close(l2_normalize(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    l2_normalize(x).sum().backward()
    assert x.grad.isfinite().all()
    half = torch.full((1, 4096), 100., dtype=torch.float16)  # the norm, 6400, squares beyond float16
    assert torch.equal(l2_normalize(half), l2_normalize(half.float()).half())
    leaf = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(l2_normalize, leaf)
    assert torch.equal(torch.fx.symbolic_trace(l2_normalize)(leaf), l2_normalize(leaf))


# --- values


@pytest.mark.parametrize('input_fmt', ['NCHW', 'NHWC', 'NLC'])
@pytest.mark.parametrize('kwargs', [{'p': 1.7}, {'p': 3., 'learn_p': True}, {'num_channels': 3}], ids=str)
def test_equals_loop(input_fmt, kwargs):
    x, pool = random_map(2, 3, 4, 5), GeM(**kwargs, input_fmt=input_fmt)
    if pool.per_channel:
        pool.set_p(torch.tensor([1., 2.5, 7.]))
    expected = slow_gem(x, pool.p.double() if pool.per_channel else pool.p.item())
    torch.testing.assert_close(pool(to_format(x, input_fmt)).detach().double(), expected, rtol=1e-6, atol=0)
    y = pool(to_format(x.double(), input_fmt)).detach()
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=0)
    pool.flatten = False
    kept = pool(to_format(x.double(), input_fmt))
    assert kept.shape == {'NCHW': (2, 3, 1, 1), 'NHWC': (2, 1, 1, 3), 'NLC': (2, 1, 3)}[input_fmt]
    assert torch.equal(kept.reshape(2, 3), y)


@pytest.mark.parametrize('p', [3., 1., INF, torch.tensor(2.5)], ids=str)
def test_any_dimensions(p):
    x = torch.rand(2, 3, 1, 4)  # an own dimension of size 1 stays
    for dim in ((-2, -1), (-1, 2), (1,)):
        shape = [n for i, n in enumerate(x.shape) if i not in [d % 4 for d in dim]]
        assert torch.equal(gem(x, p, dim=dim), gem(x, p, dim=dim, keepdim=True).reshape(shape))


@pytest.mark.parametrize('p', [1., 3., INF])
def test_signs_prefix_tokens_and_memory_format(p):
    x = -1 - torch.rand(2, 3, 4, 5)  # a plain mean and a plain maximum keep negative values
    expected = {1: x.mean((2, 3)), 3: torch.full((2, 3), 1e-6), INF: x.flatten(2).max(2)[0]}[p]
    torch.testing.assert_close(GeM(p)(x), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(GeM(p)(x.to(memory_format=torch.channels_last)), expected, rtol=1e-6, atol=0)
    tokens = random_map(2, 9, 6)
    changed = tokens.clone()
    changed[:, :3] = 1e3
    pool = GeM(p, input_fmt='NLC', num_prefix_tokens=3)
    assert torch.equal(pool(tokens), pool(changed))
    assert torch.equal(pool(tokens), GeM(p, input_fmt='NLC')(tokens[:, 3:]))


# --- precision and derivatives


@pytest.mark.parametrize('p', [0.1, 3., 100., 1e6])
@pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}, {'learn_p': True, 'num_channels': 8}], ids=str)
def test_no_p_overflows_or_underflows(p, kwargs):
    x = random_map(1, 8, 7, 7)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0, -1, 1e-7, 10  # dead channels, and one below eps
    x[:, 4] = 0
    x[:, 4, 3, 3] = 30
    x[:, 5], x[:, 6] = x[:, 5] * 1e20, x[:, 6].abs() * 1e-5
    x.requires_grad_()
    pool = GeM(p, **kwargs)
    y = pool(x)
    torch.testing.assert_close(y.detach().double(), slow_gem(x.detach(), float(np.float32(p))), rtol=3e-6, atol=0)
    y.sum().backward()
    assert x.grad.isfinite().all() and (not kwargs or pool.p.grad.isfinite().all())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_input_is_pooled_in_float32(dtype):
    x = (random_map(2, 3, 7, 7) * 50).to(dtype)  # 50^3 is beyond float16
    for p, expected in ((1., x.double().mean((2, 3))), (3., slow_gem(x, 3.)), (20., slow_gem(x, 20.)),
                        (INF, x.amax((2, 3)))):
        y = GeM(p)(x)
        assert y.dtype == dtype and (p == 1 or torch.equal(y, GeM(p)(x.float()).to(dtype)))
        torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    leaf, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    GeM(learn_p=True)(leaf).sum().backward()
    GeM(learn_p=True)(wide).sum().backward()
    torch.testing.assert_close(leaf.grad, wide.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        y = GeM(2.7)(wide)
    assert torch.equal(y, GeM(2.7)(wide))


@pytest.mark.parametrize('p', [3., torch.tensor(2.3), torch.full((3, 1, 1), 2.3)], ids=str)
def test_derivatives_of_every_order(p):
    x = (random_map(2, 3, 2, 3).double().abs() + 0.05).requires_grad_()
    inputs = (x, p.double().requires_grad_()) if isinstance(p, torch.Tensor) else (x,)

    def pool(x, q=p):
        return gem(x, q)
    assert torch.autograd.gradcheck(pool, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(pool, inputs)


@pytest.mark.parametrize('kwargs', [{}, {'p': 1.7}, {'learn_p': True}], ids=str)
def test_keeps_the_map_and_what_it_returns(kwargs):
    for dtype in (torch.float32, torch.bfloat16):
        x, found = random_map(3, 24, 7, 8).to(dtype).requires_grad_(), {}

        def pack(t, found=found):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert GeM(**kwargs)(x).requires_grad
        found.pop(x.untyped_storage().data_ptr())
        assert sum(found.values()) <= 3 * 24 * 4 + 4  # the result and p


@pytest.mark.parametrize('p', [1, 2.5, INF])
def test_without_looking_at_p(p):
    """What is done on a GPU and in compiled graphs, with values, gradients and negative maps."""
    x = random_map(2, 3, 4, 5).requires_grad_()
    upstream = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    expected, = torch.autograd.grad(GeM(p)(x), x, upstream)
    exponent = torch.tensor([float(p)], requires_grad=True)  # differentiated by, it is not read
    y = gem(x, exponent, fixed=True)
    torch.testing.assert_close(y, GeM(p)(x), rtol=1e-6, atol=0)
    found, slope = torch.autograd.grad(y, [x, exponent], upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert slope.isfinite().all() and (slope != 0) == (p == 2.5)


# --- the exponent: where it lives, how it changes, what a checkpoint may hold


def test_where_p_lives():
    assert list(GeM().state_dict()) == ['p'] and not list(GeM().parameters())
    assert not GeM(persistent=False).state_dict()
    assert [n for n, _ in GeM(learn_p=True, persistent=False).named_parameters()] == ['p']
    x = random_map(2, 3, 4, 4)
    for kwargs in ({}, {'num_channels': 3}):  # a fixed p follows the device, not the dtype
        for cast in ('half', 'double'):
            pool = getattr(GeM(2.7123, **kwargs), cast)()
            assert pool.p.dtype == torch.float32 and torch.equal(pool(x), GeM(2.7123, **kwargs)(x))
    assert GeM(learn_p=True).half().p.dtype == torch.float16 and '(8 channels)' in repr(GeM(num_channels=8))


@pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}, {'num_channels': 3}], ids=str)
def test_set_and_load(kwargs):
    x = random_map(2, 3, 4, 4)
    for p in (5, torch.tensor(5), torch.tensor([5.], dtype=torch.float64), torch.tensor(5.).half()):
        pool = GeM(2.5, **kwargs)
        pool.set_p(p)
        assert torch.equal(pool(x), GeM(5, **kwargs)(x)) and pool.p.dtype == torch.float32
        for assign in (False, True):
            pool, state = GeM(2.5, **kwargs), {'p': torch.as_tensor(p)}
            pool.load_state_dict(state, assign=assign)
            assert torch.equal(pool(x), GeM(5, **kwargs)(x)) and pool.p.requires_grad == pool.learn_p
            assert state['p'].dtype == torch.as_tensor(p).dtype
    pool = GeM(num_channels=3)
    pool.load_state_dict({'p': torch.tensor([1., 2., 3.])})
    assert pool.value() == [1, 2, 3]


@pytest.mark.parametrize('kwargs', [{}, {'num_channels': 3}, {'persistent': False}], ids=str)
def test_built_on_meta(kwargs):
    with torch.device('meta'):
        pool = GeM(2.5, **kwargs)
        assert pool.p.is_meta and pool(torch.empty(2, 3, 4, 4)).shape == (2, 3) and 'meta' not in repr(pool)
    x = random_map(2, 3, 4, 4)
    assert torch.equal(copy.deepcopy(pool).to_empty(device='cpu')(x), GeM(2.5, **kwargs)(x))
    if kwargs.get('persistent', True):
        pool.load_state_dict({'p': torch.tensor(4.)}, assign=True)
        assert torch.equal(pool(x), GeM(4, **kwargs)(x))

@pytest.mark.parametrize('kwargs, value, message', [
    ({}, torch.ones(4), r'shape \(1,\) .*got \(4,\)'), ({'num_channels': 3}, torch.ones(4), r'shape \(3,\) .*\(4,\)'),
    ({}, torch.tensor(0), 'p > 0, got 0'), ({'num_channels': 3}, torch.tensor([1., math.nan, 2.]), 'got .*nan'),
    ({'learn_p': True}, torch.tensor(INF), 'finite, got inf')], ids=str)
def test_bad_checkpoint(kwargs, value, message):
    model = torch.nn.Sequential(GeM(2.5, **kwargs))
    with pytest.raises(RuntimeError, match=r'0\.p: .*' + message):
        model.load_state_dict({'0.p': value}, strict=False)
    assert (model[0].p == 2.5).all()


@pytest.mark.parametrize('before, after', [(3, 5), (3, 1), (1, INF), (INF, 2.5)])
def test_p_lives_once(before, after):
    """Whoever changes the tensor changes the pooling: in place, an average of weights, a call with another one."""
    x = random_map(2, 3, 4, 4) - 0.2
    pool, expected = GeM(before), GeM(after)(x)
    assert torch.equal(functional_call(pool, {'p': torch.tensor([float(after)])}, (x,)), expected)
    pool.p.fill_(after)
    assert torch.equal(pool(x), expected) and pool.value() == after and f'p={after:g}' in repr(pool)
    first, second = (torch.nn.Sequential(GeM(p), torch.nn.Linear(3, 1)) for p in (min(before, 9), 4))
    ema = ModelEmaV3(first, decay=0.5, foreach=True)  # infinity has no average
    ema.update(second)
    assert torch.equal(ema.module[0](x), GeM(min(before, 9) / 2 + 2)(x))


# --- tools

SPECS = ({}, {'p': 1}, {'p': INF}, {'learn_p': True}, {'num_channels': 3, 'learn_p': True, 'flatten': False},
         {'input_fmt': 'NLC', 'num_prefix_tokens': 1})


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_tools(spec):
    pool, x = GeM(**spec).eval(), to_format(random_map(2, 3, 4, 6), spec.get('input_fmt', 'NCHW'))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(pool), buffer)
    buffer.seek(0)
    for other in (torch.jit.load(buffer), torch.fx.symbolic_trace(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(other(x), pool(x)) and torch.equal(other(x.double()), pool(x.double()))
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend='aot_eager', dynamic=True)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf), pool(other), rtol=1e-6, atol=0)
    compiled(leaf).sum().backward()
    pool(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-7)
    pool.set_p(5)
    torch.testing.assert_close(compiled(x), GeM(**{**spec, 'p': 5})(x), rtol=1e-6, atol=0)

def test_function_transforms():
    x, upstream = random_map(2, 3, 4, 5), torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    expected, = torch.autograd.grad(gem(leaf), leaf, upstream)
    slope = torch.func.grad(lambda x: (gem(x) * upstream).sum())(x)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.func.vmap(gem)(torch.stack([x, x]))[1], gem(x), rtol=1e-6, atol=0)
    with forward_ad.dual_level():
        _, slope = forward_ad.unpack_dual(gem(forward_ad.make_dual(x, torch.ones_like(x))))
    ones, = torch.autograd.grad(gem(leaf).sum(), leaf)
    torch.testing.assert_close(slope.sum(), ones.sum(), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_onnx_by_the_older_exporter(tmp_path):
    """The newer one exports a whole model in test_multigrain.py."""
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    pool, file = GeM(100).eval(), tmp_path / 'gem.onnx'
    torch.onnx.export(pool, (random_map(2, 3, 4, 6),), file, dynamo=False, input_names=['x'],
                      dynamic_axes={'x': {2: 'h', 3: 'w'}})
    session = runtime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for shape in ((2, 3, 4, 6), (2, 3, 31, 17)):
        x = random_map(*shape)
        y = torch.from_numpy(session.run(None, {'x': x.numpy()})[0])
        torch.testing.assert_close(y, pool(x), rtol=1e-5, atol=1e-6)


# --- wrong input


@pytest.mark.parametrize('p', [0, -3, math.nan, None, 1e-60], ids=repr)
def test_bad_p(p):
    with pytest.raises(ValueError, match=f'GeM needs .*got {p!r}'):
        GeM(p)
    pool = GeM(2.5)
    with pytest.raises(ValueError, match='GeM needs'):
        pool.set_p(p)
    assert pool.p == 2.5


def test_other_bad_input():
    for call, message in (
            (lambda: gem(torch.ones(1, 1, 2, 2), 0), 'p > 0, got'), (lambda: GeM(INF, learn_p=True), 'finite, got inf'),
            (lambda: GeM(eps=0), 'eps > 0'), (lambda: GeM(eps=math.nan), 'eps > 0')):
        with pytest.raises(ValueError, match=message):
            call()
