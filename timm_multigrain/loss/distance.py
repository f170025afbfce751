"""Squared distances of the pairs of triplets, with a backward that keeps no row of the embedding twice.

Indexing the embedding copies a row for every pair, several times over. On a CPU `_PairDistances` walks over the pairs
in blocks that stay in its cache and adds their gradients to the rows directly.
"""
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from timm_multigrain.eager import is_traced

__all__ = ['square_pair_distances']

_BLOCK = 2 ** 17  # values that are looked at together: 512 KiB


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
        result = embedding.new_zeros(others.shape)
        for pairs in _blocks(anchor, embedding.shape[1]):
            rows = embedding.index_select(0, anchor[pairs])
            for other, target in zip(others, result, strict=True):
                difference = rows - embedding.index_select(0, other[pairs])
                target[pairs] = difference.square_().sum(1)
        return result

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
        for pairs in _blocks(anchor, embedding.shape[1]):
            rows = embedding.index_select(0, anchor[pairs])
            total = torch.zeros_like(rows)
            for other, slope in zip(others, grad, strict=True):
                difference = (rows - embedding.index_select(0, other[pairs])).mul_(slope[pairs, None])
                result.index_add_(0, other[pairs], difference, alpha=-1)
                total += difference
            result.index_add_(0, anchor[pairs], total)
        return result, None, None


def _blocks(anchor: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Positions of the pairs that are no padding."""
    return (anchor >= 0).nonzero().flatten().split(max(_BLOCK // dim, 1))
