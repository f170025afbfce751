"""The two cells of NASNet-A: sums of separable convolutions and poolings of the last two layers' outputs, concatenated.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition", arXiv 1707.07012,
figure 4. Modules with parameters are named comb_iter_<sum>_<side>, as in the ported TensorFlow weights.
"""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
from timm.models import checkpoint

from .nasnet_padding import FloorConv2d, crop_like, floor_pool2d

__all__ = ['NormalCell', 'ReductionCell', 'norm']

norm = partial(nn.BatchNorm2d, eps=1e-3)
_avg_pool = partial(nn.AvgPool2d, count_include_pad=False)


def _sequence(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _project(in_chs: int, out_chs: int, **dd) -> nn.Sequential:
    return _sequence(act=nn.ReLU(), conv=nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd), bn=norm(out_chs, **dd))


def _separable(in_chs: int, out_chs: int, kernel: int, stride: int = 1, floor: bool = False, **dd) -> nn.Sequential:
    """ReLU, depthwise and pointwise convolution, norm; twice, the stride in the first. ``floor`` rounds sizes down."""
    depthwise = FloorConv2d if floor else partial(nn.Conv2d, padding=kernel // 2)
    same = partial(nn.Conv2d, bias=False, **dd)
    return _sequence(
        act_1=nn.ReLU(),
        separable_1=_sequence(
            depthwise_conv2d=depthwise(in_chs, in_chs, kernel, stride=stride, groups=in_chs, bias=False, **dd),
            pointwise_conv2d=same(in_chs, out_chs, 1)),
        bn_sep_1=norm(out_chs, **dd),
        act_2=nn.ReLU(),
        separable_2=_sequence(
            depthwise_conv2d=same(out_chs, out_chs, kernel, padding=kernel // 2, groups=out_chs),
            pointwise_conv2d=same(out_chs, out_chs, 1)),
        bn_sep_2=norm(out_chs, **dd),
    )


class _Cell(nn.Module):
    """Common part of the cells: both inputs are brought to the same channels and resolution.

    Args:
        prev_chs: Channels of the layer before the last one.
        in_chs: Channels of the last layer.
        chs: Channels of every branch.
        halve_prev: The last layer reduced the resolution, so the one before it has to be.
        project_prev: Project the layer before the last one; without, it enters as it is.

    Shape:
        (N, prev_chs, H', W') and (N, in_chs, H, W) to a map of the same H, W, or half of it.
    """
    halve_prev: torch.jit.Final[bool]

    def __init__(self, prev_chs: int, in_chs: int, chs: int, halve_prev: bool, project_prev: bool = True, **dd):
        super().__init__()
        self.grad_checkpointing = False
        self.halve_prev = halve_prev
        self.conv_1x1 = _project(in_chs, chs, **dd)
        if halve_prev:
            half = partial(nn.Conv2d, prev_chs, chs // 2, 1, bias=False, **dd)
            self.act = nn.ReLU()
            self.path_1 = _sequence(avgpool=nn.AvgPool2d(1, stride=2), conv=half())
            self.path_2 = _sequence(pad=nn.ZeroPad2d((-1, 1, -1, 1)), avgpool=nn.AvgPool2d(1, stride=2), conv=half())
            self.final_path_bn = norm(chs, **dd)
        else:
            self.conv_prev_1x1 = _project(prev_chs, chs, **dd) if project_prev else nn.Identity()

    def fit_prev(self, prev: torch.Tensor) -> torch.Tensor:
        if self.halve_prev:
            prev = self.act(prev)
            return self.final_path_bn(torch.cat([self.path_1(prev), self.path_2(prev)], 1))
        return self.conv_prev_1x1(prev)

    def forward(self, prev: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.combine, prev, x)
        return self.combine(prev, x)


class NormalCell(_Cell):
    """Keeps the resolution, 6 * chs channels.

    The layer before the last one, once halved, may be one position larger than the last: its terms are computed in full
    and cropped where they meet the others.
    """

    def __init__(self, prev_chs: int, in_chs: int, chs: int, halve_prev: bool, **dd):
        super().__init__(prev_chs, in_chs, chs, halve_prev, **dd)
        self.comb_iter_0_left = _separable(chs, chs, 5, **dd)
        self.comb_iter_0_right = _separable(chs, chs, 3, **dd)
        self.comb_iter_1_left = _separable(chs, chs, 5, **dd)
        self.comb_iter_1_right = _separable(chs, chs, 3, **dd)
        self.comb_iter_4_left = _separable(chs, chs, 3, **dd)
        self.avg_pool = _avg_pool(3, stride=1, padding=1)

    def combine(self, prev: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        prev, x = self.fit_prev(prev), self.conv_1x1(x)
        kept = self.crop(prev, x)
        return torch.cat([
            kept,
            self.comb_iter_0_left(x) + self.crop(self.comb_iter_0_right(prev), x),
            self.crop(self.comb_iter_1_left(prev) + self.comb_iter_1_right(prev), x),
            self.avg_pool(x) + kept,
            2 * self.crop(self.avg_pool(prev), x),
            self.comb_iter_4_left(x) + x,
        ], 1)

    def crop(self, prev: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return crop_like(prev, x) if self.halve_prev else prev


class ReductionCell(_Cell):
    """Halves the resolution, 4 * chs channels; ``floor`` rounds odd sizes down."""

    def __init__(
            self, prev_chs: int, in_chs: int, chs: int, halve_prev: bool, project_prev: bool = True,
            floor: bool = True, **dd):
        super().__init__(prev_chs, in_chs, chs, halve_prev, project_prev, **dd)
        other = chs if project_prev else prev_chs
        reduce = partial(_separable, stride=2, floor=floor, **dd)
        self.comb_iter_0_left = reduce(chs, chs, 5)
        self.comb_iter_0_right = reduce(other, chs, 7)
        self.comb_iter_1_right = reduce(other, chs, 7)
        self.comb_iter_2_right = reduce(other, chs, 5)
        self.comb_iter_4_left = _separable(chs, chs, 3, **dd)
        self.max_pool = floor_pool2d(nn.MaxPool2d) if floor else nn.MaxPool2d(3, stride=2, padding=1)
        self.avg_pool = floor_pool2d(_avg_pool) if floor else _avg_pool(3, stride=2, padding=1)
        self.avg_pool_same = _avg_pool(3, stride=1, padding=1)

    def combine(self, prev: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        prev, x = self.fit_prev(prev), self.conv_1x1(x)
        largest = self.max_pool(x)
        sum_0 = self.comb_iter_0_left(x) + self.comb_iter_0_right(prev)
        sum_1 = largest + self.comb_iter_1_right(prev)
        sum_2 = self.avg_pool(x) + self.comb_iter_2_right(prev)
        return torch.cat([sum_1, sum_2, self.avg_pool_same(sum_0) + sum_1, self.comb_iter_4_left(sum_0) + largest], 1)
