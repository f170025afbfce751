"""timm's loader with repeated augmentation (Berman et al., "MultiGrain", arXiv 1902.05509, section 3.3).

Everything but the decoding, the sampler and the instance ids stays timm's: transforms, collation, prefetching,
scheduled sizes and multi-epoch loading. The seams are two names in `timm.data.loader`, rebound during the call:
`RepeatAugSampler`, and `ScheduledTransformDataset` so that scheduled sizes decode an image once, too.
"""
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import timm
import timm.data.loader as timm_loader
import torch
from PIL import Image
from timm.data import FastCollateMixup
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch.utils.data import DataLoader, Dataset, Sampler

from .instances import DecodedDataset, InstanceDataset
from .labels import label_instances
from .samplers import InstanceSampler, RepeatedAugSampler

_SEAM = (f'timm {timm.__version__} does not take its sampler from timm.data.loader.RepeatAugSampler: install '
         'timm 1.0.31, or build a DataLoader from InstanceDataset and one of the samplers')


def create_loader(
        dataset: Dataset,
        input_size: int | tuple[int, ...],
        batch_size: int,
        is_training: bool = True,
        *,
        num_repeats: int = 3,
        instances: str | os.PathLike | Sequence[int] = 'copy',
        epoch_len_factor: float = 1.0,
        shuffle: bool = True,
        seed: int = 0,
        fast: bool = False,
        decode: str = 'multigrain',
        strict: bool = False,
        **kwargs: Any,
) -> DataLoader | timm_loader.PrefetchLoader:
    """timm.data.create_loader with repeated augmentation, and with images decoded as all commands decode them.

    Yields (images, targets): images as timm's loader gives them, targets int64 [B, 2] = [class, instance id], the
    instance id being the index of the image in the dataset, or what `instances` says. The dataset is left as it was.

    Args:
        dataset: Map-style dataset of (image, class) pairs, see `DecodedDataset`.
        input_size: As in timm.
        batch_size: Samples (not images) in a batch of this rank.
        is_training: False is timm's loader for evaluation, with its own targets [B], of images decoded in the same way;
            no other argument than `instances` (for the classes that it names), `decode`, `strict` and timm's is
            looked at.
        num_repeats: Samples of an instance, in a row, m in the paper; 1 for none.
        instances: 'copy': the m samples are augmentations of one image, see `RepeatedAugSampler`. 'folder', 'class',
            a CSV file, or one integer for each image: they are m photographs of an instance, see `InstanceSampler` and
            `timm_multigrain.data.labels.label_instances`; `batch_size` has to be a multiple of m.
        epoch_len_factor: Samples per epoch, over all ranks, over the size of the dataset; with instances, passes over
            the dataset.
        shuffle: Shuffle the images.
        seed: Seed of the order, the same on all ranks.
        fast: Decode and augment tensors, see `TensorTransform`: pixels may differ by a grey level or a few.
        decode, strict: As of `InstanceDataset`.
        **kwargs: All other arguments of timm.data.create_loader. With `distributed=False` the loader goes through
            the whole dataset even where torch.distributed is initialised. A collate_fn has to stack the targets,
            tensors [class, instance id].

    Raises:
        ValueError: Bad argument, one that does not go with repeated augmentation, or an epoch without a full batch.
        RuntimeError: The installed timm does not create its sampler as expected.
    """
    if isinstance(dataset, DecodedDataset):
        dataset = dataset.dataset
    names_classes = isinstance(instances, (str, os.PathLike)) and instances not in ('copy', 'class')
    ids = None
    if is_training or names_classes:
        dataset, ids = label_instances(dataset, instances, is_training=is_training)
    if not is_training:
        return timm_loader.create_loader(
            DecodedDataset(dataset, decode, strict), input_size, batch_size, is_training=False, **kwargs)
    _check(batch_size, num_repeats, kwargs)
    world = {} if kwargs.pop('distributed', True) else {'num_replicas': 1, 'rank': 0}
    kwargs['num_aug_repeats'] = num_repeats
    sampling = dict(num_repeats=num_repeats, epoch_len_factor=epoch_len_factor, shuffle=shuffle, seed=seed, **world)
    if ids is None:
        make_sampler = partial(RepeatedAugSampler, dataset, **sampling)
    else:
        if any(size % num_repeats for size in kwargs.get('batch_size_choices') or ()):
            raise ValueError(f'batch_size_choices are {kwargs["batch_size_choices"]}: give multiples of {num_repeats}, '
                             'so that a batch holds all samples of its instances')
        make_sampler = partial(InstanceSampler, ids, batch_size, **sampling)
    with _timm_rebound(make_sampler) as samplers:
        # timm's `distributed` does nothing but choose the sampler
        loader = timm_loader.create_loader(
            InstanceDataset(dataset, decode, strict, fast, ids), input_size, batch_size, is_training=True,
            distributed=True, **kwargs)
    if not samplers:
        raise RuntimeError(_SEAM)
    if len(loader) == 0:
        raise ValueError(
            f'an epoch of {len(samplers[0])} samples on this rank has no full batch of {batch_size}: give more images, '
            'a smaller batch_size or a larger epoch_len_factor')
    base = loader.loader if isinstance(loader, timm_loader.PrefetchLoader) else loader
    base.collate_fn = partial(_collate, base.collate_fn)
    return loader


