"""The poolings of image retrieval that GeM is compared with: MAC, SPoC, R-MAC, CroW.

None of them normalises or whitens its result; descriptors are L2-normalised afterwards.

Papers:
    MAC, R-MAC: `Particular object retrieval with integral max-pooling of CNN activations`,
        https://arxiv.org/abs/1511.05879
    SPoC: `Aggregating Deep Convolutional Features for Image Retrieval`, https://arxiv.org/abs/1510.07493
    CroW: `Cross-dimensional Weighting for Aggregated Deep Convolutional Features`, https://arxiv.org/abs/1512.04065
"""
import math

import torch
import torch.nn as nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from .format import at_least_float32, drop_prefix_tokens, spatial_dims
from .gem import gem
from .normalize import l2_normalize


def _region_grid(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
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
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        rows = level + (extra if height > width else 0)
        cols = level + (extra if width > height else 0)
        for i in range(rows):
            for j in range(cols):
                grid.append((i * (height - side) // max(1, rows - 1), j * (width - side) // max(1, cols - 1), side))
    return grid


def _rmac(x: torch.Tensor, levels: int) -> torch.Tensor:
    """(N, H, W, C) -> (N, C)."""
    if has_torch_function_unary(x):  # one node in an fx graph, as in torch.nn.functional
        return handle_torch_function(_rmac, (x,), x, levels)
    y = torch.zeros_like(x[:, 0, 0])
    for top, left, side in _region_grid(x.shape[1], x.shape[2], levels):
        y = y + l2_normalize(x[:, top:top + side, left:left + side].amax((1, 2)))
    return y


def _center_prior(x: torch.Tensor) -> torch.Tensor:
    """(H, W, 1) weights of the cells of an (N, H, W, C) map."""
    if has_torch_function_unary(x):
        return handle_torch_function(_center_prior, (x,), x)
    height, width = x.shape[1], x.shape[2]
    rows = torch.arange(height, device=x.device, dtype=x.dtype) + 0.5 - height / 2
    cols = torch.arange(width, device=x.device, dtype=x.dtype) + 0.5 - width / 2
    sigma = min(height, width) / 6
    return torch.exp(-(rows[:, None] ** 2 + cols ** 2) / (2 * sigma ** 2))[:, :, None]


class _RegionalPool(nn.Module):

    def __init__(self, input_fmt: str = 'NCHW', flatten: bool = True, num_prefix_tokens: int = 0):
        """
        Args:
            input_fmt: 'NCHW', 'NHWC' or 'NLC'.
            flatten: Return (N, C); otherwise the pooled dimensions stay as 1.
            num_prefix_tokens: Leading tokens (class, registers) left out of the pooling, 'NLC' only.
        """
        super().__init__()
        self.dim = spatial_dims(input_fmt, num_prefix_tokens)
        self.input_fmt = input_fmt
        self.flatten = flatten
        self.num_prefix_tokens = num_prefix_tokens

    def _refuse_tokens(self, reason: str) -> None:
        if self.input_fmt == 'NLC':
            raise ValueError(f"{reason} needs the rows and columns of the map: input_fmt 'NCHW' or 'NHWC', not 'NLC'.")

    def _channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """(N, H, W, C), or (N, L, C) without the prefix tokens, in float32 or float64."""
        if self.input_fmt == 'NLC':
            x = drop_prefix_tokens(x, self.num_prefix_tokens)
        elif self.input_fmt == 'NCHW':
            x = x.permute(0, 2, 3, 1)
        return at_least_float32(x)

    def _output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(N, C) in the dtype of the input x, with the pooled dimensions as 1 unless they are flattened."""
        y = y.to(x.dtype)
        if self.flatten:
            return y
        if self.input_fmt == 'NCHW':
            return y[:, :, None, None]
        return y[:, None, None] if self.input_fmt == 'NHWC' else y[:, None]

    def extra_repr(self) -> str:
        return f'input_fmt={self.input_fmt}, flatten={self.flatten}, num_prefix_tokens={self.num_prefix_tokens}'


class MAC(_RegionalPool):
    """Maximum activations of convolutions (Tolias et al. 2016): the maximum of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_fmt == 'NLC':
            x = drop_prefix_tokens(x, self.num_prefix_tokens)
        return gem(x, math.inf, dim=self.dim, keepdim=not self.flatten)


class SPoC(_RegionalPool):
    """Sum-pooled convolutional features (Babenko and Lempitsky 2015): sum_yx a_yx x_cyx.

    a = 1, or with the centre prior a = exp(-d^2 / (2 sigma^2)), d the distance of the cell from the centre of the map
    and sigma a third of the distance from the centre to the closest border.
    """

    def __init__(
            self,
            input_fmt: str = 'NCHW',
            flatten: bool = True,
            num_prefix_tokens: int = 0,
            center_prior: bool = False,
    ):
        super().__init__(input_fmt, flatten, num_prefix_tokens)
        self.center_prior = center_prior
        if center_prior:
            self._refuse_tokens('The centre prior')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._channels_last(x)
        if self.center_prior:
            y = y * _center_prior(y)
        return self._output(y.flatten(1, -2).sum(1), x)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, center_prior={self.center_prior}'


class RMAC(_RegionalPool):
    """Regional maximum activations of convolutions (Tolias et al. 2016), without their PCA.

    Level l covers an H x W map by squares of side 2 min(H, W) / (l + 1), l of them along the shorter side and l + m - 1
    along the longer one; m makes neighbours of level 1 overlap by about 40 %. The channel maxima of each square are
    L2-normalised, and summed over all squares. The grid depends on the size, so an exported graph has a fixed one.

    Example:
        >>> RMAC(levels=3)(torch.ones(2, 8, 7, 7)).shape
        torch.Size([2, 8])
    """

    def __init__(self, input_fmt: str = 'NCHW', flatten: bool = True, num_prefix_tokens: int = 0, levels: int = 3):
        super().__init__(input_fmt, flatten, num_prefix_tokens)
        self._refuse_tokens('R-MAC')
        self.levels = levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._output(_rmac(self._channels_last(x), self.levels), x)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, levels={self.levels}'


class CroW(_RegionalPool):
    """Cross-dimensional weighting (Kalantidis et al. 2016): F_c = I_c sum_u S_u x_cu, made for non-negative maps.

    Spatial weight: S_u = (s_u / ||s||)^(1/2) with s_u = sum_c x_cu, the authors' a = b = 2; a negative s_u counts as 0.
    Channel weight: I_c = log((C eps + sum_k Q_k) / (eps + Q_c)), Q_c the share of positions where the channel is > 0.
    """

    def __init__(
            self,
            input_fmt: str = 'NCHW',
            flatten: bool = True,
            num_prefix_tokens: int = 0,
            eps: float = 1e-6,
    ):
        super().__init__(input_fmt, flatten, num_prefix_tokens)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._channels_last(x).flatten(1, -2)
        s = y.sum(2, keepdim=True).clamp(min=0)
        s = s / torch.linalg.vector_norm(s, dim=1, keepdim=True).clamp(min=1e-12)
        # the root has no gradient at 0
        spatial = torch.where(s > 0, s, torch.ones_like(s)).sqrt() * (s > 0)
        density = (y > 0).to(y.dtype).mean(1)
        eps = self.eps
        channel = torch.log((y.shape[2] * eps + density.sum(1, keepdim=True)) / (density + eps))
        return self._output(channel * (spatial * y).sum(1), x)
