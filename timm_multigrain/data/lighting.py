"""Lighting: PCA colour noise of Krizhevsky et al., "ImageNet classification with deep convolutional neural networks",
NIPS 2012, section 4.1, as used by Berman et al., "MultiGrain", arXiv 1902.05509.
"""
import math

import torch
from torch import nn

# principal components of the RGB values of ImageNet
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (  # one row for each of R, G, B, one column for each component
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


class Lighting(nn.Module):
    """Adds sum_j V[c, j] * alpha_j * lambda_j to channel c, alpha_j ~ N(0, std^2), and clamps to [0, 1].

    As in the original implementation the image is also divided by 1 + std before the clamp, so that training images
    are darker by that factor than validation images.

    Args:
        std: Standard deviation of alpha.
        rescale: Divide by 1 + std.

    Raises:
        ValueError: Negative or non-finite std; an image that is not (..., 3, H, W) floating point.
    """

    def __init__(self, std: float = 0.1, rescale: bool = True):
        super().__init__()
        if not (std >= 0 and math.isfinite(std)):
            raise ValueError(f'std is {std}: give a finite number of at least 0, such as 0.1')
        self.std = std
        self.rescale = rescale

    def forward(self, image: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
        """(3, H, W) float in [0, 1] -> the same; `alpha` (3,) is drawn from torch's global generator unless given."""
        if image.ndim < 3 or image.shape[-3] != 3 or not image.is_floating_point():
            raise ValueError(
                f'the image is {tuple(image.shape)} {image.dtype}: give (3, H, W) floats in [0, 1], as after ToTensor')
        if alpha is None:
            alpha = self.std * torch.randn(3)
        shift = torch.tensor(EIGENVECTORS).to(alpha) @ (alpha * torch.tensor(EIGENVALUES).to(alpha))
        image = image + shift.to(image)[:, None, None]
        if self.rescale:
            image = image / (1 + self.std)
        return image.clamp(0, 1)

    def extra_repr(self) -> str:
        return f'std={self.std}, rescale={self.rescale}'
