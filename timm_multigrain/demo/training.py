"""The demo's training: one model from scratch, with timm's loader, optimizer and schedule and MultiGrain's task."""
import math
import random
from dataclasses import dataclass, field

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

from timm_multigrain.data import create_loader
from timm_multigrain.loss import DistanceWeightedSampler, TripletSampler, create_sampler
from timm_multigrain.models import MultiGrain
from timm_multigrain.task import MultiGrainTask

from .folder import PictureFolder

__all__ = ['TrainSettings', 'TrainedModel', 'train_model']


@dataclass(frozen=True)
class TrainSettings:
    """What a training depends on.

    Attributes:
        model: Registered name.
        img_size: Side of the training crop, pixels.
        epochs: Passes of as many samples as there are pictures.
        batch_size: Samples a step, copies counted.
        num_repeats: Copies of a picture in a batch.
        classif_weight: lambda.
        sampling: 'row', 'batch' or 'uniform' negatives.
        lr: Peak learning rate of AdamW, cosine schedule after one epoch of warm-up.
        beta_lr: Learning rate of the margin loss's boundary, as a factor of ``lr``.
        weight_decay: For everything but norms, biases and beta.
        seed: Seeds weights, order and augmentation.
        workers: Processes that read pictures.
    """
    model: str = 'multigrain_resnet18'
    img_size: int = 64
    epochs: int = 16
    batch_size: int = 48
    num_repeats: int = 3
    classif_weight: float = 0.5
    sampling: str = 'row'
    lr: float = 1e-3
    beta_lr: float = 5.0
    weight_decay: float = 0.05
    seed: int = 0
    workers: int = 2

    def __post_init__(self):
        for name, least in (('img_size', 32), ('epochs', 1), ('batch_size', 1), ('workers', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'{name} is {getattr(self, name)}: give at least {least}.')
        if not 0 < self.lr < float('inf'):
            raise ValueError(f'lr is {self.lr}: give a finite number above 0, such as 0.001.')


@dataclass
class TrainedModel:
    """A model and how it got there.

    Attributes:
        name: Shown in tables.
        model: In eval mode.
        history: Value of each quantity at each step.
        uniform_share: Share of anchors whose negatives fell back to uniform; None without a sampler that can.
    """
    name: str
    model: MultiGrain
    history: dict[str, list[float]] = field(repr=False)
    uniform_share: float | None = None


def train_model(name: str, folder: PictureFolder, settings: TrainSettings, threads: int | None = None) -> TrainedModel:
    """Train from scratch; the same settings give the same start, order and augmentation whatever the loss."""
    _seed(settings.seed)
    if threads:
        torch.set_num_threads(threads)
    model = timm.create_model(settings.model, num_classes=len(folder.class_names))
    if not isinstance(model, MultiGrain):
        raise ValueError(f"{settings.model!r} is not a MultiGrain model: timm.list_models('multigrain*') lists them.")
    # negatives from a generator of their own: the global one gives every objective the same augmentations
    task = MultiGrainTask(
        model, classif_weight=settings.classif_weight, num_repeats=settings.num_repeats,
        sampling=_sampler(settings), verbose=False).train()
    model.to(memory_format=torch.channels_last)
    loader = _train_loader(folder, settings)
    optimizer = _optimizer(task, settings)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=1, warmup_lr=settings.lr / 10,
        step_on_epochs=False, updates_per_epoch=len(loader))
    trained = TrainedModel(name, model, {})
    step = 0
    with tqdm(total=settings.epochs * len(loader), desc=name, unit='step', disable=None) as bar:
        for epoch in range(settings.epochs):
            loader.sampler.set_epoch(epoch)
            for images, target in loader:
                result = task(images.contiguous(memory_format=torch.channels_last), target)
                if not torch.isfinite(result['loss']):
                    raise RuntimeError(f'The loss of {name} became {result["loss"].item()} at step {step}: lower lr.')
                optimizer.zero_grad()
                result['loss'].backward()
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                bar.update()
                _record(trained.history, result, target, optimizer.param_groups[0]['lr'])
                bar.set_postfix(loss=f'{np.mean(trained.history["cross-entropy"][-20:]):.3f}', refresh=False)
    model.eval()
    trained.uniform_share = getattr(task.sampler, 'uniform_share', None) if task.joint else None
    return trained


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _train_loader(folder: PictureFolder, settings: TrainSettings):
    # crops of 8 % of the picture, as the paper's recipe has them, take longer to learn from than a demo lasts
    return create_loader(
        folder.train, settings.img_size, settings.batch_size, num_repeats=settings.num_repeats, seed=settings.seed,
        scale=(0.3, 1.0), color_jitter=0.3, interpolation='bilinear', use_prefetcher=False,
        num_workers=settings.workers, persistent_workers=settings.workers > 0)


def _optimizer(task: MultiGrainTask, settings: TrainSettings) -> torch.optim.Optimizer:
    # fused: one pass over the weights instead of ten, which are a good part of a step on small pictures
    optimizer = create_optimizer_v2(
        task.get_eval_model(), opt='adamw', lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    if task.joint:
        beta = list(task.get_trainable_module().instance_loss.parameters())
        optimizer.add_param_group(
            {'params': beta, 'lr': settings.lr, 'lr_scale': settings.beta_lr, 'weight_decay': 0.})
    return optimizer


def _record(history: dict[str, list[float]], result: dict, target: torch.Tensor, lr: float) -> None:
    values = {'cross-entropy': result.get('classification_loss', result['loss'])}
    if 'instance_loss' in result:
        values |= {'margin loss': result['instance_loss'], 'beta': result['beta']}
    values['train top-1'] = 100 * (result['output'].argmax(1) == target[:, 0]).float().mean()
    for key, value in values.items():
        history.setdefault(key, []).append(value.item())
    history.setdefault('learning rate', []).append(lr)


def _sampler(settings: TrainSettings) -> TripletSampler:
    options = {'max_positives': max(settings.num_repeats - 1, 1), 'generator': settings.seed}
    if settings.sampling == 'uniform':
        return create_sampler('uniform', **options)
    return _CountingSampler(settings.sampling, **options)


class _CountingSampler(DistanceWeightedSampler):
    """Also counts the anchors whose negatives were drawn uniformly, as none had any weight."""
    uniform = anchors = 0

    def _candidates(self, embedding: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = super()._candidates(embedding, target)
        self.uniform += int(found[2].sum())
        self.anchors += int((found[1].amax(1) > -math.inf).sum())
        return found

    @property
    def uniform_share(self) -> float | None:
        return self.uniform / self.anchors if self.anchors else None
