"""Training and evaluation transforms of MultiGrain (Berman et al., arXiv 1902.05509, section 4 and appendix).

Evaluation comes in two protocols: 'crop', shorter side 256/224 of the size and a centre crop, and 'longer-side', the
whole image with its longer side resized.
"""
import math
import operator

from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torchvision import transforms as T
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from .lighting import Lighting

# strength of the jitter of brightness, contrast and saturation
JITTER = {'full': 0.3, 'senet': 0.2, 'torch': 0.0, 'autoaugment': 0.0}


def create_transform(
        input_size: int | tuple[int, ...] = 224,
        augmentation: str = 'full',
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        interpolation: str = 'bilinear',
        lighting: float = 0.1,
) -> T.Compose:
    """Training transform: PIL image of any mode -> normalised float32 (3, H, W).

    All begin with a random crop of 8 to 100 % of the area and aspect ratio 3/4 to 4/3 (drawn log-uniformly, by
    torchvision; the original implementation's version drew it uniformly) and a horizontal flip.

    - 'full' (default of the paper): colour jitter 0.3 of brightness, contrast and saturation, `Lighting`.
    - 'senet': the same with jitter 0.2.
    - 'torch': nothing more.
    - 'autoaugment': torchvision's ImageNet policy (Cubuk et al., arXiv 1805.09501) with grey filling. Against the
      original implementation: the 25 published sub-policies instead of 24 of them (it lacks one of two equal ones),
      rotations both ways instead of one, solarize thresholds lower by up to 0.7 of 256 grey levels.

    Args:
        input_size: Side of the square crop, (H, W) or (C, H, W).
        augmentation: 'full', 'senet', 'torch' or 'autoaugment'.
        mean: Normalisation mean.
        std: Normalisation standard deviation.
        interpolation: Filter of the crop, a value of torchvision's InterpolationMode.
        lighting: Standard deviation for `Lighting` in 'full' and 'senet'; 0 leaves it out.

    Raises:
        ValueError: Unknown augmentation or interpolation, or a size below 1.
    """
    if augmentation not in JITTER:
        raise ValueError(f'augmentation is {augmentation!r}: give one of {", ".join(JITTER)}')
    mode = _filter(interpolation)
    size = [input_size] * 2 if isinstance(input_size, int) else list(input_size)[-2:]
    steps = [
        to_rgb,
        T.RandomResizedCrop([_check_size(side) for side in size], interpolation=mode),
        T.RandomHorizontalFlip(),
    ]
    jitter = JITTER[augmentation]
    if jitter:
        steps.append(T.ColorJitter(jitter, jitter, jitter))
    elif augmentation == 'autoaugment':
        steps.append(T.AutoAugment(T.AutoAugmentPolicy.IMAGENET, fill=[128, 128, 128]))
    steps.append(T.ToTensor())
    if jitter and lighting:
        steps.append(Lighting(lighting))
    return T.Compose([*steps, T.Normalize(mean, std)])


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
    _check_size(size)
    mode = _filter(interpolation)
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
    return T.Compose([to_rgb, *resize, T.ToTensor(), T.Normalize(mean, std)])


def resize_shape(width: int, height: int, size: int, largest: bool) -> tuple[int, int]:
    """(height, width) of an image after its longer (`largest`) or shorter side was resized to `size`.

    The other side is truncated, and at least one pixel.
    """
    _check_size(size)
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
        self.size = _check_size(size)
        self.largest = largest
        self.interpolation = _filter(interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        return F.resize(image, resize_shape(*image.size, self.size, self.largest), self.interpolation)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, largest={self.largest}, {self.interpolation.value})'


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB."""
    return image if image.mode == 'RGB' else image.convert('RGB')


def _filter(interpolation: str) -> InterpolationMode:
    filters = [mode.value for mode in InterpolationMode]
    if interpolation not in filters:
        raise ValueError(f'interpolation is {interpolation!r}: give one of {", ".join(filters)}')
    return InterpolationMode(interpolation)


def _check_size(size: int) -> int:
    try:
        pixels = operator.index(size)
    except TypeError:
        pixels = 0
    if pixels < 1:
        raise ValueError(f'size is {size!r}: give an integer of at least 1 pixel, such as 224')
    return pixels
