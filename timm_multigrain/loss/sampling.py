"""Triplets of a batch for training: the pairing of the images of each instance, and the draw of negatives.

A batch holds several images of each instance. Every ordered pair of images of one instance is an (anchor, positive)
pair, and an anchor gets as many negatives, images of other instances, as it has positives.

Distance-weighted sampling: Wu et al., 'Sampling Matters in Deep Embedding Learning', ICCV 2017,
https://arxiv.org/abs/1706.07567, as in MultiGrain: Berman et al., https://arxiv.org/abs/1902.05509, equation 4. A
negative at distance d is drawn with a probability proportional to min(tau, 1 / q(d)), where
q(d) ~ d^(C - 2) (1 - d^2 / 4)^((C - 3) / 2) is the density of the distance between two random points of the unit sphere
of R^C. The cap tau = 1 / q(cutoff) bounds both ends: d below `cutoff`, and d near 2, where 1 / q is unbounded too.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Triplets(NamedTuple):
    """Indices into a batch, int64 of shape (n,). An entry of -1 in all three is padding and contributes nothing."""
    anchor: Tensor
    positive: Tensor
    negative: Tensor


class TripletSampler(nn.Module):
    """Base of the samplers: pairs the images of each instance and draws the negatives.

    A subclass says by `log_weights` how likely a negative is. Rows of the embedding that are not finite are left out,
    and an anchor without positives or without negatives gives no triplet.

    The draw is without replacement, each next negative with a probability proportional to the weights of those left
    (Gumbel top-k); with replacement where an anchor has fewer candidates of non-zero weight than draws.

    With `max_positives` shapes do not depend on values: a GPU never waits for the host, and
    `torch.compile(fullgraph=True)` works, except with a `generator`, which the compiler cannot trace.

    Args:
        max_positives: Positives used of each anchor, the first ones in the batch; the output is then padded to
            B * min(max_positives, B) triplets. None takes all and gives exactly the triplets there are.
        generator: Source of randomness, a `torch.Generator` on the device of the embedding, or an int that seeds one at
            the first call; None is torch's global one.
    """

    def __init__(self, max_positives: int | None = None, generator: torch.Generator | int | None = None):
        super().__init__()
        if max_positives is not None and max_positives < 1:
            raise ValueError(f'max_positives must be at least 1, or None for all, got {max_positives}')
        self.max_positives = max_positives
        self.generator = generator

    def log_weights(self, embedding: Tensor) -> Tensor:
        """Unnormalised log probability (B, B) of each pair, a new tensor, for an embedding in float32 or float64.

        A row of nothing but -inf becomes uniform, unless that row of the embedding is not finite: it has to be so then.
        """
        raise NotImplementedError

    @torch.no_grad()
    def probabilities(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probability with which each negative is the first one drawn.

        Args:
            embedding: (B, C) of norm 1, any floating dtype; no gradient flows to it.
            target: Instance id of each row, integers (B,).

        Returns:
            Probabilities (B, B), float32 (float64 for a float64 embedding), row i the distribution of the negatives of
            anchor i, whose sum is 1, or 0 if it has none; and (B,) bool, the rows with negatives none of which had any
            weight, so that they became uniform.
        """
        _, log_weight, is_uniform = self._candidates(embedding, target)
        return _probabilities(log_weight, embedding.dtype), is_uniform

    @torch.no_grad()
    def forward(
            self,
            embedding: Tensor,
            target: Tensor,
            return_prob: bool = False,
    ) -> Triplets | tuple[Triplets, Tensor]:
        """Draws triplets, ordered by anchor, then positive; arguments as in `probabilities`.

        With `return_prob` also the probabilities (B, B), as `probabilities` gives them, without computing them twice.
        """
        positives, log_weight, _ = self._candidates(embedding, target)
        size = len(target)
        if self.max_positives is None:
            slots = max(int(target.unique(return_counts=True)[1].max()) - 1, 1)
        else:
            slots = min(self.max_positives, size)
        index = torch.arange(size, device=target.device)
        first = torch.where(positives, (size - index).to(torch.float32), 0.)  # the first ones in the batch
        first, positive = first.topk(slots)
        num_draws = (first > 0).sum(1)
        negative, num_candidates = self._draw(log_weight, num_draws, slots)
        used = index[:slots] < (num_draws * (num_candidates > 0))[:, None]
        triplets = index[:, None].expand(-1, slots), positive, negative
        if self.max_positives is None:
            triplets = Triplets(*(t[used] for t in triplets))
        else:
            triplets = Triplets(*(t.where(used, -1).flatten() for t in triplets))
        return (triplets, _probabilities(log_weight, embedding.dtype)) if return_prob else triplets

    def _candidates(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which pairs are positives (B, B), log weights of the negatives (B, B), and which rows became uniform (B,)."""
        good = embedding.ndim == 2 and len(embedding) and embedding.is_floating_point()
        if not good or target.shape != embedding.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(
                'give floating point embeddings (B, C), B > 0, and integer instance ids (B,), not '
                f'{embedding.dtype} {tuple(embedding.shape)} and {target.dtype} {tuple(target.shape)}')
        embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        usable = torch.linalg.vector_norm(embedding, dim=1).isfinite()
        same = target[:, None] == target
        positives, negatives = same & usable, ~same & usable
        positives.fill_diagonal_(False)
        log_weight = self.log_weights(embedding).masked_fill_(~negatives, -math.inf)
        is_uniform = log_weight.amax(1).isneginf() & usable
        return positives, log_weight.masked_fill_(is_uniform[:, None] & negatives, 0.), is_uniform & negatives.any(1)

    def _draw(self, log_weight: Tensor, num_draws: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Negatives (B, slots), and how many candidates each anchor has (B,)."""
        generator = self._generator(log_weight.device)
        # torch's own exponential_ takes ten times as long
        uniform = torch.rand(log_weight.shape, generator=generator, device=log_weight.device)
        exponential = (1 - uniform).log_().neg_()
        candidates = (log_weight - exponential.clamp_(min=2 ** -25).log_()).topk(slots).indices
        num_candidates = (~log_weight.isneginf()).sum(1)
        # an anchor with fewer candidates than draws has all of them among these
        weight = log_weight.gather(1, candidates).softmax(1).nan_to_num(1.)
        repeated = torch.multinomial(weight, slots, replacement=True, generator=generator)
        negative = torch.where((num_candidates < num_draws)[:, None], candidates.gather(1, repeated), candidates)
        return negative, num_candidates

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if isinstance(self.generator, int):
            self.generator = torch.Generator(device).manual_seed(self.generator)
        return self.generator


def _probabilities(log_weight: Tensor, dtype: torch.dtype) -> Tensor:
    prob = log_weight.softmax(1).nan_to_num(0.)  # rows without negatives
    return prob.to(torch.promote_types(dtype, torch.float32))


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

    Unlike in the original implementation duplicates are at distance 0, not NaN, and pairs beyond `nonzero_loss_cutoff`
    do not scale the others.

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
