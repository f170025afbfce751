"""The demo's measurements: top-1 of the held-out pictures, and mAP of finding their edited copies among all of them."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from timm_multigrain.embed.embedder import embed_images, in_order
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.copies import COPY_TRANSFORMS, make_copies
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.models import MultiGrain

KINDS = ('original', *COPY_TRANSFORMS)


class EditedCopies(ImageSource):
    """Pictures and their edited copies, in the order picture, kind."""

    def __init__(self, pictures: ImageSource):
        self.pictures = pictures
        self.names = [f'{name}, {kind}' for name in pictures.names for kind in KINDS]
        self._last = None, None  # number and picture: its copies follow each other

    def load(self, i: int, exif: bool = True) -> Image.Image:
        number, kind = divmod(i, len(KINDS))
        if self._last[0] != number:
            self._last = number, self.pictures.load(number, exif)
        picture = self._last[1]
        return make_copies(picture, [KINDS[kind]])[KINDS[kind]] if kind else picture


class Scores(NamedTuple):
    """Measurements of one model on held-out pictures.

    Attributes:
        top1: Per cent classified right.
        copy_ap: (pictures,) AP in per cent of finding all edited copies of a picture among all pictures and copies.
        copy_map_of: Its mean for each kind of copy alone.
        similarity: (pictures, pictures * kinds) cosine similarities, database in the order picture, kind.
        predictions: (pictures,) predicted classes.
    """
    top1: float
    copy_ap: np.ndarray
    copy_map_of: dict[str, float]
    similarity: torch.Tensor
    predictions: torch.Tensor


def measure(model: MultiGrain, pictures: ImageSource, protocol: Protocol, workers: int | None = None) -> Scores:
    """Top-1 of held-out pictures, and mAP of finding their edited copies among all of them."""
    found = in_order(list(embed_images(model, EditedCopies(pictures), protocol, logits=True, workers=workers)))
    vectors, predictions = found.vectors, found.logits[::len(KINDS)].argmax(1)
    similarity = vectors[::len(KINDS)] @ vectors.T
    top1 = (predictions == torch.tensor(pictures.labels)).double().mean().item()
    kinds = range(1, len(KINDS))
    of_kind = {KINDS[k]: copy_ap(similarity, [k]).mean() for k in kinds}
    return Scores(100 * top1, copy_ap(similarity, kinds), of_kind, similarity, predictions)


def copy_ap(similarity: torch.Tensor, wanted: Sequence[int]) -> np.ndarray:
    """AP in per cent of these kinds of copies, (pictures,); the query and its other copies are left out of its list.

    Args:
        similarity: (pictures, pictures * kinds), the database in the order of `EditedCopies`.
        wanted: Positions in `KINDS`.
    """
    others = np.setdiff1d(np.arange(len(KINDS)), list(wanted))
    base = np.arange(len(similarity))[:, None] * len(KINDS)
    return 100 * mean_average_precision(similarity, list(base + list(wanted)), list(base + others)).ap