def _collate(collate_fn: Callable, batch: Sequence[tuple[Any, torch.Tensor]]) -> tuple[Any, torch.Tensor]:
    if isinstance(batch[0][0], Image.Image):
        raise ValueError(
            'the dataset gives untransformed images, so it ignores its attribute `transform`: give one that applies '
            'it, or one without such an attribute')
    images, targets = collate_fn(batch)
    if targets.shape != (len(batch), 2) or targets.is_floating_point():
        raise ValueError(
            f'collate_fn gives {targets.dtype} targets of shape {tuple(targets.shape)} for {len(batch)} images: give '
            'one that stacks their targets, tensors [class, instance id], and mixes no images')
    return images, targets


class ScheduledInstances(ScheduledTransformDataset):
    """timm's scheduled sizes of an `InstanceDataset` with one decoding for the repeats of an image."""

    def __init__(self, dataset: InstanceDataset, transforms: Sequence[Callable]):
        self.sizes = [dataset.with_transform(transform) for transform in transforms]
        super().__init__(dataset, [size.transform for size in self.sizes])

    def __getitem__(self, scheduled: tuple[int, int]) -> tuple[Any, Any]:
        return self.__getitems__([scheduled])[0]

    def __getitems__(self, scheduled: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
        samples = []
        for choice, group in groupby(scheduled, itemgetter(1)):
            samples += self.sizes[choice].__getitems__([index for index, _ in group])
        return samples


def _check(batch_size: int, num_repeats: int, kwargs: dict[str, Any]) -> None:
    if not 1 <= num_repeats <= batch_size:
        raise ValueError(f'num_repeats is {num_repeats}, and batch_size {batch_size}: give at least 1, which repeats '
                         'nothing, and a batch that holds the repeats of one image')
    for name in ('num_aug_repeats', 'num_aug_splits'):
        if kwargs.get(name):
            raise ValueError(f'{name} is {kwargs[name]}: leave it out and give num_repeats')
    if isinstance(kwargs.get('collate_fn'), FastCollateMixup):
        raise ValueError('collate_fn is a FastCollateMixup: mixed images have no instance, leave mixup and cutmix out')


@contextmanager
def _timm_rebound(make_sampler: Callable[[], Sampler]) -> Iterator[list[Sampler]]:
    """While open, timm's create_loader uses our sampler and scheduled dataset; gives the list of samplers made."""
    original, samplers = getattr(timm_loader, 'RepeatAugSampler', None), []
    if original is None:
        raise RuntimeError(_SEAM)

    def make(dataset: Dataset, num_repeats: int) -> Sampler:
        samplers.append(make_sampler())
        return samplers[-1]

    timm_loader.RepeatAugSampler = make
    timm_loader.ScheduledTransformDataset = ScheduledInstances
    try:
        yield samplers
    finally:
        timm_loader.RepeatAugSampler = original
        timm_loader.ScheduledTransformDataset = ScheduledTransformDataset
