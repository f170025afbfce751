"""Squared distances of the pairs of triplets, with a backward that keeps no row of the embedding twice.

Indexing the embedding copies a row for every pair, several times over. On a CPU `_PairDistances` walks over the pairs
in blocks that stay in its cache and adds their gradients to the rows directly.
"""
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from timm_multigrain.eager import is_traced

__all__ = ['square_pair_distances']

_BLOCK = 2 ** 18  # values that are looked at together: 1 MiB


def square_pair_distances(embedding: Tensor, anchor: Tensor, others: Tensor) -> Tensor:
    """Squared distances of pairs of rows.

    Args:
        embedding: (B, C).
        anchor: Rows (n,); a pair with the anchor -1 is padding, its distance 0.
        others: Rows (k, n) that the anchors are paired with.

    Returns:
        (k, n).
    """
    if embedding.device.type == 'cpu' and type(embedding) is Tensor and not is_traced():
        return _PairDistances.apply(embedding, anchor, others)
    return _differences(embedding, anchor, others).square().sum(-1)


def _differences(embedding: Tensor, anchor: Tensor, others: Tensor) -> Tensor:
    difference = embedding[anchor.clamp(min=0)] - embedding[others.clamp(min=0)]
    # Masked here and not after the square: the gradient of a padded entry stays zero even when row 0 is NaN.
    return difference.masked_fill(anchor[:, None] < 0, 0.)


class _PairDistances(torch.autograd.Function):

    @staticmethod
    def forward(ctx, embedding: Tensor, anchor: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, anchor, others)
        used, anchor, others = _used(anchor, others)
        result = embedding.new_empty(others.shape)
        for firsts, seconds, targets in _blocks(embedding.shape[1], anchor, others, result):
            rows = embedding.index_select(0, firsts)
            for second, target in zip(seconds, targets, strict=True):
                torch.sum(embedding.index_select(0, second).sub_(rows).square_(), 1, out=target)
        return result if used is None else embedding.new_zeros(len(result), len(used)).masked_scatter_(used, result)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        embedding, anchor, others = ctx.saved_tensors
        grad = 2 * grad
        if torch.is_grad_enabled() or is_traced() or is_legacy_batchedtensor(grad):  # to be differentiated or batched
            difference = _differences(embedding, anchor, others) * grad[..., None]
            result = torch.zeros_like(embedding).index_add(0, anchor.clamp(min=0), difference.sum(0))
            for number, other in enumerate(others):
                result = result.index_add(0, other.clamp(min=0), -difference[number])
            return result, None, None
        result = torch.zeros_like(embedding)
        used, anchor, others = _used(anchor, others)
        grad = grad if used is None else grad[:, used]
        for firsts, seconds, slopes in _blocks(embedding.shape[1], anchor, others, grad):
            rows = embedding.index_select(0, firsts)
            total = None
            for second, slope in zip(seconds, slopes, strict=True):
                difference = embedding.index_select(0, second).sub_(rows).mul_(slope[:, None])
                result.index_add_(0, second, difference)
                total = difference if total is None else total.add_(difference)
            result.index_add_(0, firsts, total, alpha=-1)
        return result, None, None


def _used(anchor: Tensor, others: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Which pairs are no padding, and they."""
    used = anchor >= 0
    return (None, anchor, others) if used.all() else (used, anchor[used], others[:, used])


def _blocks(dim: int, anchor: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(_BLOCK // dim, 1)
    return zip(anchor.split(size), *(r.split(size, 1) for r in rows), strict=True)
