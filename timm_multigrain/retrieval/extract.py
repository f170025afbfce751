"""Descriptors of many images: decoded by workers, embedded in batches of one shape.

On the CPU a batch is run image by image: convolutions and matrix products choose other orders of summation for other
numbers of rows, and a batch is no faster there. So an image has the same descriptor, bit for bit, in whatever company
it is embedded. `fast` gives that up.
"""
import contextlib
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_multigrain.layers import GeM, l2_normalize
from timm_multigrain.models import MultiGrain

from .descriptors import Descriptors
from .images import ImageSource, UnreadableImage
from .protocol import Protocol

__all__ = ['Embedded', 'embed_images', 'extract']

_CHUNK = 4  # images a worker hands over at once
_PENDING = 8  # batches of images that may wait for others of their shape


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


class Decoded(NamedTuple):
    """An image as the network sees it before normalisation, or why it could not be read."""
    index: int
    pixels: np.ndarray | None
    size: tuple[int, int]
    message: str


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
        progress: bool = True,
) -> Iterator[Embedded]:
    """Embed images, a batch of equal shape at a time, in no particular order; every readable one exactly once.

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
        progress: Show a bar if stderr is a terminal.

    Raises:
        UnreadableImage: With errors='raise'.
        ValueError: Impossible arguments, or a descriptor that is not finite.
    """
    if errors not in ('skip', 'raise'):
        raise ValueError(f"errors={errors!r}: give 'skip' or 'raise'.")
    embedder = _Embedder(model, protocol, device=device, dtype=dtype, descriptor=descriptor, logits=logits, dim=dim)
    indices = range(len(source)) if indices is None else indices
    return _embed(embedder, _decode(source, protocol, indices, workers), len(indices), batch_size, errors, on_error,
                  progress)


def _embed(embedder, stream, total, batch_size, errors, on_error, progress) -> Iterator[Embedded]:
    with tqdm(total=total, desc='Embedding', unit='image', disable=None if progress else True) as bar, \
            embedder.evaluating(), contextlib.closing(stream):
        for out in embedder.run(_batches(stream, batch_size, errors, on_error, bar)):
            bar.update(len(out.indices))
            yield out


def extract(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        strict: bool = False,
        **kwargs,
) -> Descriptors:
    """Descriptors of all images, in the order of the source.

    Args:
        model: Model.
        source: Images.
        protocol: Size, crop, scales, flip.
        strict: Stop at the first image that cannot be read instead of leaving it out.
        **kwargs: As of `embed_images`.

    Raises:
        UnreadableImage: With ``strict``.
        ValueError: No image could be read.
    """
    skipped = {}
    parts = list(embed_images(
        model, source, protocol, errors='raise' if strict else 'skip', on_error=skipped.__setitem__, **kwargs))
    if not parts:
        reason = next(iter(skipped.values()), 'the list is empty')
        raise ValueError(f'None of {len(source)} images could be read: {reason}.')
    indices = np.concatenate([part.indices for part in parts])
    order = np.argsort(indices)
    return Descriptors(
        tuple(source.names[i] for i in indices[order].tolist()),
        torch.cat([part.vectors for part in parts])[torch.from_numpy(order)],
        {source.names[i]: skipped[i] for i in sorted(skipped)}, {'protocol': protocol.to_dict()})


class _Images(Dataset):

    def __init__(self, source: ImageSource, protocol: Protocol, indices: Sequence[int]):
        self.source, self.protocol, self.indices = source, protocol, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Decoded:
        index = int(self.indices[i])
        try:
            image = self.source.load(index, exif=self.protocol.exif)
            # numpy travels by value: tensors would each hold a file descriptor while they wait
            return Decoded(index, self.protocol.pixels(image).numpy(), image.size, '')
        except UnreadableImage as e:
            return Decoded(index, None, (0, 0), str(e))


def _decode(source: ImageSource, protocol: Protocol, indices: Sequence[int], workers: int | None) -> Iterator[Decoded]:
    if workers is None:
        workers = min(8, max(0, (os.cpu_count() or 1) - 1))
    if workers < 0:
        raise ValueError(f'workers={workers} is negative: give 0 to read images in this process.')
    workers = min(workers, math.ceil(len(indices) / _CHUNK))
    return _decoded(DataLoader(
        _Images(source, protocol, indices), batch_size=_CHUNK, num_workers=workers, collate_fn=list))


def _decoded(loader: Iterable[list[Decoded]]) -> Iterator[Decoded]:
    for chunk in loader:
        yield from chunk


