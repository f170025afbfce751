"""Images through a model under a test protocol: read by worker processes, embedded in batches of one shape."""
import math
import multiprocessing
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_multigrain.files import counted, printable
from timm_multigrain.images.pixels import UnreadableImage
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.layers import gem as power_mean
from timm_multigrain.layers import l2_normalize
from timm_multigrain.models.trunk import InputSizes, fold_batch_norm

from .protocol import Protocol

_NARROW = 32  # pixels, the stride of most trunks
_CHUNK = 4  # images a worker hands over at once
_PENDING = 8  # batches of images that may wait for others of their shape

OnError = Callable[[int, str], None] | None


class Decoded(NamedTuple):
    """An image before normalisation, (3, H, W) uint8, or why it could not be read."""
    index: int
    name: str
    pixels: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    message: str = ''


class Embedded(NamedTuple):
    """Some images, embedded.

    Attributes:
        indices: (n,) int64, numbers of the images in the source.
        vectors: (n, D) float32 on the CPU.
        logits: (n, K) float32 on the CPU, None unless asked for.
        sizes: (width, height) of each image as it was read.
    """
    indices: np.ndarray
    vectors: torch.Tensor
    logits: torch.Tensor | None
    sizes: list[tuple[int, int]]


def embed_images(
        model: torch.nn.Module,
        source: ImageSource,
        protocol: Protocol,
        *,
        on_error: OnError = None,
        progress: bool = True,
        **extraction,
) -> Iterator[Embedded]:
    """Embed images, a batch of equal shape at a time, in no particular order; every readable one exactly once.

    Args:
        model: Model, moved to the device; in eval mode while this runs.
        protocol: Size, crop, scales, flip.
        on_error: Called with the number of each image that cannot be read, and why; None raises the first.
        **extraction: batch_size, workers, device, dtype, descriptor, logits, dim and fast of `Embedder`.

    Raises:
        UnreadableImage: Without ``on_error``.
        ValueError: Impossible arguments, or an embedding that is not finite.
    """
    embedder = Embedder(model, protocol, **extraction)
    with embedder.evaluating(), closing(embedder.decode(source, range(len(source)), progress)) as stream:
        yield from embedder.embed(stream, on_error)


