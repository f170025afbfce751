"""Dataset wrapper for joint class and instance training: image ids beside the classes, one decoding for m repeats.

Berman et al., "MultiGrain", arXiv 1902.05509, section 3: the instance label of a sample is the image it was augmented
from, so that the positives of the margin loss come without any annotation.
"""
import operator
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from .decoded import DecodedDataset

__all__ = ['InstanceDataset']


class InstanceDataset(DecodedDataset):
    """A map-style (image, class) dataset whose targets become [class, instance id].

    `dataset[i]` gives (image, int64 tensor [class, i]); default_collate and timm's fast_collate stack the targets to
    [B, 2]. A DataLoader fetches through `__getitems__`, which decodes an image once for consecutive equal indices (see
    `RepeatedAugSampler`) and applies the transforms once for each of them. Of timm's ImageDataset and torchvision's
    ImageFolder, whose transforms are all that draws random numbers, that is bit for bit what as many separate reads
    give, and they are decoded as all commands do; other datasets are read as often as an index is asked for.

    Where an image cannot be read, all its copies are copies of the next image, under the id of that one.

    Args and errors: see `DecodedDataset`. Also a ValueError while reading, where a target is not a class number.
    """

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, torch.Tensor]]:
        samples = []
        for index, group in groupby(indices):
            index, pairs = self.read(index, sum(1 for _ in group))
            samples += [(image, _target(target, index)) for image, target in pairs]
        return samples


def _target(target: Any, index: int) -> torch.Tensor:
    try:
        if getattr(target, 'ndim', 0):
            raise TypeError
        return torch.tensor([operator.index(target), index])
    except TypeError:
        raise ValueError(
            f'the target of image {index} is {target!r}: give one integer class for each image (multi-label, soft and '
            'float targets do not go with repeated augmentation)') from None
