"""The padding of the original's NASNets, which differs from TensorFlow's and timm's 'same' padding.

The weights are TensorFlow's, ported to PyTorch with fixed amounts of padding. A layer of stride 2 and kernel k pads
k // 2 on every side, so that N positions become ceil(N / 2); but some reduction cells pad as 'same' padding does for
an even N whatever N is, so that N positions become floor(N / 2). Behind such a cell the map of the layer before it,
halved to ceil(N / 2), is larger where N is odd: each sum and concatenation keeps the positions that all of its terms
have, from the top left corner.
"""
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['FloorConv2d', 'crop_like', 'floor_pool2d', 'restore_padding']


class FloorConv2d(nn.Conv2d):
    """Convolution of stride 2 that pads k - 2 positions, the odd one behind: 'same' padding of an even size.

    Shape:
        (N, C, H, W) to (N, out_channels, H // 2, W // 2).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 2, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, **kwargs)
        k = self.kernel_size[0]
        self.before = max(k // 2 - 1, 0)
        self.after = k - 2 - self.before  # -1 for a 1x1 kernel: a last position without partner is left out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, [self.before, self.after, self.before, self.after])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def floor_pool2d(pool: Callable[..., nn.Module]) -> nn.Module:
    """A 3x3 pooling (nn.MaxPool2d or nn.AvgPool2d) of stride 2 with the windows and output size of `FloorConv2d`."""
    # without padding in front, a window that sticks out behind is cut there, which is what ceil_mode allows
    return pool(3, stride=2, padding=0, ceil_mode=True)


def crop_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The top left corner of ``x`` (N, C, H, W), of the height and width of ``like``."""
    # a slice or narrow would be exported for the sizes of the example alone, with or without a position to cut
    return F.pad(x, [0, like.shape[3] - x.shape[3], 0, like.shape[2] - x.shape[2]])


class _CroppingCell(nn.Module):
    """A normal cell of timm's PNASNet whose left input may be one position larger than its right one.

    What is computed from the left input alone is computed in full and cropped where it meets the rest.
    """

    def __init__(self, cell: nn.Module):
        super().__init__()
        for name, child in cell.named_children():
            self.add_module(name, child)

    def forward(self, x_left: torch.Tensor, x_right: torch.Tensor) -> torch.Tensor:
        left = self.conv_prev_1x1(x_left)
        right = self.conv_1x1(x_right)
        sum_0 = self.comb_iter_0_left(left) + self.comb_iter_0_right(left)
        sum_1 = self.comb_iter_1_left(right) + self.comb_iter_1_right(right)
        sum_2 = self.comb_iter_2_left(right) + self.comb_iter_2_right(right)
        sum_3 = self.comb_iter_3_left(sum_2) + self.comb_iter_3_right(right)
        sum_4 = crop_like(self.comb_iter_4_left(left), right) + right
        return torch.cat([crop_like(sum_0, right), sum_1, sum_2, sum_3, sum_4], 1)


def restore_padding(trunk: nn.Module) -> None:
    """Give timm's PNASNet-5-Large the original's padding, in place; parameters and their names stay.

    Outputs stay the same at sides of 11 modulo 32 (331, 523), where the two paddings agree. `cell_4` rounds down.

    Args:
        trunk: A whole timm.models.PNASNet5Large.
    """
    for name, module in list(trunk.named_modules()):
        cell, _, path = name.partition('.')
        if not cell.startswith('cell_') or getattr(module, 'stride', 1) not in (2, (2, 2)):
            continue
        rounds_down = cell == 'cell_4'
        if isinstance(module, nn.Conv2d):
            new = _rebuild_conv(module, rounds_down)
        elif isinstance(module, nn.MaxPool2d):
            new = floor_pool2d(nn.MaxPool2d) if rounds_down else nn.MaxPool2d(3, stride=2, padding=1)
        else:  # the 1x1 pooling that halves the left input of a cell
            continue
        parent, _, leaf = path.rpartition('.')
        setattr(trunk.get_submodule(f'{cell}.{parent}' if parent else cell), leaf, new.train(module.training))
    trunk.cell_5 = _CroppingCell(trunk.cell_5).train(trunk.cell_5.training)


def _rebuild_conv(conv: nn.Conv2d, rounds_down: bool) -> nn.Conv2d:
    kwargs = dict(stride=2, groups=conv.groups, bias=False, device='meta')
    size = conv.in_channels, conv.out_channels, conv.kernel_size[0]
    new = FloorConv2d(*size, **kwargs) if rounds_down else nn.Conv2d(*size, padding=size[2] // 2, **kwargs)
    new.weight = conv.weight
    return new
