"""MultiGrain's training task: cross-entropy and an instance loss on one embedding (arXiv 1902.05509, equation 5).

    loss = lambda * cross-entropy(W e) + (1 - lambda) * instance loss(e / |e|)

For fine-tuning, a term that keeps the embedding near that of the start can be added to the instance loss.
"""
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.models import group_parameters
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from timm_multigrain.layers import l2_normalize
from timm_multigrain.loss import (
    MarginLoss,
    TripletSampler,
    create_instance_loss,
    create_sampler,
    effective_negatives,
    margin_statistics,
)
from timm_multigrain.models import MultiGrain

from .head import embed_and_classify, inspect_head


class MultiGrainTrainableModule(nn.Module):
    """The model and the instance loss with its own parameters (beta): what DDP, EMA and the optimizer see."""

    def __init__(self, model: nn.Module, instance_loss: nn.Module):
        super().__init__()
        self.model = model
        self.instance_loss = instance_loss
        self._head = None if isinstance(model, MultiGrain) else inspect_head(model)

    def no_weight_decay(self) -> set[str]:
        names = {f'model.{n}' for n in getattr(self.model, 'no_weight_decay', set)()}
        return names | {f'instance_loss.{n}' for n, _ in self.instance_loss.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The model's layer groups; the instance loss joins the last one."""
        layers = {}
        if hasattr(self.model, 'group_matcher'):
            layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('model.'), last)

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """(B, C, H, W) to logits (B, K), embedding (B, E), and the loss's parameters, so that DDP finds them used.

        The embedding is that before dropout, which belongs to the classifier.
        """
        features = self.model.forward_features(input)
        if self._head is None:
            embedding = self.model.forward_head(features, pre_logits=True)
            logits = self.model.head.classify(embedding)
        else:
            embedding, logits = embed_and_classify(self.model, features, self._head)
        return logits, embedding, tuple(self.instance_loss.parameters())


