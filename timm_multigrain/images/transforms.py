"""Evaluation transforms of MultiGrain (Berman et al., arXiv 1902.05509, section 4 and appendix).

They come in two protocols: 'crop', shorter side 256/224 of the size and a centre crop, and 'longer-side', the whole
image with its longer side resized.
"""
import math
import operator

from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torchvision import transforms as T
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from .pixels import decode

__all__ = ['Resize', 'check_size', 'create_eval_transform', 'filter_of', 'resize_shape']

MAX_SIZE = 65_535  # pixels, the longest side of a JPEG


def create_eval_transform(
        size: int = 224,
        protocol: str = 'crop',
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        crop_pct: float = 0.875,
        interpolation: str = 'bilinear',
        crop_mode: str = 'center',
) -> T.Compose:
    """Evaluation transform: PIL image of any mode -> normalised float32 (3, H, W).

    The defaults are the paper's; crop_pct, interpolation and crop_mode are those of timm's data configuration.

    Args:
        size: Side of the crop, or longer side of the result, in pixels.
        protocol: 'crop' (shorter side size / crop_pct, then the central size x size pixels) or 'longer-side' (longer
            side becomes size, nothing is cut off).
        mean: Normalisation mean.
        std: Normalisation standard deviation.
        crop_pct: Share of the shorter side that the crop keeps.
        interpolation: Filter of the resize, a value of torchvision's InterpolationMode.
        crop_mode: Of 'crop': 'center', 'squash' (both sides become size / crop_pct) or 'border' (the longer side does,
            and the rest is filled with the mean).

    Raises:
        ValueError: Unknown protocol, interpolation or crop mode, a crop_pct that is not above 0, or a size below 1.
    """
    check_size(size)
    mode = filter_of(interpolation)
    if not 0 < crop_pct < math.inf:
        raise ValueError(f'crop_pct is {crop_pct}: give a number above 0, such as 0.875')
    if protocol not in ('crop', 'longer-side'):
        raise ValueError(f"protocol is {protocol!r}: give 'crop' or 'longer-side'")
    side = max(1, math.floor(size / crop_pct))
    if protocol == 'longer-side':
        resize = [Resize(size, largest=True, interpolation=interpolation)]
    elif crop_mode == 'center':
        resize = [Resize(side, largest=False, interpolation=interpolation), T.CenterCrop(size)]
    elif crop_mode == 'squash':
        resize = [T.Resize((side, side), mode), T.CenterCrop(size)]
    elif crop_mode == 'border':
        fill = [round(255 * value) for value in mean]
        resize = [ResizeKeepRatio(side, longest=1., interpolation=interpolation), CenterCropOrPad(size, fill=fill)]
    else:
        raise ValueError(f"crop_mode is {crop_mode!r}: give 'center', 'squash' or 'border'")
    return T.Compose([decode, *resize, T.ToTensor(), T.Normalize(mean, std)])


def resize_shape(width: int, height: int, size: int, largest: bool) -> tuple[int, int]:
    """(height, width) of an image after its longer (`largest`) or shorter side was resized to `size`.

    The other side is truncated, and at least one pixel.
    """
    check_size(size)
    side = max(width, height) if largest else min(width, height)
    return max(1, size * height // side), max(1, size * width // side)


class Resize:
    """Resizes a PIL image (aspect ratio kept) until its longer or shorter side is `size`.

    Args:
        size: Side in pixels.
        largest: Whether `size` is the longer side.
        interpolation: Filter, a value of torchvision's InterpolationMode.
    """

    def __init__(self, size: int, largest: bool, interpolation: str = 'bilinear'):
        self.size = check_size(size)
        self.largest = largest
        self.interpolation = filter_of(interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        return F.resize(image, resize_shape(*image.size, self.size, self.largest), self.interpolation)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, largest={self.largest}, {self.interpolation.value})'


def filter_of(interpolation: str) -> InterpolationMode:
    """Filter of torchvision by its name, or ValueError."""
    filters = [mode.value for mode in InterpolationMode]
    if interpolation not in filters:
        raise ValueError(f'interpolation is {interpolation!r}: give one of {", ".join(filters)}')
    return InterpolationMode(interpolation)


def check_size(size: int) -> int:
    """A side in pixels as int, or ValueError."""
    try:
        pixels = operator.index(size)
    except TypeError:
        pixels = 0
    if not 0 < pixels <= MAX_SIZE:
        raise ValueError(f'size is {size!r}: give an integer from 1 to {MAX_SIZE} pixels, such as 224')
    return pixels
