"""A model under a test protocol: batches of decoded images to descriptors.

On the CPU a batch is run image by image: convolutions and matrix products choose other orders of summation for other
numbers of rows, and a batch is no faster there. So an image has the same descriptor, bit for bit, in whatever company
it is embedded.
"""
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from timm_multigrain.images.sources import printable
from timm_multigrain.layers import GeM, l2_normalize
from timm_multigrain.layers import gem as power_mean
from timm_multigrain.models.folding import fold_batch_norm

from .protocol import Protocol

__all__ = ['Decoded', 'Embedded', 'Embedder']

_NARROW = 32  # pixels, the stride of most trunks


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
    """An image before normalisation, (3, H, W) uint8, or why it could not be read."""
    index: int
    name: str
    pixels: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    message: str = ''


class _TooNarrow(ValueError):
    """An input that has no pixels left somewhere in the trunk."""


class Embedder:
    """A model under a protocol.

    Args:
        model: A MultiGrain, or a module with its ``forward_features`` and ``forward_head``; moved to the device.
        protocol: Preprocessing and views.
        device: Where the model runs; where it is by default.
        dtype: torch.bfloat16 or torch.float16 to run under autocast.
        descriptor: Give L2-normalised descriptors, else the pooled embedding as it is.
        logits: Give logits, too.
        dim: Keep the first components of a whitened descriptor and normalise again.
        fast: Fold batch norms into convolutions and lay images out channels last: equal up to rounding only.

    Raises:
        ValueError: What the model does not allow.
    """

    def __init__(self, model: torch.nn.Module, protocol: Protocol, *, device=None, dtype=None, descriptor: bool = True,
                 logits: bool = False, dim: int | None = None, fast: bool = False):
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
        if self.device.type == 'cuda' and not torch.cuda.is_available():
            raise ValueError(f'device {self.device} is not there: torch finds no GPU, give cpu.')
        self.dtype = None if dtype == torch.float32 else dtype
        self.descriptor, self.logits, self.dim, self.fast = descriptor, logits, dim, fast
        self.one_by_one = self.device.type == 'cpu'
        self.width = dim or model.embed_dim

    @contextlib.contextmanager
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

    def run(self, batches: Iterable[list[Decoded]], refuse: Callable[[Decoded], None]) -> Iterator[Embedded]:
        """Results one batch late: a GPU works on the next batch while the last one's results are handed out.

        Args:
            batches: Images of one shape each.
            refuse: Told of images that are too narrow for the model, with the message.

        Raises:
            ValueError: An embedding that is not finite, or images of a size that the model cannot take.
        """
        waiting = deque()
        for items in batches:
            try:
                waiting.append(self._launch(items))
            except _TooNarrow as e:
                for item in items:
                    refuse(item._replace(pixels=None, message=f'{printable(item.name)}: {e}'))
            if len(waiting) > 1:
                yield self._collect(*waiting.popleft())
        while waiting:
            yield self._collect(*waiting.popleft())

    @torch.inference_mode()
    def _launch(self, items: list[Decoded]) -> tuple:
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        on_gpu = self.device.type == 'cuda'
        if on_gpu:
            pixels = pixels.pin_memory()
        parts = pixels.split(1) if self.one_by_one else [pixels.to(self.device, non_blocking=True)]
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            out = [self._forward_checked(part) for part in parts]
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
        vectors = vectors.cpu()
        if not torch.isfinite(vectors).all():
            broken = [item.index for item, row in zip(items, vectors, strict=True) if not torch.isfinite(row).all()]
            raise ValueError(f'The embedding of image number {broken[0]} and {len(broken) - 1} more is not finite: '
                             f'{"take bfloat16 or float32" if self.dtype else "the weights are damaged"}.')
        return Embedded(np.array([item.index for item in items]), vectors.clone(),
                        None if logits is None else logits.cpu().clone(), [item.size for item in items])

    def _forward_checked(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        height, width = pixels.shape[-2:]
        try:
            return self._forward(pixels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            if min(height, width) * min(self.protocol.scales) >= _NARROW:
                raise
            raise _TooNarrow(f'its {width} x {height} pixels are too narrow for the model ({e})') from e

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
        return self._mean(scales, gem=True), torch.stack(logits).mean(0) if logits else None

    def _mean(self, vectors: list[torch.Tensor], gem: bool = False) -> torch.Tensor:
        """Mean over views, of descriptors normalised again; with ``gem`` GeM's mean where there is one to take."""
        if len(vectors) == 1:
            return vectors[0]
        stacked, pool = torch.stack(vectors), self.model.head.pool
        if not (gem and self.descriptor and isinstance(pool, GeM) and not self.model.whitened):
            mean = stacked.mean(0)
        else:  # GeM's values are above 0
            mean = power_mean(stacked, pool.p, torch.finfo(stacked.dtype).tiny, dim=[0], fixed=pool.fixed)
        return l2_normalize(mean) if self.descriptor else mean
