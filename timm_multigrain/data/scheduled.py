"""timm's scheduled sizes with one decoding for the repeats of an image."""
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from timm.data.scheduled_sampler import ScheduledTransformDataset

from .content import applies_transform, innermost
from .instance_dataset import InstanceDataset


class ScheduledInstances(ScheduledTransformDataset):
    """Applies the transform of a batch's size, through `InstanceDataset` where the dataset lets it.

    Args:
        dataset: An `InstanceDataset`.
        transforms: One for each size.
    """

    def __getitems__(self, scheduled: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
        samples = []
        for choice, group in groupby(scheduled, itemgetter(1)):
            samples += self._read([index for index, _ in group], choice)
        return samples

    def _read(self, indices: list[int], choice: int) -> list[tuple[Any, Any]]:
        base = innermost(self.dataset.dataset) if isinstance(self.dataset, InstanceDataset) else None
        # after a transform of the dataset's own, or beside one of the target, ours would not come last
        if not applies_transform(base) or base.transform is not None or base.target_transform is not None:
            return [self[index, choice] for index in indices]
        base.transform = self.transforms[choice]
        try:
            return self.dataset.__getitems__(indices)
        finally:
            base.transform = None
