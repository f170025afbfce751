"""Sampling of training triplets from a batch: distance-weighted and uniform negatives.

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
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['DistanceWeightedSampler', 'Triplets', 'UniformSampler', 'create_sampler', 'effective_negatives']


class Triplets(NamedTuple):
    """Indices into a batch, int64 of shape (n,). An entry of -1 in all three is padding and contributes nothing."""
    anchor: Tensor
    positive: Tensor
    negative: Tensor


def effective_negatives(prob: Tensor) -> Tensor:
    """Effective number of negatives of each anchor, the exponential of the entropy of its distribution.

    Args:
        prob: Probabilities (B, B) of a sampler, rows sum to 1, or to 0 for an anchor without negatives.

    Returns:
        (B,) from 1, always the same negative, to the number of candidates, uniform; 0 for an anchor without negatives.
    """
    return torch.where(prob.sum(-1) > 0, torch.special.entr(prob).sum(-1).exp(), 0)


class TripletSampler(nn.Module):
    """Base of the samplers: pairs the images of each instance and draws the negatives.

    A subclass says by `log_weights` how likely a negative is. Rows of the embedding that are not finite take no part at
    all. An anchor without positives or without negatives gives no triplet; an image that is alone of its instance still
    serves as a negative.

    The draw is without replacement, each next negative with a probability proportional to the weights of those left
    (Gumbel top-k). An anchor with fewer candidates of non-zero weight than draws makes them with replacement. Its k-th
    negative goes with its k-th positive.

    With `max_positives` no shape depends on the values: there is no host synchronisation, and
    `torch.compile(fullgraph=True)` works, except with a `generator`, which the compiler cannot trace.

    Args:
        max_positives: Positives used of each anchor, the first ones in the batch; the output is then padded to
            B * max_positives triplets. None takes all and gives exactly the triplets there are (one host
            synchronisation on a GPU).
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
        """Unnormalised log probability (B, B) of each pair; a row of nothing but -inf becomes uniform."""
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

        Raises:
            ValueError: The shapes or dtypes are not as above.
        """
        _, _, log_prob, uniform_row = self._log_probabilities(embedding, target)
        return log_prob.exp().to(torch.promote_types(embedding.dtype, torch.float32)), uniform_row

    @torch.no_grad()
    def forward(
            self,
            embedding: Tensor,
            target: Tensor,
            return_prob: bool = False,
    ) -> Triplets | tuple[Triplets, Tensor]:
        """Draws triplets, ordered by anchor, then positive; arguments and errors as in `probabilities`.

        With `return_prob` also the probabilities (B, B), as `probabilities` gives them, without computing them twice.
        """
        positives, negatives, log_prob, _ = self._log_probabilities(embedding, target)
        triplets = self._triplets(positives, negatives, log_prob)
        if return_prob:
            return triplets, log_prob.exp().to(torch.promote_types(embedding.dtype, torch.float32))
        return triplets

    def _triplets(self, positives: Tensor, negatives: Tensor, log_prob: Tensor) -> Triplets:
        batch_size = len(positives)
        slots = batch_size if self.max_positives is None else min(self.max_positives, batch_size)
        index = torch.arange(batch_size, device=positives.device)
        num_draws = positives.sum(1).clamp(max=slots) * negatives.any(1)
        anchor = index[:, None].expand(-1, slots)
        positive = (positives * (batch_size - index)).topk(slots).indices
        triplets = anchor, positive, self._draw(log_prob, num_draws, slots)
        used = index[:slots] < num_draws[:, None]
        if self.max_positives is None:
            rows, columns = used.nonzero(as_tuple=True)
            return Triplets(*(t[rows, columns] for t in triplets))
        padding = 0, self.max_positives - slots
        return Triplets(*(F.pad(t.where(used, -1), padding, value=-1).flatten() for t in triplets))

    def _log_probabilities(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _check_batch(embedding, target)
        # An error of a distance is multiplied by an exponent in the thousands; MPS has no float64.
        embedding = embedding.to(torch.float32 if embedding.device.type == 'mps' else torch.float64)
        finite = embedding.isfinite().all(1)
        usable = finite[:, None] & finite
        same = target[:, None] == target
        positives = (same & usable).fill_diagonal_(False)
        negatives = ~same & usable
        log_weight = self.log_weights(embedding).masked_fill(~negatives, -math.inf)
        weightless = log_weight.isneginf().all(1)
        log_weight = log_weight.masked_fill(weightless[:, None] & negatives, 0.)
        # The second fill is for the rows without negatives, NaN by now.
        log_prob = log_weight.log_softmax(1).masked_fill(~negatives, -math.inf)
        return positives, negatives, log_prob, weightless & negatives.any(1)

    def _draw(self, log_prob: Tensor, num_draws: Tensor, slots: int) -> Tensor:
        exponential = torch.empty_like(log_prob).exponential_(generator=self._generator(log_prob.device))
        exponential = exponential.clamp(min=torch.finfo(log_prob.dtype).tiny)
        candidates = (log_prob - exponential.log()).topk(slots).indices
        # A row short of candidates has all of them at the front: draw positions among those by their cumulative sum.
        num_candidates = (~log_prob.isneginf()).sum(1, keepdim=True)
        cumulative = log_prob.exp().gather(1, candidates).cumsum(1)
        uniform = torch.empty_like(cumulative).uniform_(generator=self._generator(log_prob.device))
        repeated = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        repeated = torch.minimum(repeated, (num_candidates - 1).clamp(min=0))
        position = torch.arange(slots, device=log_prob.device).expand_as(repeated)
        return candidates.gather(1, torch.where(num_candidates < num_draws[:, None], repeated, position))

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if isinstance(self.generator, int):
            self.generator = torch.Generator(device).manual_seed(self.generator)
        return self.generator


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
        max_positives: See `TripletSampler`.
        generator: See `TripletSampler`.
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
        gram = embedding @ embedding.T
        square_norm = gram.diagonal()
        distance = (square_norm[:, None] + square_norm - 2 * gram).clamp(min=0).sqrt()
        distance = distance.where(distance.isfinite(), 1.).fill_diagonal_(1.)
        log_weight = _inverse_density(distance, embedding.shape[1], self.cutoff)
        beyond = distance >= self.nonzero_loss_cutoff
        if self.normalize == 'batch':
            largest = log_weight.masked_fill(beyond, -math.inf).max()
            # The round trip through float32 is where the original implementation loses its weights.
            log_weight = (log_weight - largest).float().exp().log().to(embedding.dtype)
        return log_weight.masked_fill(beyond, -math.inf)

    def extra_repr(self) -> str:
        return f'{self.normalize!r}, cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}'


class UniformSampler(TripletSampler):
    """Draws negatives uniformly from the images of the other instances; every row with negatives counts as uniform.

    Args:
        max_positives: See `TripletSampler`.
        generator: See `TripletSampler`.
    """

    def log_weights(self, embedding: Tensor) -> Tensor:
        return embedding.new_full((len(embedding), len(embedding)), -math.inf)


_SAMPLERS = {
    'batch': lambda **kwargs: DistanceWeightedSampler('batch', **kwargs),
    'row': lambda **kwargs: DistanceWeightedSampler('row', **kwargs),
    'uniform': UniformSampler,
}


def create_sampler(name: str, **kwargs) -> TripletSampler:
    """Builds a sampler by name.

    Args:
        name: 'batch' or 'row', `DistanceWeightedSampler` with that normalisation, or 'uniform', `UniformSampler`.
        **kwargs: Its other arguments.

    Raises:
        ValueError: The name is none of these.
    """
    if name not in _SAMPLERS:
        raise ValueError(f'unknown sampling {name!r}, choose one of {", ".join(map(repr, _SAMPLERS))}')
    return _SAMPLERS[name](**kwargs)


def _inverse_density(distance: Tensor, dim: int, cutoff: float) -> Tensor:
    """log min(1 / q(cutoff), 1 / q(d)), up to a constant."""
    # q = d (d^2 (1 - d^2 / 4))^((C - 3) / 2) is symmetric in d^2 around 2, but for the factor d: the upper bound is the
    # mirror of the lower one.
    distance = distance.clamp(cutoff, math.sqrt(4 - cutoff ** 2))
    return (2 - dim) * distance.log() - (dim - 3) / 2 * torch.log1p(-distance.square() / 4)


def _check_batch(embedding: Tensor, target: Tensor) -> None:
    if embedding.ndim != 2 or not embedding.is_floating_point() or not len(embedding):
        raise ValueError(
            'embedding must be floating point of shape (B, C), B > 0, '
            f'got {embedding.dtype} of shape {tuple(embedding.shape)}')
    if target.shape != embedding.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f'target must hold one integer instance id for each of the {len(embedding)} embeddings, '
            f'got {target.dtype} of shape {tuple(target.shape)}')
