"""Descriptors of many images: decoded by workers, embedded in batches of one shape, kept in memory or on disk."""
import contextlib
import math
import multiprocessing
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_multigrain.images.sources import ImageSource, UnreadableImage
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.trunk import InputSizes

from .embedder import Decoded, Embedded, Embedder
from .protocol import Protocol

__all__ = ['Batches', 'Embedded', 'decode', 'embed_images', 'in_order', 'none_readable', 'progress_bar']

_CHUNK = 4  # images a worker hands over at once
_PENDING = 8  # batches of images that may wait for others of their shape


def embed_images(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        batch_size: int = 32,
        workers: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        descriptor: bool = True,
        logits: bool = False,
        errors: str = 'skip',
        on_error: Callable[[int, str], None] | None = None,
        indices: Sequence[int] | None = None,
        dim: int | None = None,
        fast: bool = False,
        progress: bool = True,
) -> Iterator[Embedded]:
    """Embed images, a batch of equal shape at a time, in no particular order; every readable one exactly once.

    On the CPU the result is the same bit for bit whatever the batch size, and that of ``model.embed`` of each image.

    Args:
        model: Model, moved to the device; in eval mode while this runs.
        source: Images.
        protocol: Size, crop, scales, flip.
        batch_size: Most images of a batch.
        workers: Processes that read images, 0 for none. None: one a core, at most 8, less the one that embeds.
        device: Where the model runs; where it is by default.
        dtype: torch.bfloat16 or torch.float16 to run under autocast.
        descriptor: Give L2-normalised retrieval descriptors, else the pooled embedding as it is.
        logits: Give the logits, too, averaged over the views.
        errors: 'skip' unreadable images or 'raise' the first one.
        on_error: Told the number of a skipped image, and why.
        indices: Numbers of the images to embed; all by default.
        dim: Keep the first components of a whitened descriptor and normalise again.
        fast: Fold batch norms and lay images out channels last: faster, equal up to rounding only.
        progress: Show a bar if stderr is a terminal.

    Raises:
        UnreadableImage: With errors='raise'.
        ValueError: Impossible arguments, or an embedding that is not finite.
    """
    if errors not in ('skip', 'raise'):
        raise ValueError(f"errors={errors!r}: give 'skip' or 'raise'.")
    embedder = Embedder(
        model, protocol, device=device, dtype=dtype, descriptor=descriptor, logits=logits, dim=dim, fast=fast)
    indices = range(len(source)) if indices is None else indices
    stream = decode(source, protocol, indices, workers, model.input_sizes)
    return _embed(embedder, stream, len(indices), Batches(batch_size, errors, on_error), progress)


def _embed(embedder: Embedder, stream, total: int, batches: 'Batches', progress: bool) -> Iterator[Embedded]:
    with progress_bar(total, progress) as bar, embedder.evaluating(), contextlib.closing(stream):
        for out in embedder.run(batches(stream, bar), batches.skip):
            bar.update(len(out.indices))
            yield out


def in_order(parts: list[Embedded]) -> tuple[list[int], torch.Tensor]:
    """Numbers of the images in ascending order, and their vectors."""
    indices = np.concatenate([part.indices for part in parts])
    order = np.argsort(indices)
    return indices[order].tolist(), torch.cat([part.vectors for part in parts])[torch.from_numpy(order)]


def none_readable(number: int, reasons: Iterable[str]) -> str:
    return f'None of {number} images could be read: {next(iter(reasons), "the list is empty")}.'


def progress_bar(total: int, progress: bool = True, title: str = 'Embedding') -> tqdm:
    return tqdm(total=total, desc=title, unit='image', disable=None if progress else True)


class _Images(Dataset):

    def __init__(self, source: ImageSource, protocol: Protocol, indices: Sequence[int], sizes: InputSizes | None):
        self.source, self.protocol, self.indices, self.sizes = source, protocol, indices, sizes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Decoded:
        index = int(self.indices[i])
        try:
            image, whole = self.source.load_part(index, exif=self.protocol.exif)
            # numpy travels by value: tensors would each hold a file descriptor while they wait
            pixels = self.protocol.pixels(image, whole, self.sizes)
            return Decoded(index, self.source.names[index], pixels.numpy(), image.size)
        except UnreadableImage as e:
            return Decoded(index, self.source.names[index], message=str(e))


def decode(
        source: ImageSource,
        protocol: Protocol,
        indices: Sequence[int],
        workers: int | None = None,
        sizes: InputSizes | None = None,
) -> Iterator[Decoded]:
    """Images read and resized by worker processes, in the order of the indices; with `sizes` to one of those."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        workers = min(8, max(0, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) - 1))
    if workers < 0:
        raise ValueError(f'workers={workers} is negative: give 0 to read images in this process.')
    workers = min(workers, math.ceil(len(indices) / _CHUNK))
    return _decoded(DataLoader(
        _Images(source, protocol, indices, sizes), batch_size=_CHUNK, num_workers=workers, collate_fn=list,
        worker_init_fn=_end_with_parent))


def _end_with_parent(_: int) -> None:
    """A worker of a process that was killed would wait for ever, for images it has read to be taken."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    parent = multiprocessing.parent_process().pid
    threading.Thread(target=watch, daemon=True).start()


def _decoded(loader: Iterable[list[Decoded]]) -> Iterator[Decoded]:
    for chunk in loader:
        yield from chunk


class Batches:
    """Sorts decoded images into batches of one shape; how many may wait for others of their shape is bounded.

    Args:
        batch_size: Most images of a batch.
        errors: 'raise' at an image that could not be read, or 'skip' it.
        on_error: Told the number of a skipped image, and why.
    """

    def __init__(self, batch_size: int, errors: str = 'skip', on_error: Callable[[int, str], None] | None = None):
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size}: give at least 1.')
        self.batch_size, self.errors, self.on_error = batch_size, errors, on_error

    def __call__(self, stream: Iterable[Decoded], bar: tqdm) -> Iterator[list[Decoded]]:
        """Batches of a stream; the bar moves for images that are skipped."""
        buckets, pending = defaultdict(list), 0
        for item in stream:
            if item.pixels is None:
                self.skip(item)
                bar.update(1)
                continue
            shape = item.pixels.shape
            buckets[shape].append(item)
            pending += 1
            if len(buckets[shape]) < self.batch_size:
                if pending < _PENDING * self.batch_size:
                    continue
                shape = max(buckets, key=lambda shape: len(buckets[shape]))
            batch = buckets.pop(shape)
            pending -= len(batch)
            yield batch
        yield from buckets.values()

    def skip(self, item: Decoded) -> None:
        """Raise, or pass on, why there is no descriptor of an image."""
        if self.errors == 'raise':
            raise UnreadableImage(item.message)
        if self.on_error is not None:
            self.on_error(item.index, item.message)
