"""Training transforms of MultiGrain (Berman et al., arXiv 1902.05509, section 4 and appendix)."""
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms as T

from timm_multigrain.images.pixels import decode
from timm_multigrain.images.transforms import check_size, filter_of

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
    mode = filter_of(interpolation)
    size = [input_size] * 2 if isinstance(input_size, int) else list(input_size)[-2:]
    steps = [
        decode,
        T.RandomResizedCrop([check_size(side) for side in size], interpolation=mode),
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
