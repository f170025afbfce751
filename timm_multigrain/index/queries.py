"""Descriptors of pictures that are searched for."""
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from timm_multigrain.embed.embedder import Embedded, embed_images
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.sources import ImageSource, decode, read_image

__all__ = ['Queries', 'cut', 'embed_queries']


class Queries(ImageSource):
    """Files and pictures, the same part cut out of each.

    Args:
        images: Paths or PIL images.
        crop: (x, y, width, height) in pixels of the picture as it is shown; None for all of it.
    """

    def __init__(self, images: Sequence[str | os.PathLike | Image.Image], crop: Sequence[float] | None = None):
        self.images, self.crop = list(images), crop
        self.names = [f'picture {i}' if isinstance(image, Image.Image) else os.fspath(image)
                      for i, image in enumerate(self.images, 1)]
        self.labels = None

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int, exif: bool = True) -> Image.Image:
        """Picture i, RGB.

        Raises:
            UnreadableImage: It is a file that cannot be read.
            ValueError: The crop lies outside of it.
        """
        image = self.images[i]
        image = decode(image, exif) if isinstance(image, Image.Image) else read_image(image, exif=exif)
        return image if self.crop is None else cut(image, self.crop, self.names[i])


def cut(image: Image.Image, crop: Sequence[float], name: str) -> Image.Image:
    """The part (x, y, width, height) of a picture, what reaches beyond its edges left off.

    Raises:
        ValueError: Nothing of the crop lies in the picture.
    """
    x, y, width, height = crop
    box = (max(0, round(x)), max(0, round(y)), min(image.width, round(x + width)), min(image.height, round(y + height)))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f'The crop {x:g},{y:g},{width:g},{height:g} has nothing of {name}, which is {image.width} x '
                         f'{image.height} pixels: give left, top, width and height within it.')
    return image.crop(box)


def embed_queries(
        model: torch.nn.Module,
        protocol: Protocol,
        images: Sequence[str | os.PathLike | Image.Image],
        crop: Sequence[float] | None = None,
) -> Embedded:
    """`Embedded` of pictures or files, in their order, with logits where the model has classes.

    Args:
        model: The index's.
        protocol: The index's.
        images: Files or pictures.
        crop: See `Queries`.

    Raises:
        UnreadableImage: A file is not a readable image.
        ValueError: No images, or a crop outside of a picture.
    """
    if not len(images):
        raise ValueError('No picture to search for: give at least one.')
    parts = list(embed_images(
        model, Queries(images, crop), protocol, errors='raise', logits=model.num_classes > 0, workers=0,
        progress=False))
    indices = np.concatenate([part.indices for part in parts])
    order = np.argsort(indices)
    sizes = [size for part in parts for size in part.sizes]
    return Embedded(
        indices[order], torch.cat([part.vectors for part in parts])[order],
        torch.cat([part.logits for part in parts])[order] if model.num_classes else None, [sizes[i] for i in order])
