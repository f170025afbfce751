"""What the thresholds of a collection find: copies made of some of its pictures, edit by edit."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from timm_multigrain.images import copies
from timm_multigrain.images.sources import read_image

from .dedup import FALSE_POSITIVES, CopySearch
from .index import Index
from .looks import ALIKE, likeness, small_grey
from .queries import embed_queries
from .thresholds import Thresholds

__all__ = ['EDITS', 'EditRecall', 'measure_recall']


def _resize(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.LANCZOS)


# Every edit takes an RGB picture and gives one, mild and strong; nothing is random.
EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    'resize 1/2': partial(_resize, scale=0.5),
    'resize 1/4': partial(_resize, scale=0.25),
    'resize x2': partial(_resize, scale=2),
    **{f'crop {share} %': partial(copies.crop, area=share / 100) for share in (90, 70, 50)},
    **{f'jpeg {quality}': partial(copies.jpeg, quality=quality) for quality in (90, 50, 20, 10, 5)},
    'rotate 5': partial(copies.rotate, degrees=5),
    'rotate 15': partial(copies.rotate, degrees=15),
    'rotate 90': partial(Image.Image.transpose, method=Image.Transpose.ROTATE_90),
    'blur 1 %': partial(copies.blur, share=0.01),
    'blur 2 %': partial(copies.blur, share=0.02),
    'text': copies.text,
    'colour': copies.colour,
    'grey': lambda image: ImageOps.grayscale(image).convert('RGB'),
    'mirror': ImageOps.mirror,
}


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
        index: Index,
        images: int = 50,
        threshold: float | None = None,
        *,
        false_positives: float = FALSE_POSITIVES,
        look: bool = True,
        edits: Mapping[str, Callable[[Image.Image], Image.Image]] = EDITS,
) -> EditRecall:
    """Make copies of pictures of an index in memory, embed them, and see which `find_copies` would find.

    Args:
        index: The index.
        images: Pictures to make copies of, drawn from a fixed seed.
        threshold: As for `find_copies`, as the next two.
        false_positives: See there.
        look: See there.
        edits: Name to function.

    Raises:
        ValueError: Fewer than one image, or as `find_copies`.
        UnreadableImage: A picture was deleted.
    """
    if images < 1 or not len(index):
        raise ValueError(f'{images} of {len(index)} images is nothing to measure on: take one at least.')
    search, model, protocol = CopySearch(index, threshold, false_positives, look), index.model(), index.protocol()
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:images])
    found = dict.fromkeys(edits, 0)
    for start in range(0, len(rows), 16):
        chunk = rows[start:start + 16]
        pictures = [read_image(index.path_of(int(row)), exif=protocol.exif) for row in chunk]
        for name, edit in edits.items():
            edited = [edit(picture) for picture in pictures]
            vectors = search.whitening(embed_queries(model, protocol, edited).vectors.numpy())
            for score, picture, copy in zip((search.vectors[chunk] * vectors).sum(1), pictures, edited, strict=True):
                found[name] += bool(score >= search.thresholds.certain or (
                    look and score >= search.thresholds.possible
                    and likeness(small_grey(picture), small_grey(copy)) >= ALIKE))
    return EditRecall({name: number / len(rows) for name, number in found.items()}, len(rows), search.thresholds)
