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
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_multigrain.eager import is_traced

__all__ = ['DistanceWeightedSampler', 'Triplets', 'UniformSampler', 'create_sampler', 'effective_negatives']

_PAIRS = 2 ** 17  # pairs that are looked at together on a CPU: 1 MiB in float64
_SIDE = 64  # rows of the blocks of distances there


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
            B * max_positives triplets. None takes all and gives exactly the triplets there are (a GPU then waits for
            the host twice).
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
        """Unnormalised log probability (B, B) of each pair, a new tensor.

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

        Raises:
            ValueError: The shapes or dtypes are not as above.
        """
        parts = [(part.prob(embedding.dtype), part.is_uniform) for part in self._parts(embedding, target)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

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
        _check_batch(embedding, target)
        slots = self._slots(target)
        index = torch.arange(len(target), device=target.device)
        columns, prob = [], []
        for part in self._parts(embedding, target):
            prob += [part.prob(embedding.dtype)] if return_prob else []
            columns.append(self._pairs(part, index, slots))
        positive, negative, num_draws = map(torch.cat, zip(*columns, strict=True))
        used = index[:slots] < num_draws[:, None]
        triplets = index[:, None].expand(-1, slots), positive, negative
        if self.max_positives is None:
            rows, places = used.nonzero(as_tuple=True)
            triplets = Triplets(*(t[rows, places] for t in triplets))
        else:
            padding = 0, self.max_positives - slots
            triplets = Triplets(*(F.pad(t.where(used, -1), padding, value=-1).flatten() for t in triplets))
        return (triplets, torch.cat(prob)) if return_prob else triplets

    def _slots(self, target: Tensor) -> int:
        """Negatives to draw for each anchor, padding included."""
        if self.max_positives is not None:
            return min(self.max_positives, len(target))
        return max(int(target.unique(return_counts=True)[1].max()) - 1, 1)

    def _parts(self, embedding: Tensor, target: Tensor) -> Iterator['_Part']:
        """The batch in groups of anchors, so that what exists of all pairs is their log weights only."""
        _check_batch(embedding, target)
        # An error of a distance is multiplied by an exponent in the thousands; MPS has no float64.
        embedding = embedding.to(torch.float32 if embedding.device.type == 'mps' else torch.float64)
        usable = torch.linalg.vector_norm(embedding, dim=1).isfinite()
        log_weights = self.log_weights(embedding)
        for rows in _split(len(target), _PAIRS // len(target), embedding):
            same = target[rows, None] == target
            positives, negatives = same & usable, ~same & usable
            positives.diagonal(rows.start).fill_(False)
            log_weight = log_weights[rows].masked_fill_(~negatives, -math.inf)
            is_uniform = log_weight.amax(1).isneginf() & usable[rows]
            if _is_blind(embedding) or is_uniform.any():
                log_weight.masked_fill_(is_uniform[:, None] & negatives, 0.)
            yield _Part(positives, log_weight, is_uniform & negatives.any(1))

    def _pairs(self, part: '_Part', index: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positives and negatives (rows, slots) of the anchors, and how many of the slots count."""
        score = torch.where(part.positives, (len(index) - index).to(torch.float32), 0.)  # the first ones in the batch
        score, positive = score.topk(slots)
        num_draws = (score > 0).sum(1)
        negative, num_candidates = self._draw(part.log_weight, num_draws, slots)
        return positive, negative, num_draws * (num_candidates > 0)

    def _draw(self, log_weight: Tensor, num_draws: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Negatives (rows, slots) of as many anchors, and how many there are to draw from, at most `slots`.

        Overwrites the log weights, as copies of them would take most of the time.
        """
        # logarithms of exponential variables, for which float32 is fine enough; log is eight times as fast as log1p
        noise = torch.empty(log_weight.shape, device=log_weight.device)
        noise.uniform_(generator=self._generator(noise.device)).neg_().add_(1.)
        noise.log_().neg_().clamp_(min=2 ** -25).log_()
        peak = log_weight.amax(1, keepdim=True)
        keys, candidates = log_weight.sub_(noise).topk(slots)
        # A row short of candidates has all of them at the front: draw positions among those by their cumulative sum.
        num_candidates = (~keys.isneginf()).sum(1)
        weight = (keys + noise.gather(1, candidates) - peak).exp()
        cumulative = weight.nan_to_num_().cumsum(1)
        uniform = torch.empty_like(cumulative).uniform_(generator=self._generator(noise.device))
        repeated = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        repeated = torch.minimum(repeated, (num_candidates[:, None] - 1).clamp(min=0))
        position = torch.arange(slots, device=noise.device).expand_as(repeated)
        position = torch.where((num_candidates < num_draws)[:, None], repeated, position)
        return candidates.gather(1, position), num_candidates

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
        batch_size, dim = embedding.shape
        log_weight = embedding.new_empty(batch_size, batch_size)
        square_norm = torch.linalg.vector_norm(embedding, dim=1).square()
        for rows in _split(batch_size, max(_SIDE, batch_size // 16), embedding):
            # what is left of the diagonal has been computed above it
            columns = slice(rows.start, batch_size)
            square = square_norm[rows, None] + square_norm[columns]
            square.addmm_(embedding[rows], embedding[columns].T, alpha=-2)
            square.fill_diagonal_(1.)
            square = _log_weight(square, dim, self.cutoff, self.nonzero_loss_cutoff)
            log_weight[rows, columns] = square
            if rows.stop < batch_size:
                beyond = slice(rows.stop, batch_size)
                log_weight[beyond, rows] = square[:, rows.stop - rows.start:].T
        if self.normalize == 'batch':
            largest = log_weight.max()
            for rows in _split(batch_size, _PAIRS // batch_size, embedding):
                # The round trip through float32 is where the original implementation loses its weights. An exponential
                # that underflows and the logarithm of 0 are slow, hence a power of 2 and the mask.
                weight = log_weight[rows].sub_(largest).div_(math.log(2)).float().exp2_()
                lost = weight == 0
                log_weight[rows] = weight.masked_fill_(lost, 1.).log_().masked_fill_(lost, -math.inf)
        return log_weight

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


class _Part(NamedTuple):
    """Some anchors: their positives and the log weights of their negatives, (rows, B), and which weights are all 0."""
    positives: Tensor
    log_weight: Tensor
    is_uniform: Tensor

    def prob(self, dtype: torch.dtype) -> Tensor:
        # The fill is for the rows without negatives, NaN by now.
        prob = self.log_weight.softmax(1).masked_fill_(self.log_weight.isneginf(), 0.)
        return prob.to(torch.promote_types(dtype, torch.float32))


def _is_blind(embedding: Tensor) -> bool:
    """Whether a look at values would wait for a device, or stop a compiler."""
    return embedding.device.type != 'cpu' or type(embedding) is not Tensor or is_traced()


def _split(number: int, size: int, embedding: Tensor) -> Iterator[slice]:
    """Slices of `size` rows that fit a CPU's cache; a single one on other devices and for a compiler."""
    size = number if _is_blind(embedding) else max(size, 1)
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


def _log_weight(square: Tensor, dim: int, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """log min(1 / q(cutoff), 1 / q(d)) up to a constant from d^2, which is overwritten; -inf where the loss is zero."""
    square = square.nan_to_num_(math.inf, math.inf)  # rows that are not finite
    beyond = square >= nonzero_loss_cutoff ** 2
    # q = d (d^2 (1 - d^2 / 4))^((C - 3) / 2) is symmetric in d^2 around 2, but for the factor d: the upper bound is the
    # mirror of the lower one.
    square = square.clamp_(cutoff ** 2, 4 - cutoff ** 2)
    log_weight = square.log().mul_((2 - dim) / 2)
    log_weight.sub_(square.mul_(-0.25).log1p_(), alpha=(dim - 3) / 2)
    return log_weight.masked_fill_(beyond, -math.inf)


def _check_batch(embedding: Tensor, target: Tensor) -> None:
    if embedding.ndim != 2 or not embedding.is_floating_point() or not len(embedding):
        raise ValueError(
            'embedding must be floating point of shape (B, C), B > 0, '
            f'got {embedding.dtype} of shape {tuple(embedding.shape)}')
    if target.shape != embedding.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f'target must hold one integer instance id for each of the {len(embedding)} embeddings, '
            f'got {target.dtype} of shape {tuple(target.shape)}')
