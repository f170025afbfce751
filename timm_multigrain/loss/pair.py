"""Contrastive and triplet loss over sampled triplets, to compare the margin loss with.

Contrastive loss: Hadsell et al., 'Dimensionality Reduction by Learning an Invariant Mapping', CVPR 2006, section 2.1.
Triplet loss: Schroff et al., 'FaceNet', CVPR 2015, https://arxiv.org/abs/1503.03832, section 3.1.
"""
from torch import Tensor, nn

from .margin import distances, square_distances
from .triplets import Triplets

__all__ = ['ContrastiveLoss', 'TripletLoss']


class ContrastiveLoss(nn.Module):
    """D^2 / 2 for images of one instance, max(0, margin - D)^2 / 2 for others, averaged over the pairs of all triplets.

    Args:
        margin: Distance beyond which images of different instances cost nothing.
    """
    needs_triplets = True

    def __init__(self, margin: float = 1.0):
        super().__init__()
        self.margin = margin

    def forward(self, embedding: Tensor, target: Tensor | None, triplets: Triplets) -> Tensor:
        """Scalar, 0 without triplets; target unused, it is in the triplets. Errors and dtypes as in `margin_loss`."""
        positive, negative = distances(embedding, triplets)
        used = triplets[0] >= 0
        terms = (positive.square() + (self.margin - negative).clamp(min=0).square()) / 2
        return (terms * used).sum() / (2 * used.sum()).clamp(min=1)

    def extra_repr(self) -> str:
        return f'margin={self.margin}'


class TripletLoss(nn.Module):
    """max(0, D_ap^2 - D_an^2 + margin), averaged over the triplets where it is above zero.

    Args:
        margin: By how much the squared distance of the negative must exceed that of the positive.
    """
    needs_triplets = True

    def __init__(self, margin: float = 0.2):
        super().__init__()
        self.margin = margin

    def forward(self, embedding: Tensor, target: Tensor | None, triplets: Triplets) -> Tensor:
        """Scalar, 0 if none costs; target unused, it is in the triplets. Errors and dtypes as in `margin_loss`."""
        positive, negative = square_distances(embedding, triplets)
        terms = (positive - negative + self.margin).clamp(min=0) * (triplets[0] >= 0)
        return terms.sum() / (terms > 0).sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f'margin={self.margin}'
