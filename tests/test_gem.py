"""GeM against the original implementation's numbers, a loop in float64, and the tools a layer has to survive."""
import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from timm_multigrain.layers import GeM, gem, l2_normalize

INF = math.inf


@pytest.fixture(scope='module')
def numbers(golden):
    return load_file(golden / 'gem.safetensors')


def golden_keys(prefix, cases=('square', 'rect', 'one', 'edge'), exponents=('1.0', '2.0', '2.5', '3.0', '4.0', 'inf')):
    return [pytest.param(case, p, id=f'{prefix}-{case}-p{p}') for case in cases for p in exponents]


def assert_close(actual, expected, rel):
    """max |a - b| <= rel max |b|, the tolerance of the golden numbers."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rel * expected.abs().max()


def slow_gem(x, p, eps=1e-6):
    """(N, C, H, W) -> (N, C) by loops in float64; p a number, or one number per channel. In logarithms, so exact for
    any p."""
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


class TestGolden:

    @pytest.mark.parametrize('case, p', golden_keys('y'))
    def test_fixed(self, numbers, case, p):
        assert_close(GeM(float(p))(numbers[f'x.{case}']), numbers[f'y.{case}.p{p}'], 1e-6)

    @pytest.mark.parametrize('case, p', golden_keys('y_learnable', exponents=['1.0']))
    def test_learnable_one_is_clamped(self, numbers, case, p):
        assert_close(GeM(1., learn_p=True)(numbers[f'x.{case}']).detach(), numbers[f'y_learnable.{case}.p{p}'], 1e-6)

    @pytest.mark.parametrize('case, p', golden_keys('grad', exponents=['1.0', '2.5', '3.0']))
    def test_gradients(self, numbers, case, p):
        pool, x = GeM(float(p), learn_p=True), numbers[f'x.{case}'].clone().requires_grad_()
        (numbers[f'upstream.{case}'] * pool(x)).sum().backward()
        assert_close(x.grad, numbers[f'grad_x.{case}.p{p}'], 1e-6)
        assert abs(pool.p.grad - numbers[f'grad_p.{case}.p{p}']) <= 1e-5
        assert (x.grad[x < 1e-6] == 0).all()

    @pytest.mark.parametrize('case, p', golden_keys('grad_frozen', exponents=['1.0', 'inf']))
    def test_gradients_without_clamp(self, numbers, case, p):
        x = numbers[f'x.{case}'].clone().requires_grad_()
        (numbers[f'upstream.{case}'] * GeM(float(p))(x)).sum().backward()
        assert_close(x.grad, numbers[f'grad_x_frozen_p.{case}.p{p}'], 1e-6)

    @pytest.mark.parametrize('case, p', golden_keys('bias', exponents=['3.0']))
    def test_constant_channel_after_pooling(self, numbers, case, p):
        y = GeM()(numbers[f'x.{case}'])
        assert_close(torch.cat([y, torch.ones(len(y), 1)], 1), numbers[f'y_with_bias.{case}.p{p}'], 1e-6)

    def test_l2_normalize(self, numbers):
        assert_close(l2_normalize(numbers['l2n.x']), numbers['l2n.y'], 1e-6)


class TestL2Normalize:

    def test_epsilon_is_added_to_the_norm(self):
        x = torch.tensor([[3., 4.], [0., 0.], [1e-6, 0.]], dtype=torch.float64)
        expected = [[v / (math.hypot(*row) + 1e-6) for v in row] for row in x.tolist()]
        torch.testing.assert_close(l2_normalize(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)

    def test_gradient_at_zero_is_finite(self):
        x = torch.zeros(2, 4, requires_grad=True)
        l2_normalize(x).sum().backward()
        assert x.grad.isfinite().all()

    def test_derivatives_of_every_order(self):
        x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(l2_normalize, x, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(l2_normalize, x, check_batched_grad=True)

    @pytest.mark.parametrize('scale', [0., 1e-25, 1e-6, 1., 1e15])
    def test_gradient_equals_that_of_the_plain_formula(self, scale):
        generator = torch.Generator().manual_seed(0)
        x = (scale * torch.randn(4, 300, generator=generator)).requires_grad_()
        grad = torch.randn(4, 300, generator=generator)
        wide = x.detach().double().requires_grad_()
        plain = wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + 1e-6)
        expected, = torch.autograd.grad(plain, wide, grad.double())
        found, = torch.autograd.grad(l2_normalize(x), x, grad)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())

    def test_tools_and_transforms_see_plain_operations(self):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        expected, = torch.autograd.grad(l2_normalize(x).pow(3).sum(1)[0], x)
        scripted = torch.jit.trace(l2_normalize, x)
        assert_close(torch.autograd.grad(scripted(x).pow(3).sum(1)[0], x)[0], expected, 1e-6)
        transformed = torch.func.grad(lambda x: l2_normalize(x).pow(3).sum(1)[0])(x)
        assert_close(transformed, expected, 1e-6)
        graph = torch.fx.symbolic_trace(l2_normalize)
        assert_close(graph(x), l2_normalize(x), 0)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_computes_in_float32(self, dtype):
        x = torch.full((1, 4096), 100., dtype=dtype)  # the norm, 6400, squares beyond float16
        assert l2_normalize(x).dtype == dtype
        assert torch.equal(l2_normalize(x), l2_normalize(x.float()).to(dtype))


class TestValue:

    @pytest.mark.parametrize('input_fmt, p', [
        ('NCHW', 0.5), ('NCHW', 1.7), ('NCHW', 3.), ('NCHW', 10.), ('NHWC', 1.7), ('NLC', 3.)])
    def test_equals_loop(self, input_fmt, p):
        x = random_map(3, 5, 4, 6)
        y = GeM(p, input_fmt=input_fmt)(to_format(x, input_fmt))
        torch.testing.assert_close(y.double(), slow_gem(x, float(np.float32(p))), rtol=1e-6, atol=0)

    @pytest.mark.parametrize('input_fmt, learn_p', [('NCHW', False), ('NCHW', True), ('NHWC', True), ('NLC', False)])
    def test_one_p_per_channel(self, input_fmt, learn_p):
        x, p = random_map(2, 3, 4, 5), torch.tensor([1., 2.5, 7.])
        pool = GeM(num_channels=3, learn_p=learn_p, input_fmt=input_fmt)
        assert torch.equal(pool.p.detach(), torch.full((3,), 3.))
        pool.set_p(p)
        torch.testing.assert_close(pool(to_format(x, input_fmt)).double(), slow_gem(x, p), rtol=1e-6, atol=0)

    @pytest.mark.parametrize('input_fmt, shape, kwargs', [
        ('NCHW', (2, 5, 1, 1), {}), ('NCHW', (2, 5, 1, 1), {'p': 1}), ('NCHW', (2, 5, 1, 1), {'num_channels': 5}),
        ('NHWC', (2, 1, 1, 5), {'p': INF}), ('NLC', (2, 1, 5), {'learn_p': True})])
    def test_flatten(self, input_fmt, shape, kwargs):
        x = to_format(random_map(2, 5, 3, 4), input_fmt)
        flat = GeM(input_fmt=input_fmt, **kwargs)(x)
        full = GeM(input_fmt=input_fmt, flatten=False, **kwargs)(x)
        assert flat.shape == (2, 5) and full.shape == shape
        assert torch.equal(flat, full.reshape(2, 5))

    def test_functional_defaults_to_the_last_two_dimensions(self):
        x = random_map(2, 3, 4, 5)
        torch.testing.assert_close(gem(x).double(), slow_gem(x, 3.), rtol=1e-6, atol=0)
        assert gem(x, keepdim=True).shape == (2, 3, 1, 1)
        assert gem(x, 2.5, dim=(1, 2, 3)).shape == (2,)
        assert torch.equal(gem(x, 3), gem(x, 3.))

    @pytest.mark.parametrize('p', [1., INF])
    def test_one_and_infinity_keep_negative_values(self, p):
        x = -1 - torch.rand(2, 3, 4, 5)
        y = GeM(p)(x)
        assert torch.equal(y, x.mean((2, 3)) if p == 1 else x.flatten(2).max(2)[0])

    def test_larger_p_approaches_the_maximum(self):
        x = random_map(2, 3, 7, 7)
        values = [GeM(p)(x) for p in (1.5, 3., 10., 100., 1e4)]
        assert all((a <= b).all() for a, b in itertools.pairwise(values))
        torch.testing.assert_close(values[-1], x.amax((2, 3)), rtol=1e-3, atol=0)

    def test_memory_format_does_not_matter(self):
        x = random_map(2, 8, 5, 6)
        torch.testing.assert_close(GeM()(x.to(memory_format=torch.channels_last)), GeM()(x), rtol=1e-6, atol=0)

    @pytest.mark.parametrize('p', [1., 3., INF])
    def test_prefix_tokens_are_left_out(self, p):
        x = random_map(2, 9, 6)
        changed = x.clone()
        changed[:, :3] = 1e3
        pool = GeM(p, input_fmt='NLC', num_prefix_tokens=3)
        assert torch.equal(pool(x), pool(changed))
        assert torch.equal(pool(x), GeM(p, input_fmt='NLC')(x[:, 3:]))


class TestPrecision:

    @pytest.mark.parametrize('p, kwargs', [
        *[(p, {}) for p in (0.1, 8., 100., 1e6)], *[(p, {'learn_p': True}) for p in (0.1, 40., 1000.)],
        *[(p, {'learn_p': True, 'num_channels': 7}) for p in (7.5, 1e6)]], ids=str)
    def test_no_p_overflows_or_underflows(self, p, kwargs):
        x = random_map(1, 7, 7, 7)
        x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0, -1, 1e-7, 10
        x[:, 4] = 0
        x[:, 4, 3, 3] = 30
        x[:, 5] *= 1e20
        x.requires_grad_()
        pool = GeM(p, **kwargs)
        y = pool(x)
        torch.testing.assert_close(y.detach().double(), slow_gem(x.detach(), float(np.float32(p))), rtol=3e-6, atol=0)
        y.sum().backward()
        assert x.grad.isfinite().all()
        assert not kwargs or pool.p.grad.isfinite().all()

    @pytest.mark.parametrize('p, dtype', [
        *[(p, torch.float16) for p in (1., 3., 20., INF)], (3., torch.bfloat16)], ids=str)
    def test_half_input_is_pooled_in_float32(self, dtype, p):
        x = (random_map(2, 3, 7, 7) * 50).to(dtype)  # 50^3 is beyond float16
        y = GeM(p)(x)
        assert y.dtype == dtype and (p == 1 or torch.equal(y, GeM(p)(x.float()).to(dtype)))
        expected = x.double().mean((2, 3)) if p == 1 else x.amax((2, 3)) if p == INF else slow_gem(x, p)
        torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize('learn_p', [False, True])
    def test_autocast_changes_nothing(self, learn_p):
        x, pool = random_map(2, 3, 7, 7), GeM(2.7, learn_p=learn_p)
        with torch.autocast('cpu', torch.bfloat16):
            y, half = pool(x), pool(x.bfloat16())
        assert torch.equal(y, pool(x)) and torch.equal(half, pool(x.bfloat16()))

    @pytest.mark.parametrize('learn_p', [False, True])
    def test_float64_stays_float64(self, learn_p):
        x, pool = random_map(2, 3, 4, 5).double(), GeM(2.5, learn_p=learn_p)
        torch.testing.assert_close(pool(x).detach(), slow_gem(x, 2.5), rtol=1e-13, atol=0)
        torch.testing.assert_close(pool.double()(x).detach(), slow_gem(x, 2.5), rtol=1e-13, atol=0)

    @pytest.mark.parametrize('shape', [(), (3, 1, 1)])
    def test_gradcheck(self, shape):
        x = (random_map(2, 3, 2, 3).double().abs() + 0.05).requires_grad_()
        p = torch.full(shape, 2.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(gem, (x, p))
        assert torch.autograd.gradgradcheck(gem, (x, p))
        assert torch.autograd.gradcheck(lambda x: gem(x, 3.), x)


class TestExponent:
    """p as a number beside a tensor: where it lives, how it changes, what a checkpoint may hold."""

    def test_where_p_lives(self):
        assert list(GeM().state_dict()) == ['p'] and not list(GeM().parameters())
        assert not GeM(persistent=False).state_dict()
        assert [n for n, _ in GeM(learn_p=True, persistent=False).named_parameters()] == ['p']
        assert GeM().p.shape == GeM(learn_p=True).p.shape == (1,) and GeM(num_channels=4).p.shape == (4,)
        assert GeM(2).p.dtype == torch.float32

    @pytest.mark.parametrize('cast, num_channels', [
        ('half', None), ('bfloat16', 3), ('double', None), ('double', 3)])
    def test_fixed_p_keeps_its_value_and_dtype(self, cast, num_channels):
        pool = getattr(GeM(2.7123, num_channels=num_channels), cast)()
        assert pool.p.dtype == torch.float32 and (pool.p == np.float32(2.7123)).all()
        x = random_map(2, 3, 4, 4)
        assert torch.equal(pool(x), GeM(2.7123, num_channels=num_channels)(x))

    def test_learnable_p_is_cast_like_any_parameter(self):
        assert GeM(learn_p=True).half().p.dtype == torch.float16

    @pytest.mark.parametrize('kwargs', [{}, {'learn_p': True}, {'num_channels': 3}], ids=str)
    def test_set_p(self, kwargs):
        x, pool = random_map(2, 3, 4, 4), GeM(**kwargs)
        for p in (5, torch.tensor(5), torch.tensor([5.], dtype=torch.float64)):
            pool.set_p(2)
            assert torch.equal(pool(x), GeM(2, **kwargs)(x))
            pool.set_p(p)
            assert torch.equal(pool(x), GeM(5, **kwargs)(x)) and (pool.p == 5).all()

    @pytest.mark.parametrize('value', [
        torch.tensor(4.5), torch.tensor([4.5]), torch.tensor(4.5, dtype=torch.float64), torch.tensor(4.5).half(),
        torch.tensor(4), torch.tensor(INF), torch.tensor(1.)], ids=str)
    def test_loading_refreshes_the_number(self, value):
        x, pool = random_map(2, 3, 4, 4) - 0.5, GeM(3)
        pool.load_state_dict({'p': value})
        assert pool.p.dtype == torch.float32
        assert torch.equal(pool(x), GeM(float(value))(x))

    @pytest.mark.parametrize('num_channels, learn_p, assign', [
        (None, False, False), (3, False, True), (None, True, True), (3, True, False)])
    def test_integer_checkpoint(self, num_channels, learn_p, assign):
        pool, state = GeM(2.5, learn_p=learn_p, num_channels=num_channels), {'p': torch.tensor(4)}
        pool.load_state_dict(state, assign=assign)
        assert pool.p.dtype == torch.float32 and (pool.p == 4).all() and pool.p.requires_grad == learn_p
        assert state['p'].dtype == torch.int64
        x = random_map(2, 3, 4, 4)
        torch.testing.assert_close(pool(x).double(), slow_gem(x, 4.), rtol=1e-6, atol=0)

    def test_per_channel_checkpoint(self):
        p = torch.tensor([1., 2., 3.])
        pool = GeM(num_channels=3, learn_p=True)
        pool.load_state_dict({'p': p})
        assert torch.equal(pool.p, p)

    @pytest.mark.parametrize('kwargs, value, message', [
        ({}, torch.ones(4), r'0\.p: expected a p of shape \(1,\) or one value, got \(4,\)'),
        ({'learn_p': True}, torch.ones(2, 1), r'0\.p: expected a p of shape \(1,\) or one value, got \(2, 1\)'),
        ({'num_channels': 3}, torch.ones(4), r'0\.p: expected a p of shape \(3,\) or one value, got \(4,\)'),
        ({}, torch.tensor(-1.), r'0\.p: GeM needs p > 0, got -1'),
        ({}, torch.tensor(0), r'0\.p: GeM needs p > 0, got 0'),
        ({}, torch.tensor(math.nan), r'0\.p: GeM needs p > 0, got nan'),
        ({'num_channels': 3}, torch.tensor([1., math.nan, 2.]), r'0\.p: GeM needs p > 0, got .*nan'),
        ({'learn_p': True}, torch.tensor(INF), r'0\.p: A learnable or per-channel p has to be finite, got inf'),
        ({}, torch.tensor(True), r'0\.p: expected a real p, got torch.bool'),
    ], ids=str)
    def test_bad_checkpoint(self, kwargs, value, message):
        model = torch.nn.Sequential(GeM(**kwargs))
        before = model[0].p.clone()
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({'0.p': value}, strict=False)
        assert torch.equal(model[0].p, before)

    def test_missing_and_unexpected_keys_stay_torchs(self):
        with pytest.raises(RuntimeError, match='Missing key'):
            GeM().load_state_dict({})
        with pytest.raises(RuntimeError, match='Unexpected key'):
            GeM(persistent=False).load_state_dict({'p': torch.tensor(3.)})

    @pytest.mark.parametrize('persistent', [False, True])
    @pytest.mark.parametrize('kwargs', [{}, {'num_channels': 3}], ids=str)
    def test_built_on_meta(self, kwargs, persistent):
        with torch.device('meta'):
            pool = GeM(2.5, persistent=persistent, **kwargs)
            assert pool.p.is_meta and pool(torch.empty(2, 3, 4, 4)).shape == (2, 3)
            assert 'meta' not in repr(pool)
        x = random_map(2, 3, 4, 4)
        expected = GeM(2.5, **kwargs)(x)
        real = copy.deepcopy(pool).to_empty(device='cpu')
        assert torch.equal(real(x), expected) and (real.p == 2.5).all()
        if persistent:
            pool.load_state_dict({'p': torch.tensor(4.)}, assign=True)
            assert torch.equal(pool(x), GeM(4, **kwargs)(x))

    def test_learnable_built_on_meta(self):
        with torch.device('meta'):
            pool = GeM(2.5, learn_p=True)
        pool = pool.to_empty(device='cpu')
        pool.load_state_dict({'p': torch.tensor(4.)})
        assert pool.p.item() == 4 and pool.p.requires_grad

    def test_no_value_is_looked_at_that_is_not_on_the_host(self):
        with FakeTensorMode():  # nor can those be
            for kwargs in ({'p': 1}, {'p': 3}, {'p': INF}, {'learn_p': True}, {'num_channels': 3}):
                pool = GeM(**kwargs)
                x = torch.empty(2, 3, 4, 4, requires_grad=True)
                pool(x).sum().backward()
                assert x.grad.shape == x.shape and pool.value() == ([3.] * 3 if pool.per_channel else pool.init_p)

    @pytest.mark.parametrize('before, after', [(3, 5), (3, 1), (1, INF), (INF, 2.5)])
    def test_p_lives_once(self, before, after):
        """Whoever changes the tensor changes the pooling: in place, an average of weights, a call with another one."""
        x = random_map(2, 3, 4, 4) - 0.2
        expected = GeM(after)(x)
        changed = [GeM(before) for _ in range(3)]
        assert all(torch.equal(pool(x), GeM(before)(x)) for pool in changed)
        changed[0].p.fill_(after)
        changed[1].p.data.copy_(torch.tensor([float(after)]))
        changed[2].p = torch.tensor([float(after)])
        for pool in changed:
            assert torch.equal(pool(x), expected) and pool.value() == after and f'p={after:g}' in repr(pool)
        other = {'p': torch.tensor([float(after)])}
        before = min(before, 9)  # infinity has no average
        pool = GeM(before)
        assert torch.equal(functional_call(pool, other, (x,)), expected) and pool.value() == before
        model = torch.nn.Sequential(pool, torch.nn.Linear(3, 1))
        ema = ModelEmaV3(model, decay=0.5, foreach=True)
        pool.p.fill_(4)
        ema.update(model)
        average = before + 0.5 * (4 - before)
        assert torch.equal(ema.module[0](x), GeM(average)(x)) and pool.value() == 4

    @pytest.mark.parametrize('p', [1, 2.5, INF])
    def test_without_looking_at_p(self, p):
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


class TestTools:
    SPECS = ({}, {'p': 1}, {'p': INF}, {'learn_p': True}, {'num_channels': 3}, {'input_fmt': 'NHWC'},
             {'input_fmt': 'NLC', 'num_prefix_tokens': 1}, {'num_channels': 3, 'learn_p': True, 'flatten': False})

    @staticmethod
    def make(spec):
        return GeM(**spec).eval(), to_format(random_map(2, 3, 4, 6), spec.get('input_fmt', 'NCHW'))

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize('spec', SPECS, ids=str)
    def test_script(self, spec):
        pool, x = self.make(spec)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(pool), buffer)
        buffer.seek(0)
        scripted = torch.jit.load(buffer)
        assert torch.equal(scripted(x), pool(x)) and torch.equal(scripted(x.half()), pool(x.half()))

    @pytest.mark.parametrize('spec', SPECS, ids=str)
    def test_fx(self, spec):
        pool, x = self.make(spec)
        traced = torch.fx.symbolic_trace(pool)
        assert torch.equal(traced(x), pool(x)) and torch.equal(traced(x.double()), pool(x.double()))

    @pytest.mark.parametrize('spec', SPECS, ids=str)
    def test_copies(self, spec):
        pool, x = self.make(spec)
        assert torch.equal(copy.deepcopy(pool)(x), pool(x))
        assert torch.equal(pickle.loads(pickle.dumps(pool))(x), pool(x))

    @pytest.mark.parametrize('spec', SPECS[:1] + SPECS[2:4] + SPECS[-2:], ids=str)
    def test_compile_without_graph_break(self, spec):
        torch._dynamo.reset()
        pool, x = self.make(spec)
        compiled = torch.compile(pool, fullgraph=True, backend='aot_eager', dynamic=True)
        x = x.clone().requires_grad_()
        torch.testing.assert_close(compiled(x), pool(x), rtol=1e-6, atol=0)
        compiled(x).sum().backward()
        if spec.get('p') != INF:
            pool.set_p(5)
            torch.testing.assert_close(compiled(x), GeM(**{**spec, 'p': 5})(x), rtol=1e-6, atol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize('p, learn_p', [(100, False), (INF, False), (3, True)])
    def test_onnx_with_dynamic_size(self, tmp_path, p, learn_p):
        runtime = pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
        pool, file = GeM(p, learn_p=learn_p).eval(), tmp_path / 'gem.onnx'
        torch.onnx.export(
            pool, (random_map(2, 3, 4, 6),), file, dynamo=True, verbose=False, input_names=['x'], output_names=['y'],
            dynamic_shapes={'x': {2: torch.export.Dim('h', min=1, max=99), 3: torch.export.Dim('w', min=1, max=99)}})
        session = runtime.InferenceSession(file, providers=['CPUExecutionProvider'])
        for shape in ((2, 3, 4, 6), (2, 3, 9, 5), (2, 3, 31, 17)):
            x = random_map(*shape)
            y = torch.from_numpy(session.run(['y'], {'x': x.numpy()})[0])
            torch.testing.assert_close(y, pool(x).detach(), rtol=1e-5, atol=1e-6)

    def test_repr(self):
        assert repr(GeM(2.5)) == 'GeM(p=2.5, learn_p=False, eps=1e-06, input_fmt=NCHW, flatten=True)'
        pool = GeM(learn_p=True)
        pool.p.data.fill_(4)
        assert 'p=4, learn_p=True' in repr(pool)
        assert 'p=(8 channels)' in repr(GeM(num_channels=8))


class TestErrors:

    @pytest.mark.parametrize('p', [0, -3, -INF, math.nan, 'three', '3', None, True, [3.], 3j, 1e-60], ids=repr)
    def test_bad_p(self, p):
        shown = repr(p).replace('[', r'\[').replace(']', r'\]')
        with pytest.raises(ValueError, match=rf'GeM needs .*p > 0, got {shown}: 1 is the average'):
            GeM(p)
        pool = GeM(2.5)
        with pytest.raises(ValueError, match='GeM needs'):
            pool.set_p(p)
        assert pool.p == 2.5

    @pytest.mark.parametrize('p', [0, -3., math.nan])
    def test_bad_p_of_the_function(self, p):
        with pytest.raises(ValueError, match='GeM needs p > 0, got'):
            gem(torch.ones(1, 1, 2, 2), p)

    @pytest.mark.parametrize('kwargs', [{'learn_p': True}, {'num_channels': 3}], ids=str)
    def test_infinite_p_cannot_be_learned(self, kwargs):
        with pytest.raises(ValueError, match='has to be finite, got inf: fix one scalar p'):
            GeM(INF, **kwargs)

    def test_set_p_of_the_wrong_shape(self):
        with pytest.raises(ValueError, match=r'shape \(3,\) or one value, got \(4,\)'):
            GeM(num_channels=3).set_p(torch.ones(4))

    @pytest.mark.parametrize('tokens', [1, 3])
    def test_nothing_but_prefix_tokens(self, tokens):
        with pytest.raises(ValueError, match=f'{tokens} tokens of which the first 3 are prefix tokens'):
            GeM(input_fmt='NLC', num_prefix_tokens=3)(torch.ones(2, tokens, 4))

    def test_bad_format(self):
        with pytest.raises(ValueError, match="Unknown input_fmt 'NCL', expected one of NCHW, NHWC, NLC"):
            GeM(input_fmt='NCL')
        with pytest.raises(ValueError, match="num_prefix_tokens=1 needs input_fmt='NLC', got 'NCHW'"):
            GeM(num_prefix_tokens=1)

    @pytest.mark.parametrize('eps', [0, -1e-6, math.nan, math.inf])
    def test_bad_eps(self, eps):
        with pytest.raises(ValueError, match='GeM needs a finite eps > 0, got'):
            GeM(eps=eps)

    def test_eps_of_any_number(self):
        assert GeM(eps=2)(torch.ones(1, 1, 3, 3)) == 2
        assert GeM(eps=10 ** 30)(torch.ones(1, 1, 3, 3)) == torch.tensor(1e30)  # more than torch takes as an integer


@pytest.mark.parametrize('p, dim', [
    *[(3., dim) for dim in ((-2, -1), (2, 3), (-1, 2), (1, 2), (1,))],
    (1., (-1, 2)), (math.inf, (-1, 2)), (torch.tensor(2.5), (-1, 2))], ids=str)
def test_dimensions_are_taken_out(p, dim):
    x = torch.rand(2, 3, 1, 4)  # an own dimension of size 1 stays
    kept = gem(x, p, dim=dim, keepdim=True)
    shape = [n for i, n in enumerate(x.shape) if i not in [d % 4 for d in dim]]
    assert torch.equal(gem(x, p, dim=dim), kept.reshape(shape))


def test_older_onnx_exporter(tmp_path):
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.onnx.export(GeM(3.0), (torch.rand(2, 5, 4, 6),), tmp_path / 'gem.onnx', dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / 'gem.onnx', providers=['CPUExecutionProvider'])
    x = torch.rand(2, 5, 4, 6)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), GeM(3.0)(x), rtol=1e-5, atol=1e-6)
