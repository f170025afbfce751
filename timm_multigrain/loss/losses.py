"""Losses over sampled triplets: margin, contrastive, triplet, and those of pytorch-metric-learning.

Every instance loss is a module called as `loss(embedding, target, triplets)` that returns a scalar. Its attribute
`needs_triplets` says whether triplets have to be sampled for it; if not, they may be None. Distances are computed in
float32, also under autocast; a float64 embedding stays float64.
"""
import difflib
import inspect
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from timm_multigrain.extras import extra

from .sampling import Triplets

CHUNK = 2 ** 18  # values that a CPU works on together: 1 MiB, which stays in its cache


def margin_loss(embedding: Tensor, triplets: Triplets, beta: Tensor | float, margin: float = 0.2) -> Tensor:
    """Margin loss of the (anchor, positive) and (anchor, negative) pairs, averaged over the terms above zero.

    Wu et al., 'Sampling Matters in Deep Embedding Learning', ICCV 2017, https://arxiv.org/abs/1706.07567, as in
    MultiGrain (https://arxiv.org/abs/1902.05509, second term of equation 5). A pair at distance D, with y = 1 for
    images of one instance and -1 otherwise, costs max(0, margin + y (D - beta)).

    Args:
        embedding: (B, C), L2-normalised.
        triplets: Indices into the batch; padding contributes nothing.
        beta: Boundary between the distances of the two kinds of pairs, a tensor of one element or a number.
        margin: Half the width of the zone around beta that costs.

    Returns:
        Scalar. Zero, with zero gradients, if no term is above zero or no triplet exists.
    """
    return _margin_loss(_distances(embedding, triplets), triplets, beta, margin)


@torch.no_grad()
def margin_statistics(
        embedding: Tensor,
        triplets: Triplets,
        beta: Tensor | float,
        margin: float = 0.2,
) -> dict[str, Tensor]:
    """What the margin loss works on, for logging; arguments as in `margin_loss`.

    Returns:
        0-dim tensors, 0 without triplets: 'active_positives' and 'active_negatives', the shares in [0, 1] of the pairs
        that cost something; 'positive_distance' and 'negative_distance', the mean distances of the pairs;
        'balanced_beta', the boundary at which as many positives as negatives cost something.
    """
    distance = _distances(embedding, triplets)
    terms = _margin_terms(distance, triplets, beta, margin)
    used = triplets[0] >= 0
    number = used.sum().clamp(min=1)
    active_positives, active_negatives = (terms > 0).sum(1) / number
    positive_distance, negative_distance = (distance * used).sum(1) / number
    return {
        'active_positives': active_positives,
        'active_negatives': active_negatives,
        'positive_distance': positive_distance,
        'negative_distance': negative_distance,
        'balanced_beta': _balanced_beta(distance, triplets, margin).nan_to_num(0.),
    }


class MarginLoss(nn.Module):
    """Margin loss, see `margin_loss`, with its boundary beta, float32 of shape (1,).

    With a number, beta starts there and is a parameter, as in the papers: the optimizer has to move it to where the
    distances are, and an adaptive one moves it by its learning rate per step at most. With 'auto' it is a buffer that
    follows the distances, whatever the optimizer: the boundary at which as many positives as negatives cost something,
    averaged over the last ten training batches or so.

    Args:
        beta_init: Initial boundary, a distance between unit vectors, or 'auto'.
        margin: Half the width of the zone around beta that costs.

    Raises:
        ValueError: beta_init is not between 0 and 2, or margin not from 0 to below 2.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> embedding = l2_normalize(torch.eye(4))
        >>> triplets = DistanceWeightedSampler()(embedding, labels)
        >>> loss = MarginLoss()
        >>> loss(embedding, labels, triplets) > 0
        tensor(True)
        >>> loss.beta
        tensor([1.4142])
    """
    needs_triplets = True
    momentum = 0.9  # of the average of beta over batches

    def __init__(self, beta_init: float | str = 'auto', margin: float = 0.2):
        super().__init__()
        self.follows = beta_init == 'auto'
        if not self.follows and (isinstance(beta_init, str) or not 0 < beta_init < 2):
            raise ValueError(f"beta_init is {beta_init}: give 'auto', or a distance of unit vectors, above 0 and below "
                             '2, as 1.2')
        if not 0 <= margin < 2:
            raise ValueError(f'margin is {margin}: give a number from 0 to below 2, such as 0.2')
        if self.follows:
            self.register_buffer('beta', torch.zeros(1))  # 0 until the first batch
        else:
            self.beta = nn.Parameter(torch.tensor([beta_init], dtype=torch.float32))
        self.margin = margin

    def forward(self, embedding: Tensor, target: Tensor | None, triplets: Triplets) -> Tensor:
        distance = _distances(embedding, triplets)
        if self.follows and self.training:
            self._follow(distance.detach(), triplets)
        return _margin_loss(distance, triplets, self.beta, self.margin)

    @torch.no_grad()
    def _follow(self, distance: Tensor, triplets: Triplets) -> None:
        found = _balanced_beta(distance, triplets, self.margin)
        found = torch.where(found.isnan(), self.beta, found).to(self.beta.dtype)
        self.beta.copy_(torch.where(self.beta == 0, found, found.lerp(self.beta, self.momentum)))

    def extra_repr(self) -> str:
        return f'margin={self.margin}' + ", beta_init='auto'" * self.follows


