"""Triplets of a batch: the pairing of the images of each instance, and the draw of negatives by any weights.

A batch holds several images of each instance. Every ordered pair of images of one instance is an (anchor, positive)
pair, and an anchor gets as many negatives, images of other instances, as it has positives.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['TripletSampler', 'Triplets']


class Triplets(NamedTuple):
    """Indices into a batch, int64 of shape (n,). An entry of -1 in all three is padding and contributes nothing."""
    anchor: Tensor
    positive: Tensor
    negative: Tensor


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
        _, log_weight, is_uniform = self._candidates(embedding, target)
        return _probabilities(log_weight, embedding.dtype), is_uniform

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
        positives, log_weight, _ = self._candidates(embedding, target)
        prob = _probabilities(log_weight, embedding.dtype) if return_prob else None
        slots = self._slots(target)
        index = torch.arange(len(target), device=target.device)
        first = torch.where(positives, (len(index) - index).to(torch.float32), 0.)  # the first ones in the batch
        first, positive = first.topk(slots)
        num_draws = (first > 0).sum(1)
        negative, num_candidates = self._draw(log_weight, num_draws, slots)
        used = index[:slots] < (num_draws * (num_candidates > 0))[:, None]
        triplets = index[:, None].expand(-1, slots), positive, negative
        if self.max_positives is None:
            rows, places = used.nonzero(as_tuple=True)
            triplets = Triplets(*(t[rows, places] for t in triplets))
        else:
            padding = 0, self.max_positives - slots
            triplets = Triplets(*(F.pad(t.where(used, -1), padding, value=-1).flatten() for t in triplets))
        return (triplets, prob) if return_prob else triplets

    def _slots(self, target: Tensor) -> int:
        """Negatives to draw for each anchor, padding included."""
        if self.max_positives is not None:
            return min(self.max_positives, len(target))
        return max(int(target.unique(return_counts=True)[1].max()) - 1, 1)

    def _candidates(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which pairs are positives (B, B), log weights of the negatives (B, B), and which rows became uniform (B,)."""
        _check_batch(embedding, target)
        # An error of a distance is multiplied by an exponent in the thousands; not every device has float64.
        embedding = embedding.to(torch.float64 if embedding.device.type in ('cpu', 'cuda', 'meta') else torch.float32)
        usable = torch.linalg.vector_norm(embedding, dim=1).isfinite()
        same = target[:, None] == target
        positives, negatives = same & usable, ~same & usable
        positives.fill_diagonal_(False)
        log_weight = self.log_weights(embedding).masked_fill_(~negatives, -math.inf)
        is_uniform = log_weight.amax(1).isneginf() & usable
        log_weight.masked_fill_(is_uniform[:, None] & negatives, 0.)
        return positives, log_weight, is_uniform & negatives.any(1)

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


def _probabilities(log_weight: Tensor, dtype: torch.dtype) -> Tensor:
    prob = log_weight.softmax(1).masked_fill_(log_weight.isneginf(), 0.)  # rows without negatives are NaN by now
    return prob.to(torch.promote_types(dtype, torch.float32))


def _check_batch(embedding: Tensor, target: Tensor) -> None:
    if embedding.ndim != 2 or not embedding.is_floating_point() or not len(embedding):
        raise ValueError(
            'embedding must be floating point of shape (B, C), B > 0, '
            f'got {embedding.dtype} of shape {tuple(embedding.shape)}')
    if target.shape != embedding.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f'target must hold one integer instance id for each of the {len(embedding)} embeddings, '
            f'got {target.dtype} of shape {tuple(target.shape)}')
