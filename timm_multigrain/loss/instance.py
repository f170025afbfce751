"""The instance loss by name or object: ours, or one of the pytorch-metric-learning library.

Every instance loss is a module called as `loss(embedding, target, triplets)` that returns a scalar. Its attribute
`needs_triplets` says whether triplets have to be sampled for it; if not, they may be None.
"""
import difflib
import inspect

import torch
from torch import Tensor, nn

from .margin import MarginLoss
from .pair import ContrastiveLoss, TripletLoss
from .triplets import Triplets

__all__ = ['MetricLearningLoss', 'create_instance_loss']

_LOSSES = {'margin': MarginLoss, 'contrastive': ContrastiveLoss, 'triplet': TripletLoss}


class MetricLearningLoss(nn.Module):
    """A pytorch-metric-learning loss as instance loss, computed in float32 outside autocast (float64 stays float64).

    Args:
        loss: Loss object called as loss(embedding, target, indices_tuple=...).
        use_triplets: Give it the sampled triplets, without their padding (a host synchronisation). Otherwise it sees
            all pairs of the batch and tells them apart by the target; some losses support only this.

    Raises:
        ValueError: The loss has no argument indices_tuple, so it is not one that can be called like this.
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
        """Scalar loss of a batch.

        Args:
            embedding: (B, C), L2-normalised.
            target: Instance ids (B,).
            triplets: Indices into the batch; ignored unless `needs_triplets`.

        Raises:
            ValueError: The loss does not support triplets, or rejects the shapes.
        """
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


def create_instance_loss(spec: str | nn.Module, **kwargs) -> nn.Module:
    """Builds an instance loss.

    Args:
        spec: 'margin', 'contrastive', 'triplet', or 'pml:NAME' for a class of `pytorch_metric_learning.losses`; or a
            loss object: one with the interface of this module is returned as it is, one of pytorch-metric-learning
            becomes a `MetricLearningLoss`.
        **kwargs: Arguments of the loss named. `use_triplets` goes to the `MetricLearningLoss`, also for an object.

    Raises:
        ValueError: The name is unknown, or the object is not a loss of either kind.
        ImportError: 'pml:NAME' without pytorch-metric-learning installed.
    """
    if isinstance(spec, nn.Module):
        if not hasattr(spec, 'needs_triplets'):
            return MetricLearningLoss(spec, **kwargs)
        if kwargs:
            raise ValueError(f'{type(spec).__name__} is built already, it takes no {", ".join(kwargs)}')
        return spec
    if isinstance(spec, str) and spec.startswith('pml:'):
        adapter = {'use_triplets': kwargs.pop('use_triplets')} if 'use_triplets' in kwargs else {}
        return MetricLearningLoss(_find_metric_learning_loss(spec[4:])(**kwargs), **adapter)
    if spec not in _LOSSES:
        raise ValueError(f"unknown instance loss {spec!r}, choose one of {', '.join(map(repr, _LOSSES))} or 'pml:NAME'")
    return _LOSSES[spec](**kwargs)


def _find_metric_learning_loss(name: str) -> type[nn.Module]:
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise ImportError(
            f"'pml:{name}' needs pytorch-metric-learning: pip install 'timm_multigrain[metric]'") from error
    classes = {key: value for key, value in vars(losses).items() if key.endswith(('Loss', 'Losses', 'Memory'))}
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=4, cutoff=0.4) or sorted(classes)
        raise ValueError(f'pytorch_metric_learning.losses has no {name!r}, did you mean {", ".join(near)}?')
    return classes[name]
