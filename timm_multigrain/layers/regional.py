"""The poolings that GeM is compared with: those of image retrieval, MAC, SPoC, R-MAC and CroW, and the class token.

None of them normalises or whitens its result; descriptors are L2-normalised afterwards.

Papers:
    MAC, R-MAC: `Particular object retrieval with integral max-pooling of CNN activations`,
        https://arxiv.org/abs/1511.05879
    SPoC: `Aggregating Deep Convolutional Features for Image Retrieval`, https://arxiv.org/abs/1510.07493
    CroW: `Cross-dimensional Weighting for Aggregated Deep Convolutional Features`, https://arxiv.org/abs/1512.04065
"""
import torch
import torch.nn as nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from .functional import at_least_float32, drop_prefix_tokens, l2_normalize, spatial_dims


class _RegionalPool(nn.Module):
    """A pooling of the (N, H, W, C) or (N, L, C) map that its `pool` gets in float32 or float64. Arguments as GeM's."""

    def __init__(self, input_fmt: str = 'NCHW', flatten: bool = True, num_prefix_tokens: int = 0):
        super().__init__()
        self.dim = spatial_dims(input_fmt, num_prefix_tokens)
        self.input_fmt = input_fmt
        self.flatten = flatten
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if self.input_fmt == 'NLC':
            y = drop_prefix_tokens(x, self.num_prefix_tokens)
        elif self.input_fmt == 'NCHW':
            y = x.permute(0, 2, 3, 1)
        y = self.pool(at_least_float32(y)).to(x.dtype)
        if self.flatten:
            return y
        if self.input_fmt == 'NCHW':
            return y[:, :, None, None]
        return y[:, None, None] if self.input_fmt == 'NHWC' else y[:, None]

    def extra_repr(self) -> str:
        return f'input_fmt={self.input_fmt}, flatten={self.flatten}, num_prefix_tokens={self.num_prefix_tokens}'


class MAC(_RegionalPool):
    """Maximum activations of convolutions (Tolias et al. 2016): the maximum of each channel."""

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, -2).max(1)[0]


class SPoC(_RegionalPool):
    """Sum-pooled convolutional features (Babenko and Lempitsky 2015): the sum of each channel."""

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, -2).sum(1)


class RMAC(_RegionalPool):
    """Regional maximum activations of convolutions (Tolias et al. 2016), without their PCA.

    Level l = 1, 2, 3 covers an H x W map by squares of side 2 min(H, W) / (l + 1), l of them along the shorter side and
    l + m - 1 along the longer one; m makes neighbours of level 1 overlap by about 40 %. The channel maxima of each
    square are L2-normalised, and summed over all squares. The grid depends on the size, so an exported graph has a
    fixed one.

    Example:
        >>> RMAC()(torch.ones(2, 8, 7, 7)).shape
        torch.Size([2, 8])
    """

    def __init__(self, input_fmt: str = 'NCHW', flatten: bool = True, num_prefix_tokens: int = 0):
        super().__init__(input_fmt, flatten, num_prefix_tokens)
        if input_fmt == 'NLC':
            raise ValueError("R-MAC needs the rows and columns of the map: input_fmt 'NCHW' or 'NHWC', not 'NLC'.")

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return _rmac(x)


def _rmac(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, C)."""
    if has_torch_function_unary(x):  # one node in an fx graph, as in torch.nn.functional
        return handle_torch_function(_rmac, (x,), x)
    y = torch.zeros_like(x[:, 0, 0])
    for top, left, side in _region_grid(x.shape[1], x.shape[2]):
        y = y + l2_normalize(x[:, top:top + side, left:left + side].amax((1, 2)))
    return y


def _region_grid(height: int, width: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of the regions of R-MAC, from the largest to the smallest."""
    short, long = min(height, width), max(height, width)
    extra = 0
    if long > short:
        # regions of side `short` along the longer side, less one, for the overlap that is closest to 40 %
        shift = (long - short) / short
        extra = max(1, int(shift / 0.6))
        if abs(shift / (extra + 1) - 0.6) < abs(shift / extra - 0.6):
            extra += 1
    grid: list[tuple[int, int, int]] = []
    for level in (1, 2, 3):
        side = max(1, 2 * short // (level + 1))
        rows = level + (extra if height > width else 0)
        cols = level + (extra if width > height else 0)
        for i in range(rows):
            for j in range(cols):
                grid.append((i * (height - side) // max(1, rows - 1), j * (width - side) // max(1, cols - 1), side))
    return grid


class CroW(_RegionalPool):
    """Cross-dimensional weighting (Kalantidis et al. 2016): F_c = I_c sum_u S_u x_cu, made for non-negative maps.

    Spatial weight: S_u = (s_u / ||s||)^(1/2) with s_u = sum_c x_cu, the authors' a = b = 2; a negative s_u counts as 0.
    Channel weight: I_c = log((C eps + sum_k Q_k) / (eps + Q_c)), Q_c the share of positions where the channel is > 0.
    """

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, -2)
        s = x.sum(2, keepdim=True).clamp(min=0)
        s = s / torch.linalg.vector_norm(s, dim=1, keepdim=True).clamp(min=1e-12)
        # the root has no gradient at 0
        spatial = torch.where(s > 0, s, torch.ones_like(s)).sqrt() * (s > 0)
        density = (x > 0).to(x.dtype).mean(1)
        eps = 1e-6
        channel = torch.log((x.shape[2] * eps + density.sum(1, keepdim=True)) / (density + eps))
        return channel * (spatial * x).sum(1)


class ClassToken(nn.Module):
    """The first token of an (N, L, C) map: what DINOv2, DINOv3 and CLIP were trained to describe an image by."""

    def __init__(self, input_fmt: str = 'NLC', flatten: bool = True, num_prefix_tokens: int = 1):
        super().__init__()
        if input_fmt != 'NLC' or num_prefix_tokens < 1:
            raise ValueError(f'A class token is one of tokens: a map of format {input_fmt!r} with {num_prefix_tokens} '
                             'prefix tokens does not have one.')
        self.flatten = flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] if self.flatten else x[:, :1]

    def extra_repr(self) -> str:
        return f'flatten={self.flatten}'