class _PairLoss(nn.Module):
    needs_triplets = True
    margin = 0.2

    def __init__(self, margin: float | None = None):
        super().__init__()
        self.margin = self.margin if margin is None else margin

    def extra_repr(self) -> str:
        return f'margin={self.margin}'


class ContrastiveLoss(_PairLoss):
    """D^2 / 2 for images of one instance, max(0, margin - D)^2 / 2 for others, averaged over the pairs of all triplets.

    Hadsell et al., 'Dimensionality Reduction by Learning an Invariant Mapping', CVPR 2006, section 2.1.

    Args:
        margin: Distance beyond which images of different instances cost nothing, 1 by default.
    """
    margin = 1.0

    def forward(self, embedding: Tensor, target: Tensor | None, triplets: Triplets) -> Tensor:
        positive, negative = _distances(embedding, triplets)
        used = triplets[0] >= 0
        terms = (positive.square() + (self.margin - negative).clamp(min=0).square()) / 2
        return (terms * used).sum() / (2 * used.sum()).clamp(min=1)


class TripletLoss(_PairLoss):
    """max(0, D_ap^2 - D_an^2 + margin), averaged over the triplets where it is above zero.

    Schroff et al., 'FaceNet', CVPR 2015, https://arxiv.org/abs/1503.03832, section 3.1.

    Args:
        margin: By how much the squared distance of the negative must exceed that of the positive, 0.2 by default.
    """

    def forward(self, embedding: Tensor, target: Tensor | None, triplets: Triplets) -> Tensor:
        positive, negative = _square_distances(embedding, triplets)
        terms = (positive - negative + self.margin).clamp(min=0) * (triplets[0] >= 0)
        return terms.sum() / (terms > 0).sum().clamp(min=1)


class MetricLearningLoss(nn.Module):
    """A pytorch-metric-learning loss as instance loss.

    Args:
        loss: Loss object called as loss(embedding, target, indices_tuple=...).
        use_triplets: Give it the sampled triplets, without their padding (a host synchronisation), not all pairs of the
            batch; some losses support only the latter.
    """

    def __init__(self, loss: nn.Module, use_triplets: bool = True):
        super().__init__()
        if 'indices_tuple' not in inspect.signature(loss.forward).parameters:
            raise ValueError(
                f'{type(loss).__name__} cannot be an instance loss: it has neither an attribute needs_triplets, to be '
                'called as loss(embedding, target, triplets), nor an argument indices_tuple, as losses of '
                'pytorch-metric-learning have')
        self.loss = loss
        self.needs_triplets = use_triplets

    def forward(self, embedding: Tensor, target: Tensor, triplets: Triplets | None = None) -> Tensor:
        if self.needs_triplets:
            used = triplets.anchor >= 0
            triplets = tuple(index[used] for index in triplets)
        else:
            triplets = None
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            try:
                return self.loss(embedding, target, indices_tuple=triplets)
            except ValueError as error:
                if self.needs_triplets and 'indices_tuple' in str(error):
                    raise ValueError(f'{type(self.loss).__name__} takes no triplets: set use_triplets=False') from error
                raise


_LOSSES = {'margin': MarginLoss, 'contrastive': ContrastiveLoss, 'triplet': TripletLoss}


def create_instance_loss(spec: str | nn.Module, **kwargs) -> nn.Module:
    """Builds an instance loss.

    Args:
        spec: 'margin', 'contrastive', 'triplet', or 'pml:NAME' for a class of `pytorch_metric_learning.losses`; or a
            loss object: one with the interface of this module is returned as it is, one of pytorch-metric-learning
            becomes a `MetricLearningLoss`.
        **kwargs: Arguments of the loss named. `use_triplets` goes to the `MetricLearningLoss`, also for an object.
    """
    if isinstance(spec, nn.Module):
        if not hasattr(spec, 'needs_triplets'):
            return MetricLearningLoss(spec, **kwargs)
        if kwargs:
            raise ValueError(f'{type(spec).__name__} is built already, it takes no {", ".join(kwargs)}')
        return spec
    if isinstance(spec, str) and spec.startswith('pml:'):
        use_triplets = kwargs.pop('use_triplets', True)
        return MetricLearningLoss(_find_metric_learning_loss(spec[4:])(**kwargs), use_triplets)
    if spec not in _LOSSES:
        raise ValueError(f"unknown instance loss {spec!r}, choose one of {', '.join(map(repr, _LOSSES))} or 'pml:NAME'")
    return _LOSSES[spec](**kwargs)


