"""What a person watches while the instance loss trains: is it still at work, and on what."""
import torch
from torch import Tensor, nn

from timm_multigrain.loss import MarginLoss, Triplets, effective_negatives, margin_statistics

__all__ = ['instance_statistics']


@torch.no_grad()
def instance_statistics(
        embedding: Tensor,
        loss: nn.Module,
        triplets: Triplets | None = None,
        prob: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of one batch, 0-dim tensors on the device of the embedding; nothing waits for the host.

    Args:
        embedding: (B, C), L2-normalised.
        loss: The instance loss.
        triplets: Those it worked on.
        prob: Probabilities (B, B) the negatives were drawn with.

    Returns:
        'spread', 1 - |mean embedding|^2: half the mean squared distance of two rows, 0 when all embeddings are equal.
        With triplets of a `MarginLoss` 'active_positives' and 'active_negatives', the shares in [0, 1] of the pairs
        that cost something, and 'positive_distance' and 'negative_distance', their mean distances. With `prob`
        'effective_negatives', the exponential of the entropy, averaged over the anchors that have negatives.
    """
    embedding = embedding.detach()
    result = {'spread': 1 - embedding.mean(0).square().sum()}
    if triplets is not None and isinstance(loss, MarginLoss):
        margin = margin_statistics(embedding, triplets, loss.beta, loss.margin)
        pairs = margin['pairs'].clamp(min=1)
        result['active_positives'] = margin['active_pos'] / pairs
        result['active_negatives'] = margin['active_neg'] / pairs
        result['positive_distance'] = margin['pos_dist']
        result['negative_distance'] = margin['neg_dist']
    if prob is not None:
        number = effective_negatives(prob)
        result['effective_negatives'] = number.sum() / (number > 0).sum().clamp(min=1)
    return result
