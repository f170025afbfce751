"""What the thresholds of a collection find: copies made of some of its pictures, edit by edit."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .edits import EDITS
from .looks import ALIKE, likeness, small_grey
from .queries import embed_queries
from .thresholds import Thresholds

if TYPE_CHECKING:
    from .index import Index

__all__ = ['EditRecall', 'measure_recall']


@dataclass(frozen=True)
class EditRecall:
    """Shares of copies found.

    Attributes:
        recall: Edit to the share of its copies that are found.
        images: Pictures of which copies were made.
        thresholds: The thresholds.
    """
    recall: Mapping[str, float]
    images: int
    thresholds: Thresholds

    def __str__(self) -> str:
        width = max(map(len, self.recall))
        lines = [f'{name:{width}}  {100 * share:5.1f} %' for name, share in self.recall.items()]
        mean = 100 * sum(self.recall.values()) / len(self.recall)
        return '\n'.join([f'Copies found of {self.images} pictures', *lines, f'{"mean":{width}}  {mean:5.1f} %'])


def measure_recall(
        index: 'Index',
        images: int = 50,
        *,
        threshold: float | None = None,
        false_positives: float,
        look: bool = True,
        edits: Mapping[str, Callable[[Image.Image], Image.Image]] = EDITS,
) -> EditRecall:
    """Make copies of pictures of an index in memory, embed them, and see which `find_copies` would tell are copies.

    Args:
        index: The index.
        images: Pictures to make copies of, drawn from a fixed seed.
        threshold: As for `find_copies`.
        false_positives: As for `find_copies`.
        look: As for `find_copies`.
        edits: Name to function.

    Raises:
        ValueError: Fewer than one image, or as `find_copies`.
        UnreadableImage: A picture is not there any more.
    """
    from timm_multigrain.images.sources import read_image

    from .dedup import thresholds_of

    if images < 1 or not len(index):
        raise ValueError(f'{images} of {len(index)} images is nothing to measure on: take one at least.')
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:images])
    thresholds, whitening = thresholds_of(index, threshold, false_positives, look)
    originals = whitening(np.asarray(index.vectors[rows], dtype=np.float32))
    found = dict.fromkeys(edits, 0)
    for start in range(0, len(rows), 16):
        pictures = [read_image(index.path_of(int(row)), exif=index.protocol().exif) for row in rows[start:start + 16]]
        for name, edit in edits.items():
            copies = [edit(picture) for picture in pictures]
            found[name] += _found(index, originals[start:start + 16], pictures, copies, thresholds, whitening, look)
    return EditRecall({name: number / len(rows) for name, number in found.items()}, len(rows), thresholds)


def _found(index, originals: np.ndarray, pictures: Sequence, copies: Sequence, thresholds, whitening, look) -> int:
    embedded = whitening(embed_queries(index.model(), index.protocol(), copies).vectors.numpy())
    scores = (originals * embedded).sum(1)
    number = 0
    for score, picture, copy in zip(scores, pictures, copies, strict=True):
        alike = look and score >= thresholds.possible and likeness(small_grey(picture), small_grey(copy)) >= ALIKE
        number += bool(score >= thresholds.certain or alike)
    return number
