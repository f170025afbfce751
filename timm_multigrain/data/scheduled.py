"""timm's scheduled sizes with one decoding for the repeats of an image."""
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from timm.data.scheduled_sampler import ScheduledTransformDataset

from .instance_dataset import InstanceDataset


class ScheduledInstances(ScheduledTransformDataset):
    """Reads an image with the transform of its batch's size.

    Args:
        dataset: An `InstanceDataset`.
        transforms: One for each size.
    """

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