class MultiGrainTask(ClassificationTask):
    """Joint training of classes and instances.

    A batch has targets (B, 2) = [class, instance id] with several augmented copies of each image in it, as
    ``timm_multigrain.data.create_loader`` gives them. One-dimensional targets, in eval mode, mean cross-entropy only.

    Args:
        model: A MultiGrain, or any timm model with ``forward_features`` and ``forward_head(..., pre_logits=True)``.
        criterion: Classification loss; created from ``criterion_kwargs`` as timm does when None.
        criterion_kwargs: Arguments of timm's ``create_classification_loss``.
        classif_weight: lambda in [0, 1]. 1 never evaluates the instance loss and is timm's ClassificationTask.
        instance_loss: 'margin', 'contrastive', 'triplet', 'pml:NAME' or a loss object.
        instance_loss_kwargs: Its arguments (beta_init, margin, ...).
        sampling: Negatives: 'row' or 'batch' (distance-weighted), 'uniform', or a sampler object.
        num_repeats: Copies of each image in a batch, as the loader's. A sampler made by name uses at most that many
            less one as positives of an anchor.
        gather: Take negatives from the batches of all ranks.
        freeze_bn: Batch norms normalise by their running statistics and leave them as they are, as at test time; their
            weights are trained. For fine-tuning.
        start_weight: Weight, beside the instance loss, of 1 - the mean cosine between an embedding and the sum of the
            unit embeddings that the model has, as it is given here, for the samples of the instance in the batch. For
            fine-tuning, so that objects that are not in the training set are still found; a third more per step.
        statistics: Add what to watch in a training to the result: 'spread', 1 - |mean embedding|^2, which is half the
            mean squared distance of two rows and 0 when all embeddings are equal; for the margin loss those of
            `timm_multigrain.loss.margin_statistics`; and 'effective_negatives', the exponential of the entropy of the
            negatives, averaged over the anchors that have some.

    Raises:
        ValueError: lambda outside [0, 1], fewer than 2 repeats with lambda < 1, a model without classifier, or an
            unknown loss or sampling.

    Example:
        >>> model = timm.create_model('multigrain_resnet18', num_classes=10)
        >>> task = MultiGrainTask(model, num_repeats=2, verbose=False).train()
        >>> targets = torch.tensor([[3, 0], [3, 0], [7, 1], [7, 1]])  # class, image
        >>> sorted(task(torch.randn(4, 3, 64, 64), targets))
        ['beta', 'classification_loss', 'instance_loss', 'loss', 'output']
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | Callable | None = None,
            criterion_kwargs: dict | None = None,
            classif_weight: float = 0.5,
            instance_loss: str | nn.Module = 'margin',
            instance_loss_kwargs: dict | None = None,
            sampling: str | nn.Module = 'row',
            num_repeats: int = 3,
            gather: bool = False,
            freeze_bn: bool = False,
            start_weight: float = 0.,
            statistics: bool = False,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        if not 0 <= classif_weight <= 1:
            raise ValueError(f'classif_weight (lambda) = {classif_weight} is outside [0, 1]: '
                             '1 is classification only, 0.5 the joint model of the paper.')
        if classif_weight < 1 and num_repeats < 2:
            raise ValueError(
                f'num_repeats={num_repeats} with classif_weight={classif_weight}: the instance loss needs at least 2 '
                'copies of an image in a batch. Use num_repeats=3, or classif_weight=1 for classification only.')
        if getattr(model, 'num_classes', None) == 0:
            raise ValueError('The model has no classifier (num_classes=0): create it with the number of classes, or '
                             'with num_classes=1 to train on images without classes, classif_weight=0.')
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.classif_weight = classif_weight
        self.num_repeats = num_repeats
        self.gather = gather
        self.freeze_bn = freeze_bn
        self.statistics = statistics
        self.joint = classif_weight < 1
        self._positives_seen = False
        if self.joint:
            loss = create_instance_loss(instance_loss, **(instance_loss_kwargs or {})).to(self.device)
            if isinstance(sampling, str):
                sampling = create_sampler(sampling, max_positives=num_repeats - 1)
            self.sampler = sampling
            self.trainable_module = MultiGrainTrainableModule(model, loss)
        self.start_weight = start_weight if self.joint else 0.
        # in a tuple: a submodule would be distributed, averaged and saved
        self._start = (deepcopy(model).requires_grad_(False).eval(),) if self.start_weight else ()

    def _apply(self, fn: Callable, recurse: bool = True) -> 'MultiGrainTask':
        for start in self._start:  # moves and converts with the task
            start._apply(fn)
        return super()._apply(fn, recurse)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> 'MultiGrainTask':
        """Wrap the trainable module in DDP, which takes no device ids on the CPU."""
        return super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

    def compile(self, **kwargs) -> nn.Module:
        """Compile the trainable module for training and the model for evaluation, with arguments of torch.compile."""
        model = self.get_eval_model()
        super().compile(**kwargs)
        if self.joint:
            self.eval_model = torch.compile(model, **kwargs)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare model: checkpoints hold plain model keys, which every timm script reads."""
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = resolved if resolved is None else unwrap_model(resolved)
        return trainable.model if isinstance(trainable, MultiGrainTrainableModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False):
        """The model's parameters, without the classifier if asked, and those of the instance loss."""
        if not self.joint:
            return super().get_clip_parameters(exclude_head=exclude_head)
        trainable = self._trainable()
        parameters = list(trainable.model.parameters())
        return (parameters[:-2] if exclude_head else parameters) + list(trainable.instance_loss.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict:
        """State of the instance loss (beta), beside the model's in a checkpoint."""
        trainable = self._trainable(module, ema)
        return {'instance_loss': trainable.instance_loss.state_dict()} if trainable is not None else {}

    def load_task_state(
            self,
            state: dict | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Load the state of the instance loss; a checkpoint without one leaves it at its start."""
        trainable = self._trainable(module, ema)
        loss_state = (state or {}).get('instance_loss')
        if loss_state is None:
            return
        if trainable is None:
            raise RuntimeError(
                f'The checkpoint holds the state of an instance loss ({", ".join(loss_state) or "empty"}), but this '
                'task has none: resume with classif_weight below 1, or start from the weights alone.')
        trainable.instance_loss.load_state_dict(loss_state, strict=strict)

    def _trainable(self, module: nn.Module | None = None, ema: bool = False) -> MultiGrainTrainableModule | None:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        trainable = module if module is None else unwrap_model(module)
        return trainable if isinstance(trainable, MultiGrainTrainableModule) else None

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of images (B, in_chans, H, W) with (B, 2) integers [class, instance id], or (B,) classes in eval mode
        or with lambda = 1.

        Returns:
            'loss', 'output' (logits), and with an instance loss also 'classification_loss', 'instance_loss' and, if
            there are such, 'beta' and 'start_loss', detached; then the statistics, if asked for.

        Raises:
            ValueError: Training without instance ids, or with a batch that has no two instances or no two copies, or
                with a first batch whose copies are all alike.
        """
        if self.freeze_bn:  # here, as train() of train.py goes past the task
            for module in self.trainable_module.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        labels = target[:, 0] if target.ndim == 2 and not target.is_floating_point() else target
        if not self.joint:
            return super().forward(input, labels)
        if target.ndim == 1 and not self.training:
            logits = self.trainable_module(input)[0]
            return {'loss': self.criterion(logits, labels), 'output': logits}
        if target.ndim != 2 or target.shape[1] != 2 or target.is_floating_point():
            raise ValueError(
                f'Joint training needs integer targets (B, 2) = [class, instance id], got {target.dtype} of shape '
                f'{tuple(target.shape)}. timm_multigrain.data.create_loader gives them.')
        if self.training and not self._positives_seen:
            _check_copies(input, target[:, 1])
        logits, embedding, _ = self.trainable_module(input)
        classification_loss = self.criterion(logits, labels)
        instance_loss, statistics = self._instance_loss(embedding, target[:, 1])
        embedding_loss = instance_loss
        if self.start_weight:
            start_loss = self._start_loss(input, embedding, target[:, 1])
            embedding_loss = instance_loss + self.start_weight * start_loss
            statistics['start_loss'] = start_loss.detach()
        loss = self.classif_weight * classification_loss + (1 - self.classif_weight) * embedding_loss
        result = {
            'loss': loss,
            'output': logits,
            'classification_loss': classification_loss.detach(),
            'instance_loss': instance_loss.detach(),
        }
        beta = getattr(self._trainable().instance_loss, 'beta', None)
        if beta is not None:
            result['beta'] = beta.detach()
        return result | statistics

    def _start_loss(self, input: torch.Tensor, embedding: torch.Tensor, instance: torch.Tensor) -> torch.Tensor:
        start, = self._start
        with torch.no_grad():
            before = l2_normalize(start.forward_head(start.forward_features(input), pre_logits=True).float())
            before = (instance[:, None] == instance).float() @ before  # one direction for all copies, as the loss wants
        return 1 - F.cosine_similarity(embedding.float(), before).mean()

    def _instance_loss(self, embedding: torch.Tensor, instance: torch.Tensor) -> tuple[torch.Tensor, dict]:
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = l2_normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))
            if self.gather:
                embedding, instance = all_gather_with_grad(embedding), all_gather_with_grad(instance)
            if not self._positives_seen:  # reading ids back stops a GPU: done on the first batch only
                self._check_instances(instance)
            loss = self._trainable().instance_loss
            triplets, prob = None, None
            if loss.needs_triplets and self.statistics and isinstance(self.sampler, TripletSampler):
                triplets, prob = self.sampler(embedding.detach(), instance, return_prob=True)
            elif loss.needs_triplets:
                triplets = self.sampler(embedding.detach(), instance)
            value = loss(embedding, instance, triplets)
            if not self.statistics:
                return value, {}
            embedding = embedding.detach()
            statistics = {'spread': 1 - embedding.mean(0).square().sum()}
            if isinstance(loss, MarginLoss):
                statistics |= margin_statistics(embedding, triplets, loss.beta, loss.margin)
                if loss.follows:  # it is near by construction
                    del statistics['balanced_beta']
            if prob is not None:
                number = effective_negatives(prob)
                statistics['effective_negatives'] = number.sum() / (number > 0).sum().clamp(min=1)
            return value, statistics

    def _check_instances(self, instance: torch.Tensor) -> None:
        instances = len(instance.unique())
        if instances < 2:
            raise ValueError(
                f'The loss needs negatives, but all {len(instance)} images of the batch are of one instance: use a '
                f'batch size of at least {2 * self.num_repeats} and a data set of more than one image.')
        if instances == len(instance):
            raise ValueError(
                f'The loss needs positives, but the {len(instance)} images of the batch are of as many instances: '
                f'load them with timm_multigrain.data.create_loader(num_repeats={self.num_repeats}).')
        self._positives_seen = True


def all_gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """Rows (B, ...) of every rank, in rank order, (world size * B, ...); without a process group, x as it is.

    Every rank then computes the same loss of the whole batch, and the backward sums the ranks' gradients: averaged over
    ranks, as DDP does, that is the gradient of one process on the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return _AllGather.apply(x)


class _AllGather(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        chunks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(chunks, x.contiguous())
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.split(ctx.rows)[dist.get_rank()]


def _check_copies(images: torch.Tensor, instance: torch.Tensor) -> None:
    first = {}
    pairs = [(first.setdefault(number, i), i) for i, number in enumerate(instance.tolist())]
    pairs = [(i, j) for i, j in pairs if i != j]
    if pairs and all(torch.equal(images[i], images[j]) for i, j in pairs):
        raise ValueError(
            'All copies of an image in the first batch are the same, pixel for pixel, so the instance loss has nothing '
            'to learn from them: the transform does nothing random (no augmentation?), or the data set does not apply '
            'its attribute `transform`.')
