"""Sampling of training triplets from a batch: distance-weighted and uniform negatives.

Distance-weighted sampling: Wu et al., 'Sampling Matters in Deep Embedding Learning', ICCV 2017,
https://arxiv.org/abs/1706.07567, as in MultiGrain: Berman et al., https://arxiv.org/abs/1902.05509, equation 4. A
negative at distance d is drawn with a probability proportional to min(tau, 1 / q(d)), where
q(d) ~ d^(C - 2) (1 - d^2 / 4)^((C - 3) / 2) is the density of the distance between two random points of the unit sphere
of R^C. The cap tau = 1 / q(cutoff) bounds both ends: d below `cutoff`, and d near 2, where 1 / q is unbounded too.
"""
import math

import torch
from torch import Tensor

from .triplets import TripletSampler

__all__ = ['DistanceWeightedSampler', 'UniformSampler', 'create_sampler', 'effective_negatives']


def effective_negatives(prob: Tensor) -> Tensor:
    """Effective number of negatives of each anchor, the exponential of the entropy of its distribution.

    Args:
        prob: Probabilities (B, B) of a sampler, rows sum to 1, or to 0 for an anchor without negatives.

    Returns:
        (B,) from 1, always the same negative, to the number of candidates, uniform; 0 for an anchor without negatives.
    """
    return torch.where(prob.sum(-1) > 0, (-torch.xlogy(prob, prob)).sum(-1).exp(), 0)


class DistanceWeightedSampler(TripletSampler):
    """Draws negatives with a probability that undoes the crowding of distances around sqrt(2).

    The two normalisations are the same formula, yet different methods once C is a few hundred:

    * 'batch': the weights are scaled by the largest one of the batch, that of positives and of the diagonal (taken as
      distance 1) included, before a float32 exponential, as in the original implementation. Anchors whose weights all
      underflow draw uniformly: nearly all of them at C = 2048. This repeats the training of the paper.
    * 'row': the weights are normalised for each anchor in log space, so nothing underflows. This is the formula of the
      paper; at C = 2048 it nearly always draws the closest negative.

    What makes a whole batch of the original implementation uniform is confined here: duplicates are at distance 0, not
    NaN; pairs beyond `nonzero_loss_cutoff` do not scale the others, as only nearly antipodal ones (d > sqrt(3)) could;
    rows that are not finite are left out.

    Args:
        normalize: 'row' or 'batch'.
        cutoff: Distances below are raised to it (weight cap tau).
        nonzero_loss_cutoff: Negatives at this distance or beyond are not drawn, as their loss would be zero.
        max_positives, generator: As of `TripletSampler`.

    Example:
        >>> sampler = DistanceWeightedSampler('row', generator=0)
        >>> embedding = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
        >>> anchors, positives, negatives = sampler(embedding, torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> len(anchors) == len(positives) == len(negatives)
        True
    """

    def __init__(
            self,
            normalize: str = 'row',
            cutoff: float = 0.5,
            nonzero_loss_cutoff: float = 1.4,
            max_positives: int | None = None,
            generator: torch.Generator | int | None = None,
    ):
        super().__init__(max_positives, generator)
        if normalize not in ('batch', 'row'):
            raise ValueError(f"normalize must be 'batch' or 'row', got {normalize!r}")
        if not 0 < cutoff < min(nonzero_loss_cutoff, math.sqrt(2)):
            raise ValueError(
                'cutoff must be positive and below both sqrt(2) and nonzero_loss_cutoff, '
                f'got cutoff={cutoff}, nonzero_loss_cutoff={nonzero_loss_cutoff}')
        self.normalize = normalize
        self.cutoff = cutoff
        self.nonzero_loss_cutoff = nonzero_loss_cutoff

    def log_weights(self, embedding: Tensor) -> Tensor:
        square = _square_distances(embedding)
        beyond = square >= self.nonzero_loss_cutoff ** 2
        # q = d (d^2 (1 - d^2 / 4))^((C - 3) / 2) is symmetric in d^2 around 2, but for the factor d: the upper bound is
        # the mirror of the lower one.
        square.clamp_(self.cutoff ** 2, 4 - self.cutoff ** 2)
        dim = embedding.shape[1]
        log_weight = square.log().mul_((2 - dim) / 2).sub_(square.div_(-4).log1p_(), alpha=(dim - 3) / 2)
        log_weight.masked_fill_(beyond, -math.inf)
        if self.normalize == 'batch':
            # The round trip through float32 is where the original implementation loses its weights.
            log_weight = log_weight.sub_(log_weight.max()).float().exp_().to(log_weight.dtype).log_()
        return log_weight

    def extra_repr(self) -> str:
        return f'{self.normalize!r}, cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}'


class UniformSampler(TripletSampler):
    """Draws negatives uniformly from the images of the other instances; every row with negatives counts as uniform.

    Arguments as of `TripletSampler`.
    """

    def log_weights(self, embedding: Tensor) -> Tensor:
        return embedding.new_full((len(embedding), len(embedding)), -math.inf)


_SAMPLERS = {
    'batch': lambda **kwargs: DistanceWeightedSampler('batch', **kwargs),
    'row': lambda **kwargs: DistanceWeightedSampler('row', **kwargs),
    'uniform': UniformSampler,
}


def create_sampler(name: str, **kwargs) -> TripletSampler:
    """'batch' or 'row', `DistanceWeightedSampler` with that normalisation, or 'uniform', `UniformSampler`."""
    if name not in _SAMPLERS:
        raise ValueError(f'unknown sampling {name!r}, choose one of {", ".join(map(repr, _SAMPLERS))}')
    return _SAMPLERS[name](**kwargs)


def _square_distances(embedding: Tensor) -> Tensor:
    """Squared distances (B, B), 1 on the diagonal, inf for rows that are not finite.

    An error of a distance is multiplied by an exponent in the thousands: float64 but for the inner products on a CPU,
    and where a device has no float64. On a GPU float32 products may be those of TF32, and float64 costs little.
    """
    if embedding.device.type == 'cuda':
        embedding = embedding.double()
    number = len(embedding)
    square = embedding.new_zeros(number, number).addmm_(embedding, embedding.T, alpha=-2)  # autocast leaves it alone
    if square.device.type in ('cpu', 'cuda', 'meta'):
        square = square.double()
    square_norm = square.diagonal() / -2
    square.add_(square_norm).add_(square_norm[:, None])
    return square.nan_to_num_(math.inf, math.inf).fill_diagonal_(1.)
