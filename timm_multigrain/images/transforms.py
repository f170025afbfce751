"""Sizes and filters of transforms, checked once for training and test."""
import operator

from torchvision.transforms import InterpolationMode

__all__ = ['check_size', 'filter_of']

MAX_SIZE = 65_535  # pixels, the longest side of a JPEG


def check_size(size: int) -> int:
    """A side in pixels as int, or ValueError."""
    try:
        pixels = operator.index(size)
    except TypeError:
        pixels = 0
    if not 0 < pixels <= MAX_SIZE:
        raise ValueError(f'size is {size!r}: give an integer from 1 to {MAX_SIZE} pixels, such as 224')
    return pixels


def filter_of(interpolation: str) -> InterpolationMode:
    """Filter of torchvision by its name, one that timm knows too, or ValueError."""
    filters = [mode.value for mode in InterpolationMode if mode is not InterpolationMode.NEAREST_EXACT]
    if interpolation not in filters:
        raise ValueError(f'interpolation is {interpolation!r}: give one of {", ".join(filters)}')
    return InterpolationMode(interpolation)
