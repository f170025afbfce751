"""Repeated augmentation (RA): the sampler that puts m augmentations of one image into the same batch.

Berman et al., "MultiGrain: a unified image embedding for classes and instances", arXiv 1902.05509, section 3.3, after
Hoffer et al., arXiv 1901.09335. A batch of B samples holds about B / m different images; the copies of one image are
the positive pairs of the margin loss.

timm's `RepeatAugSampler` deals the repeats of an image out to different ranks; here the ranks share out the images, so
that every anchor finds its positives on its own rank, and a single process works too.
"""
import math
from collections.abc import Iterator, Sized
from itertools import islice, repeat

import torch
import torch.distributed as dist
from torch.utils.data import Sampler


class RepeatedAugSampler(Sampler[int]):
    """Yields each index `num_repeats` times in a row.

    An epoch counts samples, not images: `int(len(dataset) * epoch_len_factor)` in all, shared by the ranks (rounded up
    so that all yield the same number, at least one). When a pass over the data ends a new one begins, and the stream is
    truncated at the end of the epoch. An epoch's permutation is split over the ranks once and each rank streams its own
    part, so an image is seen by one rank only (unless there are more ranks than images).

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
        self.dataset_len = dataset if isinstance(dataset, int) else len(dataset)
        if self.dataset_len < 1:
            raise ValueError(f'the dataset holds {self.dataset_len} images: give one with at least one image')
        if num_repeats < 1 or num_repeats != int(num_repeats):
            raise ValueError(f'num_repeats is {num_repeats}: give an integer of at least 1 (no repetition), such as 3')
        self.num_repeats = int(num_repeats)
        if not (epoch_len_factor > 0 and math.isfinite(epoch_len_factor)):
            raise ValueError(f'epoch_len_factor is {epoch_len_factor}: give a finite number above 0, such as 1.0')
        self.num_replicas, self.rank = _world(num_replicas, rank)
        total = int(self.dataset_len * epoch_len_factor)
        self.num_samples = max(1, math.ceil(total / self.num_replicas))
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        return islice(self._stream(generator), self.num_samples)

    def _stream(self, generator: torch.Generator) -> Iterator[int]:
        order = torch.arange(self.dataset_len)
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        # with more ranks than images several ranks have to show the same image
        own = order[self.rank % len(order)::self.num_replicas]
        while True:
            for index in own.tolist():
                yield from repeat(index, self.num_repeats)
            if self.shuffle:
                own = own[torch.randperm(len(own), generator=generator)]


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