class Embedder:
    """A model under a protocol: an image has the same embedding, up to rounding, in whatever company it is embedded.

    Args:
        model: A MultiGrain, or a module with its ``forward_features`` and ``forward_head``; moved to the device.
        protocol: Preprocessing and views.
        batch_size: Most images of a batch.
        workers: Processes that read images, 0 for none. None: one a core, at most 8, less the one that embeds.
        device: Where the model runs; where it is by default.
        dtype: torch.bfloat16 or torch.float16 to run under autocast.
        descriptor: Give L2-normalised descriptors, else the pooled embedding as it is.
        logits: Give the logits, too, averaged over the views.
        dim: Keep the first components of a whitened descriptor and normalise again.
        fast: Fold batch norms into convolutions and lay images out channels last.
    """

    def __init__(
            self,
            model: torch.nn.Module,
            protocol: Protocol,
            *,
            batch_size: int = 32,
            workers: int | None = None,
            device: str | torch.device | None = None,
            dtype: torch.dtype | None = None,
            descriptor: bool = True,
            logits: bool = False,
            dim: int | None = None,
            fast: bool = False,
    ):
        if batch_size < 1 or (workers is not None and workers < 0):
            raise ValueError(f'batch_size={batch_size}, workers={workers}: give at least 1, and at least 0.')
        if dim is not None and not (descriptor and model.whitened and 1 <= dim <= model.embed_dim):
            raise ValueError(f'dim={dim} needs descriptors of a whitened embedding of at least so many components; '
                             f'this one has {model.embed_dim}, {"" if model.whitened else "not "}whitened.')
        if logits and not model.num_classes:
            raise ValueError('logits=True needs a model with a classifier: this one has num_classes=0.')
        if model.in_chans != 3:
            raise ValueError(f'The model takes {model.in_chans} channels: only one of RGB images can embed them.')
        self.model, self.protocol, self.batch_size, self.workers = model, protocol, batch_size, workers
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        if self.device.type == 'cuda' and not torch.cuda.is_available():
            raise ValueError(f'device {self.device} not found: torch finds no GPU, use cpu.')
        self.dtype = None if dtype == torch.float32 else dtype
        self.descriptor, self.logits, self.dim, self.fast = descriptor, logits, dim, fast
        self.width = dim or model.embed_dim

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model on its device and in eval mode, folded if that was asked for."""
        original, training = self.model, self.model.training
        self.model = original.to(self.device).eval()
        if self.fast:
            self.model = fold_batch_norm(original).to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            self.model = original.train(training)

    def decode(self, source: ImageSource, indices: Sequence[int], progress: bool = False,
               title: str = 'Embedding') -> Iterator[Decoded]:
        """Images read and resized by worker processes, in the order of the indices, with a bar."""
        workers = self.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            workers = min(8, max(0, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) - 1))
        loader = DataLoader(
            _Images(source, self.protocol, indices, self.model.input_sizes), batch_size=_CHUNK, collate_fn=list,
            num_workers=min(workers, math.ceil(len(indices) / _CHUNK)), worker_init_fn=_end_with_parent)
        with progress_bar(len(indices), progress, title) as bar:
            for chunk in loader:
                for item in chunk:
                    yield item
                    bar.update()

    def embed(self, stream: Iterable[Decoded], on_error: OnError = None) -> Iterator[Embedded]:
        """Results one batch late: a GPU works on the next batch while the last one's results are handed out.

        Args:
            stream: Decoded images.
            on_error: Called with the number of each image that could not be read, or is too narrow for the model, and
                why; None raises the first.
        """
        def skip(item: Decoded, message: str) -> None:
            if on_error is None:
                raise UnreadableImage(message)
            on_error(item.index, message)

        waiting = deque()
        for items in self._batches(stream, skip):
            try:
                waiting.append(self._launch(items))
            except RuntimeError as e:
                height, width = items[0].pixels.shape[1:]
                narrow = min(height, width) * min(self.protocol.scales) < _NARROW
                if not narrow or isinstance(e, torch.OutOfMemoryError):
                    raise
                for item in items:  # no pixels are left somewhere in the trunk
                    skip(item, f'{printable(item.name)}: its {width} x {height} pixels are too narrow for the model '
                               f'({e})')
            if len(waiting) > 1:
                yield self._collect(*waiting.popleft())
        for launched in waiting:
            yield self._collect(*launched)

    def _batches(self, stream: Iterable[Decoded], skip: Callable[[Decoded, str], None]) -> Iterator[list[Decoded]]:
        """Batches of one shape; how many images may wait for others of their shape is bounded."""
        buckets, pending = defaultdict(list), 0
        for item in stream:
            if item.pixels is None:
                skip(item, item.message)
                continue
            shape = item.pixels.shape
            buckets[shape].append(item)
            pending += 1
            if pending == _PENDING * self.batch_size:
                shape = max(buckets, key=lambda shape: len(buckets[shape]))
            elif len(buckets[shape]) < self.batch_size:
                continue
            pending -= len(buckets[shape])
            yield buckets.pop(shape)
        yield from buckets.values()

    @torch.inference_mode()
    def _launch(self, items: list[Decoded]) -> tuple:
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        on_gpu = self.device.type == 'cuda'
        if on_gpu:
            pixels = pixels.pin_memory()
        # image by image on a CPU: a batch is not faster there, and takes more memory
        chunks = pixels.split(1) if self.device.type == 'cpu' else [pixels.to(self.device, non_blocking=True)]
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            out = [self._forward(chunk) for chunk in chunks]
        vectors, logits = (torch.cat(o) if o[0] is not None else None for o in zip(*out, strict=True))
        event = None
        if on_gpu:
            vectors, logits = (v if v is None else v.to('cpu', non_blocking=True) for v in (vectors, logits))
            event = torch.cuda.Event()
            event.record()
        return items, vectors, logits, event

    def _collect(self, items: list[Decoded], vectors, logits, event) -> Embedded:
        if event is not None:
            event.synchronize()
        vectors, logits = (v if v is None else v.cpu().clone() for v in (vectors, logits))
        broken = [item for item, row in zip(items, vectors, strict=True) if not torch.isfinite(row).all()]
        if broken:
            raise ValueError(f'The embedding of {printable(broken[0].name)} and {len(broken) - 1} more is not finite: '
                             f'{"take bfloat16 or float32" if self.dtype else "the weights are damaged"}.')
        return Embedded(np.array([item.index for item in items]), vectors, logits, [item.size for item in items])

    def _forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.protocol.normalize(pixels)
        if self.fast:
            x = x.contiguous(memory_format=torch.channels_last)
        scales, logits = [], []
        for views in self.protocol.views(x, self.model.input_sizes):
            vectors = []
            for view in views:
                embedding = self.model.forward_head(self.model.forward_features(view), pre_logits=True)
                if self.logits:
                    logits.append(self.model.head.classify(embedding).float())
                embedding = embedding.float()
                vectors.append(l2_normalize(embedding[:, :self.dim]) if self.descriptor else embedding)
            scales.append(self._mean(vectors))
        return self._mean(scales, over_scales=True), torch.stack(logits).mean(0) if logits else None

    def _mean(self, vectors: list[torch.Tensor], over_scales: bool = False) -> torch.Tensor:
        """Mean over views, of descriptors normalised again; over scales GeM's mean where the model pools with it."""
        if len(vectors) == 1:
            return vectors[0]
        stacked, head = torch.stack(vectors), self.model.head
        if not (over_scales and self.descriptor and head.global_pool == 'gem' and not self.model.whitened):
            mean = stacked.mean(0)
        else:  # GeM's values are above 0
            mean = power_mean(stacked, head.pool.p, torch.finfo(stacked.dtype).tiny, dim=[0], fixed=head.pool.fixed)
        return l2_normalize(mean) if self.descriptor else mean


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


def _end_with_parent(_: int) -> None:
    """A worker of a process that was killed would wait for ever, for images it has read to be taken."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    parent = multiprocessing.parent_process().pid
    threading.Thread(target=watch, daemon=True).start()


def in_order(batches: Sequence[Embedded]) -> Embedded:
    """Batches put together, by ascending number of the images."""
    indices = np.concatenate([batch.indices for batch in batches])
    order = np.argsort(indices)
    sizes = [size for batch in batches for size in batch.sizes]
    logits = None if batches[0].logits is None else torch.cat([batch.logits for batch in batches])[order]
    return Embedded(indices[order], torch.cat([batch.vectors for batch in batches])[order], logits,
                    [sizes[i] for i in order])


def none_readable(number: int, reasons: Iterable[str]) -> str:
    """The sentence for images of which not one could be read."""
    return f'None of {counted(number, "image")} could be read: {next(iter(reasons), "the list is empty")}.'


def progress_bar(total: int, progress: bool = True, title: str = 'Embedding') -> tqdm:
    return tqdm(total=total, desc=title, unit='image', disable=None if progress else True)
