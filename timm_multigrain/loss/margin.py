"""Margin loss over sampled triplets.

Wu et al., 'Sampling Matters in Deep Embedding Learning', ICCV 2017, https://arxiv.org/abs/1706.07567, as in MultiGrain:
Berman et al., https://arxiv.org/abs/1902.05509, second term of equation 5. A pair at distance D, with y = 1 for images
of one instance and -1 otherwise, costs max(0, alpha + y (D - beta)). The boundary beta is learned, the margin alpha is
not.
"""
import torch
from torch import Tensor, nn

from .distance import square_pair_distances
from .triplets import Triplets

__all__ = ['MarginLoss', 'margin_loss', 'margin_statistics']


def margin_loss(embedding: Tensor, triplets: Triplets, beta: Tensor | float, margin: float = 0.2) -> Tensor:
    """Margin loss of the (anchor, positive) and (anchor, negative) pairs, averaged over the terms above zero.

    Args:
        embedding: (B, C), L2-normalised. Computed in float32, also under autocast; float64 stays float64.
        triplets: Indices into the batch; padding contributes nothing.
        beta: Boundary between the distances of the two kinds of pairs, a tensor of one element or a number.
        margin: Half the width of the zone around beta that costs (alpha).

    Returns:
        Scalar. Zero, with zero gradients, if no term is above zero or there is no triplet.

    Raises:
        ValueError: The shapes or dtypes are not as above.
    """
    terms, _ = _margin_terms(embedding, triplets, beta, margin)
    return terms.sum() / (terms > 0).sum().clamp(min=1)


@torch.no_grad()
def margin_statistics(
        embedding: Tensor,
        triplets: Triplets,
        beta: Tensor | float,
        margin: float = 0.2,
) -> dict[str, Tensor]:
    """What the margin loss works on, for logging; arguments and errors as in `margin_loss`.

    Returns:
        0-dim tensors: 'pairs', the number of triplets, which is that of the pairs of either kind; 'active_pos' and
        'active_neg', how many of those cost something; 'pos_dist' and 'neg_dist', their mean distances (0 if none).
    """
    terms, distance = _margin_terms(embedding, triplets, beta, margin)
    used = triplets.anchor >= 0
    active = (terms > 0).sum(1)
    mean = (distance * used).sum(1) / used.sum().clamp(min=1)
    return {
        'pairs': used.sum(),
        'active_pos': active[0],
        'active_neg': active[1],
        'pos_dist': mean[0],
        'neg_dist': mean[1],
    }


class MarginLoss(nn.Module):
    """Margin loss with its boundary beta as parameter, float32 of shape (1,).

    Args:
        beta_init: Initial boundary, a distance between unit vectors.
        margin: Half the width of the zone around beta that costs.

    Raises:
        ValueError: beta_init is no distance between unit vectors, or the margin is negative.
    """
    needs_triplets = True

    def __init__(self, beta_init: float = 1.2, margin: float = 0.2):
        super().__init__()
        if not 0 < beta_init < 2:
            raise ValueError(f'beta_init is {beta_init}: give a distance of unit vectors, above 0 and below 2, as 1.2')
        if not 0 <= margin < 2:
            raise ValueError(f'margin is {margin}: give a number from 0 to below 2, such as 0.2')
        self.beta = nn.Parameter(torch.tensor([beta_init], dtype=torch.float32))
        self.margin = margin

    def forward(self, embedding: Tensor, target: Tensor | None, triplets: Triplets) -> Tensor:
        """Scalar, see `margin_loss`; the target is in the triplets already."""
        return margin_loss(embedding, triplets, self.beta, self.margin)

    def extra_repr(self) -> str:
        return f'margin={self.margin}'


def square_distances(embedding: Tensor, triplets: Triplets) -> Tensor:
    """Squared distances (2, n) of the pairs (anchor, positive) and (anchor, negative), 0 for padding."""
    if embedding.ndim != 2 or not embedding.is_floating_point():
        raise ValueError(
            'embedding must be floating point of shape (B, C), '
            f'got {embedding.dtype} of shape {tuple(embedding.shape)}')
    shapes = [tuple(index.shape) for index in triplets]
    if len(shapes) != 3 or len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f'triplets must be three index tensors of one shape (n,), got shapes {shapes}')
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    return square_pair_distances(embedding, triplets[0], torch.stack(tuple(triplets[1:])))


def distances(embedding: Tensor, triplets: Triplets) -> Tensor:
    """Distances (2, n), as `square_distances`; 1e-8 under the root keeps the gradient of coincident pairs finite."""
    return (square_distances(embedding, triplets) + 1e-8).sqrt()


def _margin_terms(embedding: Tensor, triplets: Triplets, beta: Tensor | float, margin: float) -> tuple[Tensor, Tensor]:
    distance = distances(embedding, triplets)
    excess = distance - beta
    terms = torch.stack([margin + excess[0], margin - excess[1]]).clamp(min=0)
    return terms.masked_fill(triplets[0] < 0, 0.), distance
