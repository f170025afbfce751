"""The logarithm in place, numpy's on one thread, against float64."""
import math
import warnings

import pytest
import torch

from timm_multigrain.layers.logarithm import log_


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('number', [1, 15, 16, 17, 100_003])
def test_within_four_units_in_the_last_place(dtype, number):
    x = (torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 160 - 80).exp().to(dtype)
    near_one = 1 + torch.linspace(-0.3, 0.3, number, dtype=dtype)
    for a in (x, near_one):
        exact = torch.tensor([math.log(v) for v in a.tolist()], dtype=torch.float64)
        found = a.clone()
        assert log_(found) is found
        assert ((found - exact).abs() <= 4 * torch.finfo(dtype).eps * exact.abs()).all()


def test_what_has_no_logarithm():
    x = torch.tensor([0., -1., math.nan, math.inf])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(log_(x).nan_to_num(7., 8., 9.), torch.tensor([9., 7., 7., 8.]))


def test_a_view_leaves_the_rest_alone():
    x = torch.full((4, 4), 2.)
    log_(x[:, 1])
    assert torch.equal(x[:, [0, 2, 3]], torch.full((4, 3), 2.))
    torch.testing.assert_close(x[:, 1], torch.full((4,), math.log(2)))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_tracers_see_an_operation():
    x = torch.rand(5) + 0.5
    torch.testing.assert_close(torch.vmap(lambda a: log_(a.clone()))(x[:, None])[:, 0], x.log())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(5))
        tangent = torch.autograd.forward_ad.unpack_dual(log_(dual.clone())).tangent
    torch.testing.assert_close(tangent, 1 / x)
    graph = torch.jit.trace(lambda a: log_(a.clone()), x)
    torch.testing.assert_close(graph(x + 1), (x + 1).log())
