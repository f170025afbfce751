"""The demo's training: one model from scratch, with timm's loader, optimizer and schedule and MultiGrain's task."""
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.data import ImageDataset
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

from timm_multigrain.data import create_loader
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import printable
from timm_multigrain.images.labels import find_classes
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.images.walk import EXTENSIONS
from timm_multigrain.loss import TripletSampler, create_sampler
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.open import open_model
from timm_multigrain.task import MultiGrainTask


@dataclass(frozen=True)
class TrainSettings:
    """What trainings depend on, as the flags of the command say it; copies of a picture count as samples."""
    model: str = 'multigrain_test_resnet'
    img_size: int = 64
    epochs: int = 12
    batch_size: int = 48
    num_repeats: int = 2
    classif_weight: float = 0.5
    sampling: str = 'row'
    lr: float = 3e-3
    seed: int = 0  # of the first of several trainings
    seeds: int = 3
    workers: int = 2

    def __post_init__(self):
        for name, least in (('img_size', 32), ('epochs', 1), ('batch_size', 1), ('seeds', 1), ('workers', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'{name} is {getattr(self, name)}: give at least {least}.')
        if not 0 < self.lr < math.inf:
            raise ValueError(f'lr is {self.lr}: give a finite number above 0, such as 0.001.')


class Pictures(NamedTuple):
    """Training pictures (timm's dataset, without a transform), and held-out ones of the same classes."""
    train: ImageDataset
    val: ImageFiles
    class_names: list[str]


def open_pictures(root: str | os.PathLike) -> Pictures:
    """Open an image folder with train/<class>/ and val/<class>/, and read the held-out pictures once."""
    train, val = (find_classes(os.path.join(root, split)) for split in ('train', 'val'))
    classes = train.class_names
    if classes != val.class_names or len(classes) < 2:
        found = ' and '.join(', '.join(map(printable, names)) for names in (classes, val.class_names))
        raise ValueError(f'train/ and val/ of {printable(root)} must hold the same classes, at least 2: {found}.')
    for i in tqdm(range(len(val)), desc='Checking pictures', unit='picture', leave=False, disable=None):
        val.load(i)
    numbers, suffixes = {name: i for i, name in enumerate(classes)}, ';'.join(EXTENSIONS)  # of itself timm reads three
    return Pictures(ImageDataset(os.path.join(root, 'train'), class_map=numbers, input_key=suffixes), val, classes)


def protocol_of(model: MultiGrain, settings: TrainSettings) -> Protocol:
    """How held-out pictures are resized and normalised; the normalisation is that of the training."""
    return Protocol.for_model(model, 'crop', size=settings.img_size, crop_pct=0.875, interpolation='bilinear')


def train_model(
        name: str, pictures: Pictures, settings: TrainSettings, sampler: TripletSampler | None = None,
) -> tuple[MultiGrain, dict[str, list[float]]]:
    """Train from scratch; the same settings give the same start, order and augmentation whatever the loss.

    Args:
        sampler: Draws the negatives, in place of the sampler that `settings.sampling` names.

    Returns:
        The model in eval mode, and the value of each quantity at each step.
    """
    random_seed(settings.seed)
    model = open_model(settings.model, pretrained=False, num_classes=len(pictures.class_names))
    model.to(memory_format=torch.channels_last)
    # negatives from a generator of their own: the global one gives every objective the same augmentations
    sampler = sampler or create_sampler(
        settings.sampling, max_positives=max(settings.num_repeats - 1, 1), generator=settings.seed)
    task = MultiGrainTask(
        model, classif_weight=settings.classif_weight, num_repeats=settings.num_repeats, sampling=sampler,
        verbose=False).train()
    protocol = protocol_of(model, settings)
    # crops of 8 % of the picture, as the paper's recipe has them, take longer to learn from than a demo lasts
    loader = create_loader(
        pictures.train, settings.img_size, settings.batch_size, num_repeats=settings.num_repeats, seed=settings.seed,
        mean=protocol.mean, std=protocol.std, scale=(0.3, 1.0), color_jitter=0.3, interpolation='bilinear',
        use_prefetcher=False, num_workers=settings.workers, persistent_workers=settings.workers > 0)
    # fused: one pass over the weights instead of ten, which are a good part of a step on small pictures
    optimizer = create_optimizer_v2(model, opt='adamw', lr=settings.lr, weight_decay=0.05, fused=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=1, warmup_lr=settings.lr / 10,
        step_on_epochs=False, updates_per_epoch=len(loader))
    history, step = defaultdict(list), 0
    with tqdm(total=settings.epochs * len(loader), desc=name, unit='step', disable=None) as bar:
        for epoch in range(settings.epochs):
            loader.sampler.set_epoch(epoch)
            for images, target in loader:
                result = task(images.contiguous(memory_format=torch.channels_last), target)
                if not result['loss'].isfinite():
                    raise RuntimeError(f'The loss of {name} became {result["loss"].item()} at step {step}: lower lr.')
                history['learning rate'].append(optimizer.param_groups[0]['lr'])
                history['cross-entropy'].append(result.get('classification_loss', result['loss']).item())
                history['train top-1'].append(100 * (result['output'].argmax(1) == target[:, 0]).float().mean().item())
                if task.joint:
                    history['margin loss'].append(result['instance_loss'].item())
                    history['beta'].append(result['beta'].item())
                optimizer.zero_grad()
                result['loss'].backward()
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                bar.update()
    return model.to(memory_format=torch.contiguous_format).eval(), history
