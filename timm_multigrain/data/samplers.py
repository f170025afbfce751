"""Samplers that put several samples of an instance into the same batch, the positive pairs of the instance loss.

Repeated augmentation (RA), where an instance is an image: Berman et al., "MultiGrain: a unified image embedding for
classes and instances", arXiv 1902.05509, section 3.3, after Hoffer et al., arXiv 1901.09335. A batch of B samples holds
about B / m different images. timm's `RepeatAugSampler` deals the repeats of an image out to different ranks; here the
ranks share out the images, so that every anchor finds its positives on its own rank, and a single process works too.

With instance labels a batch holds m photographs of each of B / m instances.
"""
import math
from collections.abc import Iterator, Sequence, Sized
from itertools import islice, repeat

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler


class _EpochSampler(Sampler[int]):
    """What both samplers share: the epoch that they count themselves, and the ranks."""

    def __init__(self, epoch_len_factor: float, shuffle: bool, seed: int, num_replicas: int | None, rank: int | None):
        if not (epoch_len_factor > 0 and math.isfinite(epoch_len_factor)):
            raise ValueError(f'epoch_len_factor is {epoch_len_factor}: give a finite number above 0, such as 1.0')
        self.num_replicas, self.rank = _world(num_replicas, rank)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.epoch = epoch

    def _next_generator(self) -> torch.Generator:
        self.epoch += 1
        return torch.Generator().manual_seed(self.seed + self.epoch - 1)

    def _order(self, number: int, generator: torch.Generator) -> np.ndarray:
        return torch.randperm(number, generator=generator).numpy() if self.shuffle else np.arange(number)


class RepeatedAugSampler(_EpochSampler):
    """Yields each index `num_repeats` times in a row.

    An epoch counts samples, not images: `int(len(dataset) * epoch_len_factor)` in all, shared by the ranks (rounded up
    so that all yield the same number, at least one). When a pass over the data ends a new one begins. Each rank streams
    its own part of an epoch's permutation, so an image is seen by one rank only (unless there are more ranks than
    images).

    Without calls of `set_epoch` each iteration is the next epoch; after `set_epoch(n)` the next iteration is epoch n.

    Args:
        dataset: Anything with a length, or the length itself.
        num_repeats: Augmentations per image, in a row, m in the paper.
        epoch_len_factor: Samples per epoch over the size of the dataset (2 in the original implementation's recipe).
        shuffle: Draw a fresh permutation for every pass from a generator seeded with `seed + epoch`.
        seed: The same on all ranks.
        num_replicas: Number of ranks, by default that of torch.distributed, 1 where it is not initialised.
        rank: Rank of this process, by default that of torch.distributed.

    Raises:
        ValueError: Empty dataset, or an argument out of range.

    Example:
        >>> sampler = RepeatedAugSampler(10, num_repeats=3, shuffle=False)
        >>> list(sampler)
        [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    """

    def __init__(
            self,
            dataset: Sized | int,
            num_repeats: int = 3,
            epoch_len_factor: float = 1.0,
            shuffle: bool = True,
            seed: int = 0,
            num_replicas: int | None = None,
            rank: int | None = None,
    ):
        super().__init__(epoch_len_factor, shuffle, seed, num_replicas, rank)
        self.dataset_len = dataset if isinstance(dataset, int) else len(dataset)
        if self.dataset_len < 1:
            raise ValueError(f'the dataset holds {self.dataset_len} images: give one with at least one image')
        if num_repeats < 1 or num_repeats != int(num_repeats):
            raise ValueError(f'num_repeats is {num_repeats}: give an integer of at least 1 (no repetition), such as 3')
        self.num_repeats = int(num_repeats)
        self.num_samples = max(1, math.ceil(int(self.dataset_len * epoch_len_factor) / self.num_replicas))

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return islice(self._stream(self._next_generator()), self.num_samples)

    def _stream(self, generator: torch.Generator) -> Iterator[int]:
        order = self._order(self.dataset_len, generator)
        # with more ranks than images several ranks have to show the same image
        own = order[self.rank % len(order)::self.num_replicas]
        while True:
            for index in own.tolist():
                yield from repeat(index, self.num_repeats)
            own = own[self._order(len(own), generator)]


