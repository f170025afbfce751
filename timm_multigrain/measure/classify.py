"""Classification at any test resolution (Berman et al., arXiv 1902.05509, table 2): top-1 and top-5."""
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from timm_multigrain.embed.embedder import embed_images, none_readable
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import skipped_lines
from timm_multigrain.files import counted, json_p
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.models.multigrain import MultiGrain

from .results import Metric


@dataclass(frozen=True, eq=False)
class ClassificationResult:
    """Where the true class stands among the classes of each image.

    Attributes:
        ranks: Classes with a logit at least as high as the true one's, itself left out, (n,) int64: ties count against
            the system.
        labels: True class of each image, (n,) int64.
        whitening: Components of the embedding, if it is whitened.
        skipped: Images that could not be read, and why.
    """
    ranks: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    protocol: Protocol
    p: float | list[float] | None
    num_classes: int
    whitening: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def top1(self) -> float:
        """Share of images whose class stands first, in [0, 1]."""
        return float((self.ranks < 1).mean())

    @property
    def top5(self) -> float:
        """Share of images whose class stands among the first five."""
        return float((self.ranks < 5).mean())

    def metrics(self, dataset: str, command: str | None = None) -> list[dict[str, Any]]:
        """The figures of a data set of this name as `timm-multigrain publish --metrics` takes them."""
        p = None if isinstance(self.p, list) else json_p(self.p)
        return [asdict(Metric(
            task='classification', dataset=dataset, metric=name, value=100 * getattr(self, name),
            size=self.protocol.size, p=p, protocol=str(self.protocol), whitening=self.whitening, command=command))
            for name in ('top1', 'top5')]

    def __str__(self) -> str:
        classes = len(np.unique(self.labels))
        among = f' of {classes} classes among {self.num_classes}' if classes != self.num_classes else ''
        images = counted(len(self.ranks), 'image')
        text = f'top-1 {100 * self.top1:.2f} %, top-5 {100 * self.top5:.2f} % over {images}{among}'
        return '\n'.join([text, *skipped_lines(self.skipped)])


def ranks_of_truth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, K) logits and (n,) classes to (n,) ranks, 0 for the first; ties count against the true class."""
    return (logits >= logits.gather(1, labels[:, None])).sum(1) - 1


def validate(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        strict: bool = False,
        **extraction: Any,
) -> ClassificationResult:
    """Classify labelled images, rectangular ones as they are.

    Args:
        model: Model with a classifier.
        source: Images with their classes.
        protocol: Size and crop; logits are averaged over several views.
        **extraction: As of `embed_images`: batch_size, workers, device, dtype, progress.
    """
    if source.labels is None:
        raise ValueError('The images have no labels: give a folder of each class.')
    truth = torch.as_tensor(source.labels, dtype=torch.int64)
    if len(truth) and (truth.min() < 0 or truth.max() >= model.num_classes):
        raise ValueError(f'The labels are {int(truth.min())} to {int(truth.max())}, and the model has '
                         f'{model.num_classes} classes.')
    rows, skipped = [], {}
    on_error = None if strict else lambda i, reason: skipped.update({source.names[i]: reason})
    for out in embed_images(
            model, source, protocol, descriptor=False, logits=True, on_error=on_error, **extraction):
        wanted = truth[torch.from_numpy(out.indices)]
        if not torch.isfinite(out.logits).all():
            raise ValueError('The logits are not finite: the weights are damaged, or bfloat16 or float32 is needed.')
        rows += zip(out.indices, ranks_of_truth(out.logits, wanted).tolist(), strict=True)
    if not rows:
        raise ValueError(none_readable(len(source), skipped.values()))
    indices, ranks = map(np.array, zip(*sorted(rows), strict=True))
    return ClassificationResult(
        ranks, truth.numpy()[indices], protocol, model.gem_p, model.num_classes,
        model.embed_dim if model.whitened else None, skipped)
