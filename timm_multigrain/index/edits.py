"""Edits that turn a picture into a copy of itself, mild and strong, for telling what a similarity threshold finds."""
from collections.abc import Callable
from functools import partial

from PIL import Image, ImageOps

from timm_multigrain.images import copies

__all__ = ['EDITS', 'resize']


def resize(image: Image.Image, scale: float) -> Image.Image:
    """Both sides times a factor, at least one pixel each."""
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.LANCZOS)


# Every edit takes an RGB picture and gives one; chance has no part in it.
EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    'resize 1/2': partial(resize, scale=0.5),
    'resize 1/4': partial(resize, scale=0.25),
    'resize x2': partial(resize, scale=2),
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
