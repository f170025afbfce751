"""Training and evaluation transforms of MultiGrain (Berman et al., arXiv 1902.05509, section 4 and appendix).

Evaluation comes in two protocols: 'crop', shorter side 256/224 of the size and a centre crop, and 'longer-side', the
whole image with its longer side resized.
"""
import operator

from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
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
    filters = [mode.value for mode in InterpolationMode]
    if interpolation not in filters:
        raise ValueError(f'interpolation is {interpolation!r}: give one of {", ".join(filters)}')
    size = [input_size] * 2 if isinstance(input_size, int) else list(input_size)[-2:]
    steps = [
        to_rgb,
        T.RandomResizedCrop([_check_size(side) for side in size], interpolation=InterpolationMode(interpolation)),
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
) -> T.Compose:
    """Evaluation transform: PIL image of any mode -> normalised float32 (3, H, W).

    Args:
        size: Side of the crop, or longer side of the result, in pixels.
        protocol: 'crop' (shorter side int(256 / 224 * size), then the central size x size pixels) or 'longer-side'
            (longer side becomes size, nothing is cut off).
        mean: Normalisation mean.
        std: Normalisation standard deviation.

    Raises:
        ValueError: Unknown protocol or a size below 1.
    """
    _check_size(size)
    if protocol == 'crop':
        resize = [Resize(int(256 / 224 * size), largest=False), T.CenterCrop(size)]
    elif protocol == 'longer-side':
        resize = [Resize(size, largest=True)]
    else:
        raise ValueError(f"protocol is {protocol!r}: give 'crop' or 'longer-side'")
    return T.Compose([to_rgb, *resize, T.ToTensor(), T.Normalize(mean, std)])


def resize_shape(width: int, height: int, size: int, largest: bool) -> tuple[int, int]:
    """(height, width) of an image after its longer (`largest`) or shorter side was resized to `size`.

    The other side is truncated, and at least one pixel.
    """
    _check_size(size)
    side = max(width, height) if largest else min(width, height)
    return max(1, size * height // side), max(1, size * width // side)


class Resize:
    """Resizes a PIL image (bilinear, aspect ratio kept) until its longer or shorter side is `size`.

    Args:
        size: Side in pixels.
        largest: Whether `size` is the longer side.
    """

    def __init__(self, size: int, largest: bool):
        self.size = _check_size(size)
        self.largest = largest

    def __call__(self, image: Image.Image) -> Image.Image:
        return F.resize(image, resize_shape(*image.size, self.size, self.largest), InterpolationMode.BILINEAR)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, largest={self.largest})'


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB."""
    return image if image.mode == 'RGB' else image.convert('RGB')


def _check_size(size: int) -> int:
    try:
        pixels = operator.index(size)
    except TypeError:
        pixels = 0
    if pixels < 1:
        raise ValueError(f'size is {size!r}: give an integer of at least 1 pixel, such as 224')
    return pixels