def _find_metric_learning_loss(name: str) -> type[nn.Module]:
    with extra('metric', f'pml:{name}'):
        from pytorch_metric_learning import losses
    classes = {key: value for key, value in vars(losses).items() if key.endswith(('Loss', 'Losses', 'Memory'))}
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=4, cutoff=0.4) or sorted(classes)
        raise ValueError(f'pytorch_metric_learning.losses has no {name!r}, did you mean {", ".join(near)}?')
    return classes[name]


def _margin_loss(distance: Tensor, triplets: Triplets, beta: Tensor | float, margin: float) -> Tensor:
    terms = _margin_terms(distance, triplets, beta, margin)
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def _margin_terms(distance: Tensor, triplets: Triplets, beta: Tensor | float, margin: float) -> Tensor:
    excess = distance - beta
    terms = torch.stack([margin + excess[0], margin - excess[1]]).clamp(min=0)
    return terms.masked_fill(triplets[0] < 0, 0.)


def _balanced_beta(distance: Tensor, triplets: Triplets, margin: float) -> Tensor:
    # gradient descent on beta alone ends there, as the derivative of the loss is the difference of the two numbers
    values = torch.stack([distance[0] + margin, distance[1] - margin]).masked_fill(triplets[0] < 0, math.nan)
    return (values.nanmedian() - (-values).nanmedian()) / 2  # of the middle two, nanmedian takes the lower one


def _distances(embedding: Tensor, triplets: Triplets) -> Tensor:
    """Distances (2, n); 1e-8 under the root keeps the gradient of coincident pairs finite."""
    return (_square_distances(embedding, triplets) + 1e-8).sqrt()


def _square_distances(embedding: Tensor, triplets: Triplets) -> Tensor:
    """Squared distances (2, n) of the pairs (anchor, positive) and (anchor, negative), 0 for padding."""
    if embedding.ndim != 2:
        raise ValueError(f'embedding must be of shape (B, C), got {tuple(embedding.shape)}')
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    anchor, others = triplets[0], torch.stack([triplets[1], triplets[2]])
    used = anchor >= 0
    if embedding.device.type == 'cpu' and not torch.compiler.is_compiling():
        squares = _PairSquares.apply(embedding, anchor[used], others[:, used])
        return squares.new_zeros(others.shape).masked_scatter(used, squares)
    # index_select, whose gradient is added row by row: that of an index is sorted first on a GPU, in a dozen kernels
    rows = embedding.index_select(0, others.clamp(min=0).flatten()).unflatten(0, others.shape)
    difference = rows - embedding.index_select(0, anchor.clamp(min=0))
    # Masked here and not after the square: the gradient of a padded entry stays zero even when row 0 is NaN.
    return difference.masked_fill(~used[:, None], 0.).square().sum(-1)


class _PairSquares(torch.autograd.Function):
    """Squared distances (2, n) of pairs of rows, in half the time of indexing: by chunks that stay in a CPU's cache."""

    @staticmethod
    def forward(ctx, embedding: Tensor, anchor: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, anchor, others)
        squares = []
        for first, seconds in _chunks(embedding, anchor, others):
            rows = embedding.index_select(0, first)
            squares.append(torch.stack([(embedding.index_select(0, i).sub_(rows)).square_().sum(1) for i in seconds]))
        return torch.cat(squares, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        embedding, anchor, others = ctx.saved_tensors
        result = torch.zeros_like(embedding)
        for first, seconds, slopes in _chunks(embedding, anchor, others, 2 * grad):
            rows = embedding.index_select(0, first)
            for second, slope in zip(seconds, slopes, strict=True):
                difference = embedding.index_select(0, second).sub_(rows).mul_(slope[:, None])
                result.index_add_(0, second, difference).index_add_(0, first, difference, alpha=-1)
        return result, None, None


def _chunks(embedding: Tensor, *pairs: Tensor) -> Iterable[tuple[Tensor, ...]]:
    size = max(CHUNK // embedding.shape[1], 1)
    return zip(*(t.split(size, -1) for t in pairs), strict=True)
