"""Distances of pairs against indexing, with gradients of every order."""
import math

import pytest
import torch

from timm_multigrain.loss import distance
from timm_multigrain.loss.distance import square_pair_distances


def make_pairs(batch=7, dim=5, number=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(batch, dim, generator=generator, dtype=dtype)
    index = torch.randint(batch, (3, number), generator=generator)
    index[:, ::7] = -1
    index[1, 3] = index[0, 3]  # a row and itself
    return embedding, index[0], index[1:]


def slow_distances(embedding, anchor, others):
    rows = [[
        ((embedding[a] - embedding[b]) ** 2).sum() if a >= 0 else embedding.new_zeros(())
        for a, b in zip(anchor.tolist(), other, strict=True)] for other in others.tolist()]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize('block', [1, 60, 2 ** 17])
def test_equals_loops(monkeypatch, block):
    monkeypatch.setattr(distance, '_BLOCK', block)
    embedding, anchor, others = make_pairs()
    grad = torch.randn(others.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (square_pair_distances, slow_distances):
        x = embedding.clone().requires_grad_()
        y = function(x, anchor, others)
        results.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_derivatives_of_every_order():
    embedding, anchor, others = make_pairs(batch=4, dim=3, number=9)
    embedding.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: square_pair_distances(x, anchor, others), embedding, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: (square_pair_distances(x, anchor, others) + 1).sqrt(), embedding)


def test_transforms():
    embedding, anchor, others = make_pairs()

    def loss(x):
        return square_pair_distances(x, anchor, others).sum()

    x = embedding.clone().requires_grad_()
    expected, = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(embedding), expected)
    assert torch.func.vmap(loss)(torch.stack([embedding, embedding])).shape == (2,)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_padding_is_apart_from_rows_that_are_not_finite(bad):
    embedding = torch.ones(3, 4)
    embedding[0, 1] = bad
    embedding.requires_grad_()
    y = square_pair_distances(embedding, torch.tensor([-1, 1]), torch.tensor([[-1, 2], [-1, 1]]))
    assert y.tolist() == [[0, 0], [0, 0]]
    grad, = torch.autograd.grad(y.sum(), embedding)
    assert not grad.any()


def test_nothing_but_padding():
    embedding = torch.ones(3, 4, requires_grad=True)
    none = torch.full((5,), -1)
    y = square_pair_distances(embedding, none, torch.stack([none, none]))
    assert y.shape == (2, 5) and not y.any()
    assert not torch.autograd.grad(y.sum(), embedding)[0].any()
    assert square_pair_distances(embedding, none[:0], torch.stack([none, none])[:, :0]).shape == (2, 0)