class InstanceSampler(_EpochSampler):
    """Batches of B / m instances with m photographs of each.

    In an epoch every instance shows all its photographs once, in groups of m: an instance of n photographs has
    ceil(n / m) groups. The last group is filled up with photographs of the group before, and the only group of an
    instance with fewer than m photographs with further copies of them (the same index, side by side). The number of
    groups, times `epoch_len_factor`, is rounded up to whole batches on all ranks, with groups of a next pass.

    A group is never divided between batches or ranks, and a batch holds an instance twice only where there are more
    groups of it than batches. The order depends on `seed + epoch` alone; epochs count as those of `RepeatedAugSampler`.

    Args:
        instances: Number of the instance of each image, (N,) integers.
        batch_size: Samples in a batch of this rank, a multiple of `num_repeats`.
        num_repeats: Photographs of an instance in a batch, m.
        epoch_len_factor: Passes over the data in an epoch.
        shuffle: Shuffle photographs, groups and batches.
        seed, num_replicas, rank: As of `RepeatedAugSampler`.

    Example:
        >>> sampler = InstanceSampler([7, 7, 7, 8, 9, 9], batch_size=4, num_repeats=2, shuffle=False)
        >>> list(sampler)  # images 0, 1 and 2 show instance 7
        [0, 1, 3, 3, 1, 2, 4, 5]
    """

    def __init__(
            self,
            instances: Sequence[int],
            batch_size: int,
            num_repeats: int = 3,
            epoch_len_factor: float = 1.0,
            shuffle: bool = True,
            seed: int = 0,
            num_replicas: int | None = None,
            rank: int | None = None,
    ):
        if num_repeats < 1 or batch_size < 1 or batch_size % num_repeats:
            raise ValueError(f'batch_size is {batch_size}, and num_repeats {num_repeats}: give a multiple of '
                             'num_repeats, so that a batch holds all samples of its instances')
        super().__init__(epoch_len_factor, shuffle, seed, num_replicas, rank)
        self.instances = np.unique(np.asarray(instances, np.int64), return_inverse=True)[1]
        if not len(self.instances):
            raise ValueError('instances is empty: give one number for each image, of at least one image')
        self.num_repeats = num_repeats
        self.sizes = np.bincount(self.instances)
        self.num_groups = -(-self.sizes // num_repeats)  # of each instance
        self.groups_per_batch = batch_size // num_repeats * self.num_replicas
        self.num_batches = math.ceil(max(1, int(self.num_groups.sum() * epoch_len_factor)) / self.groups_per_batch)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = self._next_generator()
        groups = np.empty((0, self.num_repeats), np.int64)
        while len(groups) < self.num_batches * self.groups_per_batch:
            groups = np.concatenate([groups, self._pass(generator)])
        groups = groups[:self.num_batches * self.groups_per_batch]
        # the groups of an instance side by side, and one after the other to the next batch, as cards are dealt
        places = self._order(len(self.sizes), generator)[self.instances[groups[:, 0]]]
        dealt = groups[np.argsort(places, kind='stable')].reshape(self.groups_per_batch, self.num_batches, -1)
        own = dealt[self.rank::self.num_replicas].swapaxes(0, 1)
        return iter(own[self._order(self.num_batches, generator)].reshape(-1).tolist())

    def _pass(self, generator: torch.Generator) -> np.ndarray:
        """All photographs once, (groups, m), in random order."""
        order = self._order(len(self.instances), generator)
        order = order[np.argsort(self.instances[order], kind='stable')]  # those of an instance side by side
        owner = np.repeat(np.arange(len(self.sizes)), self.num_groups)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(self.num_groups) - self.num_groups, self.num_groups)
        m, size = self.num_repeats, self.sizes[owner]
        first = (np.cumsum(self.sizes) - self.sizes)[owner] + np.clip(number * m, 0, np.maximum(size - m, 0))
        groups = order[first[:, None] + np.arange(m) * np.minimum(size, m)[:, None] // m]
        return groups[self._order(len(groups), generator)]


def _world(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    distributed = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if distributed else 1
    if rank is None:
        if not distributed and num_replicas > 1:
            raise ValueError(f'num_replicas is {num_replicas} but torch.distributed is not initialised: give rank too')
        rank = dist.get_rank() if distributed else 0
    if not 0 <= rank < num_replicas:
        raise ValueError(f'rank is {rank}, and num_replicas {num_replicas}: ranks count from 0 to one less than that')
    return num_replicas, rank
