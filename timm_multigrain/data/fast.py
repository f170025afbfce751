"""timm's training transforms on uint8 tensors instead of Pillow's images, and the decoding of image files to them.

The random numbers are drawn as timm's transforms draw them, so the same seed gives the same crops, flips and colours.
Decoding, flips and colours equal Pillow's bit for bit (decoding where torchvision and Pillow hold the same libjpeg).
The crop is resized by torch's antialiased kernel for uint8, which rounds a few pixels in a thousand to another grey
level. Filters that torch lacks, and transforms that know only Pillow's images, such as timm's RandAugment and
AutoAugment, get an image of Pillow.
"""
import io
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import transforms as timm_transforms
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T
from torchvision.io import ImageReadMode
from torchvision.transforms import InterpolationMode, v2

from timm_multigrain.images.pixels import open_image, read_image, turn_of

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision 0.29 announces its removal
    decode_jpeg = None

_ON_TENSORS = (
    T.RandomHorizontalFlip, T.RandomVerticalFlip, T.CenterCrop, T.GaussianBlur, T.Normalize, RandomErasing,
    timm_transforms.CenterCropOrPad, timm_transforms.RandomCropOrPad, timm_transforms.MaybePILToTensor)
_INTERPOLATIONS = {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}


class TensorTransform:
    """uint8 (3, H, W) RGB -> what a training transform of timm.data.create_transform gives for the image."""

    def __init__(self, transform: Callable):
        if not isinstance(transform, T.Compose):
            raise ValueError(
                f'the fast loader cannot take {type(transform).__name__} apart: leave tf_preprocessing out, or fast')
        self.transforms = [on_tensors(step) for step in transform.transforms]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        result = image
        for step in self.transforms:
            result = step(result)
        return result.clone() if result.untyped_storage().data_ptr() == image.untyped_storage().data_ptr() else result


def decode(content: bytes, way: str = 'multigrain') -> torch.Tensor:
    """Content of an image file -> uint8 (3, H, W) RGB.

    Upright grey and colour JPEG files are decoded by torchvision, while it has its decoder, all others by Pillow.
    ``way`` is 'multigrain', the pixels of `read_image`, or 'timm', those of Pillow's conversion to RGB.
    """
    if decode_jpeg is not None and content.startswith(b'\xff\xd8'):
        try:
            image = open_image(io.BytesIO(content))
            if image.format == 'JPEG' and image.mode in ('L', 'RGB') and (way == 'timm' or turn_of(image) is None):
                # a copy, since a tensor of a constant is one that torch warns of
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except Exception:  # Pillow reads it all the same, or says what is wrong with it
            pass
    file = io.BytesIO(content)
    return to_tensor(open_image(file).convert('RGB') if way == 'timm' else read_image(file))


def on_tensors(step: Callable) -> Callable:
    """A step of a transform for uint8 (3, H, W) tensors."""
    interpolation = getattr(step, 'interpolation', ())
    supported = _INTERPOLATIONS.issuperset(interpolation if isinstance(interpolation, tuple) else [interpolation])
    if isinstance(step, timm_transforms.RandomResizedCropAndInterpolation) and supported:
        return partial(crop, step)
    if isinstance(step, T.Resize) and supported:
        return v2.Resize(step.size, step.interpolation, step.max_size)  # which stays with 8 bits, as Pillow does
    if isinstance(step, T.ColorJitter) and step.hue is None:
        return partial(jitter, step)
    if isinstance(step, T.RandomApply):
        return T.RandomApply([on_tensors(inner) for inner in step.transforms], step.p)
    if isinstance(step, timm_transforms.MaybeToTensor):
        return to_float
    if isinstance(step, _ON_TENSORS) or (isinstance(step, timm_transforms.ResizeKeepRatio) and supported):
        return step
    return partial(on_pillow, step)


def crop(step: timm_transforms.RandomResizedCropAndInterpolation, image: torch.Tensor) -> torch.Tensor:
    """timm's random crop and resize."""
    box = step.get_params(image, step.scale, step.ratio)
    interpolation = step.interpolation
    if isinstance(interpolation, tuple):
        interpolation = random.choice(interpolation)
    return v2.functional.resized_crop(image, *box, list(step.size), interpolation, antialias=True)


def jitter(step: T.ColorJitter, image: torch.Tensor) -> torch.Tensor:
    """torchvision's jitter of brightness, contrast and saturation with Pillow's arithmetic, in one float32 buffer."""
    order, *factors, _ = step.get_params(step.brightness, step.contrast, step.saturation, None)
    pixels = image.to(torch.float32, memory_format=torch.contiguous_format)
    for kind in order.tolist():
        if kind > 2 or factors[kind] is None:
            continue
        if kind == 0:
            pixels.mul_(factors[0])
        else:
            other = _grey(pixels)
            if kind == 1:  # its mean
                other = int(other.sum(dtype=torch.float64).item() / other.numel() + 0.5)
            pixels.sub_(other).mul_(factors[kind]).add_(other)
        pixels.clamp_(0, 255).floor_()
    # torch is slow at float to uint8, and quick by way of int32
    return pixels.to(torch.int32).to(torch.uint8)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (H, W), Pillow's 16-bit weights, whose sums are whole numbers that float32 holds exactly."""
    red, green, blue = pixels
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).mul_(1 / 65536).floor_()


def to_float(image: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1]."""
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def on_pillow(step: Callable, image: torch.Tensor) -> Any:
    """A step that gets an image of Pillow, and whose result becomes a tensor again."""
    result = step(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    return to_tensor(result) if isinstance(result, Image.Image) else result


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image of Pillow -> uint8 (3, H, W), a view of (H, W, 3) as decode_jpeg gives it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
