"""What MultiGrain puts into timm's training transforms: colour noise (Berman et al., arXiv 1902.05509), compression."""
import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor, MaybeToTensor
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms as T

from timm_multigrain.images.copies import jpeg

from .fast import on_tensors, to_float

JPEG_QUALITY = 5, 50
_TO_TENSOR = MaybePILToTensor, T.PILToTensor, MaybeToTensor, T.ToTensor

# principal components of the RGB values of ImageNet
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (  # one row for each of R, G, B, one column for each component
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


class Lighting(nn.Module):
    """PCA colour noise: adds sum_j V[c, j] * alpha_j * lambda_j to channel c, alpha_j ~ N(0, std^2), clamps to [0, 1].

    Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", NIPS 2012, section 4.1. As in
    the original implementation of MultiGrain the image is also divided by 1 + std before the clamp, so that training
    images are darker by that factor than validation images.

    Args:
        std: Standard deviation of alpha.

    Raises:
        ValueError: Negative or non-finite std; an image that is neither (..., 3, H, W) nor RGB.
    """

    def __init__(self, std: float = 0.1):
        super().__init__()
        if not (std >= 0 and math.isfinite(std)):
            raise ValueError(f'std is {std}: give a finite number of at least 0, such as 0.1')
        self.std = std

    def forward(
            self,
            image: torch.Tensor | Image.Image,
            alpha: torch.Tensor | None = None,
    ) -> torch.Tensor | Image.Image:
        """(3, H, W) float in [0, 1] -> the same; `alpha` (3,) is drawn from torch's global generator unless given.

        An RGB image of Pillow or a uint8 tensor gives one of its kind, rounded to 8 bits.
        """
        if isinstance(image, Image.Image):
            if image.mode != 'RGB':
                raise ValueError(f'the image is of mode {image.mode}: lighting is made for RGB, convert it')
            pixels = self(torch.from_numpy(np.array(image)).permute(2, 0, 1), alpha)
            return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        if image.dtype == torch.uint8:
            return (self(image.float() / 255, alpha) * 255).round().to(torch.uint8)
        if image.ndim < 3 or image.shape[-3] != 3 or not image.is_floating_point():
            raise ValueError(
                f'the image is {tuple(image.shape)} {image.dtype}: give (3, H, W) floats in [0, 1], as after ToTensor')
        if alpha is None:
            alpha = self.std * torch.randn(3)
        shift = torch.tensor(EIGENVECTORS).to(alpha) @ (alpha * torch.tensor(EIGENVALUES).to(alpha))
        return ((image + shift.to(image)[:, None, None]) / (1 + self.std)).clamp(0, 1)

    def extra_repr(self) -> str:
        return f'std={self.std}'


def insert_lighting(dataset: Dataset, lighting: Lighting) -> None:
    """Put lighting into the transforms that timm's create_loader gave a dataset, where the original has it: after all
    that works on images and before the normalisation."""
    for steps, at in _conversions(dataset):
        steps.insert(at + 1, lighting)


def insert_jpeg(dataset: Dataset, prob: float) -> None:
    """Put compression as JPEG, of a random quality, into the transforms that timm's create_loader gave a dataset: last
    of all that works on images, as in a copy that was edited and saved. ``prob`` is the share of the images.
    """
    step = T.RandomApply([_compress], prob)
    for steps, at in _conversions(dataset):
        steps.insert(at, on_tensors(step) if steps[at] is to_float else step)


def _compress(image: Image.Image) -> Image.Image:
    return jpeg(image, int(torch.randint(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1, ())))


def _conversions(dataset: Dataset) -> Iterator[tuple[list, int]]:
    """The steps of each transform, and where among them images become tensors that the network takes.

    RuntimeError if timm's transforms have no such place.
    """
    composed = getattr(dataset, 'transforms', None)
    for transform in composed if isinstance(composed, (list, tuple)) else [dataset.transform]:
        steps = getattr(transform, 'transforms', [])
        at = next((i for i, step in enumerate(steps) if step is to_float or isinstance(step, _TO_TENSOR)), None)
        if at is None:
            raise RuntimeError(f'no conversion to a tensor found in {transform}, before which more could be put')
        yield steps, at