def _batches(stream, batch_size, errors, on_error, bar) -> Iterator[list[Decoded]]:
    """Lists of images of one shape, at most ``batch_size`` of them."""
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}: give at least 1.')
    buckets = defaultdict(list)
    pending = 0
    for item in stream:
        if item.pixels is None:
            if errors == 'raise':
                raise UnreadableImage(item.message)
            if on_error is not None:
                on_error(item.index, item.message)
            bar.update(1)
            continue
        bucket = buckets[item.pixels.shape]
        bucket.append(item)
        pending += 1
        if len(bucket) == batch_size:
            pending -= batch_size
            yield buckets.pop(item.pixels.shape)
        elif pending >= _PENDING * batch_size:
            fullest = max(buckets, key=lambda shape: len(buckets[shape]))
            pending -= len(buckets[fullest])
            yield buckets.pop(fullest)
    yield from buckets.values()


class _Embedder:
    """A model under a protocol: lists of decoded images of one shape to descriptors on the CPU."""

    def __init__(self, model, protocol, *, device, dtype, descriptor, logits, dim):
        if dim is not None and not (descriptor and model.whitened and 1 <= dim <= model.embed_dim):
            raise ValueError(f'dim={dim} needs descriptors of a whitened embedding of at least so many components; '
                             f'this one has {model.embed_dim}, {"" if model.whitened else "not "}whitened.')
        if logits and not model.num_classes:
            raise ValueError('logits=True needs a model with a classifier: this one has num_classes=0.')
        if model.in_chans != 3:
            raise ValueError(f'The model takes {model.in_chans} channels: only one of RGB images can embed them.')
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f'dtype={dtype}: give torch.bfloat16, torch.float16 or None.')
        self.model, self.protocol = model, protocol
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.dtype = None if dtype == torch.float32 else dtype
        self.descriptor, self.logits, self.dim = descriptor, logits, dim
        self.one_by_one = self.device.type == 'cpu'

    @contextlib.contextmanager
    def evaluating(self):
        training = self.model.training
        self.model.to(self.device).eval()
        try:
            yield
        finally:
            self.model.train(training)

    def run(self, batches: Iterable[list[Decoded]]) -> Iterator[Embedded]:
        """Results one batch late: a GPU works on the next batch while the last one's results are handed out."""
        waiting = deque()
        for items in batches:
            waiting.append(self._launch(items))
            if len(waiting) > 1:
                yield self._collect(*waiting.popleft())
        while waiting:
            yield self._collect(*waiting.popleft())

    @torch.inference_mode()
    def _launch(self, items: list[Decoded]):
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        if self.device.type == 'cuda':
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            parts = pixels.split(1) if self.one_by_one else [pixels.to(self.device)]
            out = [self._forward(self.protocol.normalize(part)) for part in parts]
        vectors, logits = (torch.cat(o) if o[0] is not None else None for o in zip(*out, strict=True))
        event = None
        if self.device.type == 'cuda':
            vectors, logits = (v if v is None else v.to('cpu', non_blocking=True) for v in (vectors, logits))
            event = torch.cuda.Event()
            event.record()
        return items, vectors, logits, event

    def _collect(self, items, vectors, logits, event) -> Embedded:
        if event is not None:
            event.synchronize()
        vectors = vectors.cpu()
        if not torch.isfinite(vectors).all():
            broken = [item.index for item, row in zip(items, vectors, strict=True) if not torch.isfinite(row).all()]
            raise ValueError(f'The embedding of image number {broken[0]} and {len(broken) - 1} more is not finite: '
                             f'{"take bfloat16 or float32" if self.dtype else "the weights are damaged"}.')
        return Embedded(np.array([item.index for item in items]), vectors.clone(),
                        None if logits is None else logits.cpu().clone(), [item.size for item in items])

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales, logits = [], []
        for views in self.protocol.views(x):
            vectors = []
            for view in views:
                embedding = self.model.forward_head(self.model.forward_features(view), pre_logits=True)
                if self.logits:
                    logits.append(self.model.head.classify(embedding).float())
                embedding = embedding.float()
                vectors.append(l2_normalize(embedding[:, :self.dim]) if self.descriptor else embedding)
            scales.append(self._mean(vectors))
        return self._mean(scales, gem=True), torch.stack(logits).mean(0) if logits else None

    def _mean(self, vectors: list[torch.Tensor], gem: bool = False) -> torch.Tensor:
        """Mean of vectors over the views; of descriptors, normalised again."""
        if len(vectors) == 1:
            return vectors[0]
        stacked = torch.stack(vectors)
        pool = self.model.head.pool
        if not (gem and self.descriptor and isinstance(pool, GeM)) or self.model.whitened or pool._p == 1:
            mean = stacked.mean(0)
        elif pool._p == math.inf:
            mean = stacked.amax(0)
        else:
            peak = stacked.amax(0).clamp(min=1e-30)
            mean = (stacked / peak).pow(pool.p).mean(0).pow(1 / pool.p) * peak
        return l2_normalize(mean) if self.descriptor else mean
