"""Retrieval figures of the validation images beside train.py's own metrics, for --mg-eval."""
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from timm_multigrain.data.instances import DecodedDataset
from timm_multigrain.images.copies import COPY_TRANSFORMS, make_copies
from timm_multigrain.layers import l2_normalize
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.task import MultiGrainTrainableModule, all_gather_with_grad

MAX_COPIES = 160  # a pass over more would take more than a tenth of an epoch of a small training set
MAX_QUERIES = 1000


class EditedImages(Dataset):
    """Edited copies of some images of a dataset, each image once, the kinds of `COPY_TRANSFORMS` in turn.

    Args:
        dataset: Gives images of Pillow and classes.
        number: Copies at most; the images are spread evenly over the dataset.
    """
    transform = None  # set by timm's create_loader

    def __init__(self, dataset: DecodedDataset, number: int = MAX_COPIES):
        self.dataset = dataset
        self.rows = _spread(np.arange(len(dataset)), number)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.dataset[int(self.rows[index])]
        kind = list(COPY_TRANSFORMS)[index % len(COPY_TRANSFORMS)]
        return self.transform(make_copies(image, [kind])[kind].convert(image.mode)), target


class RetrievalValidation:
    """train.py's `validate` with more metrics, in per cent.

    'recall1' and 'map': each validation image that has another one of its instance is a query among all others, 1000
    queries at most. 'copy_map': edited copies of 160 images at most, spread evenly, are queries, each with one right
    answer among all images. Embeddings of the images are those of the validation's own pass.

    Args:
        validate: The script's function.
        images: Validation images in all.
        instances: Instance of each, (N,) integers; None takes the classes.
        copies: Loader of `EditedImages`, made like the validation's.
        rows: Image that each copy is of.
    """

    def __init__(self, validate: Callable, images: int, instances: np.ndarray | None, copies: Any, rows: np.ndarray):
        self.validate = validate
        self.images = images
        self.instances = instances
        self.copies = copies
        self.rows = rows

    def __call__(self, model: nn.Module, loader: Any, loss_fn: Callable, *args: Any, **kwargs: Any) -> OrderedDict:
        # a compiled model gives its logits only
        watched = _Watched(getattr(model, '_orig_mod', model), loss_fn)
        metrics = self.validate(watched, loader, watched.loss, *args, **kwargs)
        vectors, classes = watched.collected(self.images)
        instances = classes.numpy() if self.instances is None else self.instances
        if 'log_suffix' in inspect.signature(self.validate).parameters:
            kwargs['log_suffix'] = f'{kwargs.get("log_suffix", "")} (copies)'
        self.validate(watched, self.copies, watched.loss, *args, **kwargs)
        copies, _ = watched.collected(len(self.rows))
        return OrderedDict(metrics, **retrieval_figures(vectors, instances, copies, self.rows))


def retrieval_figures(
        vectors: torch.Tensor,
        instances: np.ndarray,
        copies: torch.Tensor,
        rows: np.ndarray,
) -> dict[str, float]:
    """'recall1', 'map' and 'copy_map' in per cent; NaN without queries, or for embeddings that are not finite.

    Of normalised embeddings of images (N, E) with an instance each (N,), and of edited copies (Q, E) of the images
    ``rows`` (Q,).
    """
    figures = dict.fromkeys(('recall1', 'map', 'copy_map'), float('nan'))
    if not (vectors.isfinite().all() and copies.isfinite().all()):
        return figures
    figures['copy_map'] = 100 * mean_average_precision(copies @ vectors.T, rows[:, None]).map
    _, places, counts = np.unique(instances, return_inverse=True, return_counts=True)
    queries = _spread(np.flatnonzero(counts[places] > 1), MAX_QUERIES)
    if len(queries):
        members = np.split(np.argsort(places, kind='stable'), np.cumsum(counts)[:-1])
        relevant = [np.setdiff1d(members[places[query]], [query]) for query in queries]
        found = mean_average_precision(vectors[queries] @ vectors.T, relevant, queries[:, None])
        figures.update(map=100 * found.map, recall1=100 * found.recall_at(1))
    return figures


class _Watched(nn.Module):
    """A model that keeps the embeddings which its logits come from, and the classes that these are compared with."""

    def __init__(self, model: nn.Module, loss_fn: Callable):
        super().__init__()
        self.trainable = MultiGrainTrainableModule(model, nn.Identity())
        self.loss_fn = loss_fn
        self.embeddings, self.classes = [], []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits, embedding, _ = self.trainable(images)
        self.embeddings.append(l2_normalize(embedding.float()))
        return logits

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.classes.append(target)
        return self.loss_fn(output, target)

    def collected(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (number, E) and classes (number,) in the order of the dataset; begins anew."""
        parts = torch.cat(self.embeddings), torch.cat(self.classes)
        self.embeddings, self.classes = [], []
        # timm deals the images out to the ranks one by one, and fills up with the first ones
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return tuple(
            all_gather_with_grad(part).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:number].cpu()
            for part in parts)


def _spread(values: np.ndarray, number: int) -> np.ndarray:
    """At most `number` of the values, evenly."""
    return values[np.linspace(0, len(values) - 1, min(len(values), number)).round().astype(np.int64)]
