"""The NASNets of MultiGrain's official checkpoints: timm's PNASNet-5-Large and NASNet cells, the original's padding.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition", arXiv 1707.07012.

The weights are TensorFlow's, ported to PyTorch with fixed amounts of padding, which differ from the 'same' padding of
TensorFlow and timm. A layer of stride 2 and kernel k pads k // 2 on every side, so that N positions become ceil(N / 2);
but some reduction cells pad as 'same' padding does for an even N whatever N is, so that N positions become
floor(N / 2). Behind such a cell the map of the layer before it, halved to ceil(N / 2), is larger where N is odd: each
sum and concatenation keeps the positions that all of its terms have, from the top left corner.
"""
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import NASNetALarge, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.nasnet import ReductionCell0


class FloorConv2d(nn.Conv2d):
    """Convolution of stride 2 that pads k - 2 positions, the odd one behind: 'same' padding of an even size.

    Shape:
        (N, C, H, W) to (N, out_channels, H // 2, W // 2).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = max(self.kernel_size[0] // 2 - 1, 0)
        after = self.kernel_size[0] - 2 - before  # -1 for a 1x1 kernel: a last position without partner is left out
        x = F.pad(x, [before, after, before, after])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def crop_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The top left corner of ``x`` (N, C, H, W), of the height and width of ``like``."""
    # a slice or narrow would be exported for the sizes of the example alone, with or without a position to cut
    return F.pad(x, [0, like.shape[3] - x.shape[3], 0, like.shape[2] - x.shape[2]])


# Other classes for timm's cells, with the same layers. The left input of a cropping cell may be one position larger
# than its right one: what is computed from the left input alone is cropped where it meets the rest.

class _CroppingPNASCell(nn.Module):
    """A normal cell of PNASNet."""

    def forward(self, x_left: torch.Tensor, x_right: torch.Tensor) -> torch.Tensor:
        left = self.conv_prev_1x1(x_left)
        right = self.conv_1x1(x_right)
        sum_0 = self.comb_iter_0_left(left) + self.comb_iter_0_right(left)
        sum_1 = self.comb_iter_1_left(right) + self.comb_iter_1_right(right)
        sum_2 = self.comb_iter_2_left(right) + self.comb_iter_2_right(right)
        sum_3 = self.comb_iter_3_left(sum_2) + self.comb_iter_3_right(right)
        sum_4 = crop_like(self.comb_iter_4_left(left), right) + right
        return torch.cat([crop_like(sum_0, right), sum_1, sum_2, sum_3, sum_4], 1)


class _CroppingNASCell(nn.Module):
    """The first cell of NASNet behind a reduction cell."""

    def forward(self, x: torch.Tensor, x_prev: torch.Tensor) -> torch.Tensor:
        prev = self.act(x_prev)
        left = self.final_path_bn(torch.cat([self.path_1(prev), self.path_2(prev)], 1))
        right = self.conv_1x1(x)
        kept = crop_like(left, right)
        return torch.cat([
            kept,
            self.comb_iter_0_left(right) + crop_like(self.comb_iter_0_right(left), right),
            crop_like(self.comb_iter_1_left(left) + self.comb_iter_1_right(left), right),
            self.comb_iter_2_left(right) + kept,
            crop_like(self.comb_iter_3_left(left) + self.comb_iter_3_right(left), right),
            self.comb_iter_4_left(right) + right,
        ], 1)


class _PlainReductionCell(nn.Module):
    """A reduction cell of NASNet that the next cell sees as any other.

    After a cell of its own class, timm's forward_intermediates keeps the left input of NASNet-A-Large.
    """
    forward = ReductionCell0.forward


def restore_padding(trunk: nn.Module) -> None:
    """Give timm's PNASNet-5-Large the original's padding, in place; parameters and their names stay.

    Outputs stay the same at sides of 11 modulo 32 (331, 523), where the two paddings agree. `cell_4` rounds down.

    Args:
        trunk: A whole timm.models.PNASNet5Large.
    """
    _pad_cells(trunk, round_down=('cell_4',))
    trunk.cell_5.__class__ = _CroppingPNASCell


def _pad_cells(trunk: nn.Module, round_down: Iterable[str]) -> None:
    """Fix the padding of all layers of stride 2, in `round_down` cells so that sizes are rounded down."""
    for name, module in list(trunk.named_modules()):
        if 'cell_' not in name or getattr(module, 'stride', 1) not in (2, (2, 2)):
            continue
        floor = name.partition('.')[0] in round_down
        if isinstance(module, nn.Conv2d):
            module.__class__ = FloorConv2d if floor else nn.Conv2d
            module.padding = (module.kernel_size[0] // 2,) * 2
            continue
        # without padding in front, a window that sticks out behind is cut there, which is what ceil_mode allows
        if isinstance(module, nn.MaxPool2d):
            new = nn.MaxPool2d(3, stride=2, padding=0 if floor else 1, ceil_mode=floor)
        elif floor and module.kernel_size in (3, (3, 3)):
            new = nn.AvgPool2d(3, stride=2, ceil_mode=True, count_include_pad=False)
        else:  # the 1x1 pooling that halves the left input of a cell; symmetric already
            continue
        parent, _, leaf = name.rpartition('.')
        setattr(trunk.get_submodule(parent), leaf, new.train(module.training))


class NASNetAMobile(NASNetALarge):
    """NASNet-A-Mobile (4 @ 1056), which timm does not have: NASNet-A-Large with 4 normal cells in a row instead of 6.

    Args:
        **kwargs: As timm's NASNetALarge: num_classes, in_chans, drop_rate, global_pool, ...

    Shape:
        (N, in_chans, H, W) float to (N, num_classes); the map has 1056 channels.
    """

    def __init__(self, **kwargs):
        super().__init__(stem_size=32, channel_multiplier=2, num_features=1056, pad_type='', **kwargs)
        for i in (4, 5, 10, 11, 16, 17):
            name = f'cell_{i}'
            delattr(self, name)
            self.layer_names.remove(name)
        self.feature_ends = [self.layer_names.index(name) for name in (
            'conv0', 'cell_stem_0', 'cell_3', 'cell_9', 'cell_15')]
        for info, channels in zip(self.feature_info, (32, 44, 264, 528, 1056), strict=True):
            info['num_chs'] = channels
        _pad_cells(self, round_down=('cell_stem_1', 'reduction_cell_0', 'reduction_cell_1'))
        self.reduction_cell_0.__class__ = self.reduction_cell_1.__class__ = _PlainReductionCell
        for cell in (self.cell_0, self.cell_6, self.cell_12):
            cell.__class__ = _CroppingNASCell

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to the (N, 1056, h, w) map; a pruned network's to its last map, as timm's does."""
        conv0 = self.conv0(x)
        if self.cell_stem_0 is None:
            return conv0
        stem_0 = self.cell_stem_0(conv0)
        if self.cell_stem_1 is None:
            return F.relu(stem_0)
        x_0 = self.cell_stem_1(conv0, stem_0)
        x_1 = self.cell_0(x_0, stem_0)
        x_2 = self.cell_1(x_1, x_0)
        x_3 = self.cell_2(x_2, x_1)
        x_4 = self.cell_3(x_3, x_2)
        if self.reduction_cell_0 is None:
            return F.relu(x_4)
        x_5 = self.reduction_cell_0(x_4, x_3)
        x_6 = self.cell_6(x_5, x_4)
        x_7 = self.cell_7(x_6, x_5)
        x_8 = self.cell_8(x_7, x_6)
        x_9 = self.cell_9(x_8, x_7)
        if self.reduction_cell_1 is None:
            return F.relu(x_9)
        x_10 = self.reduction_cell_1(x_9, x_8)
        x_11 = self.cell_12(x_10, x_9)
        x_12 = self.cell_13(x_11, x_10)
        x_13 = self.cell_14(x_12, x_11)
        return self.act(self.cell_15(x_13, x_12))


default_cfgs = generate_default_cfgs({
    'nasnetamobile.untrained': {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875,
        'interpolation': 'bilinear', 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
        'first_conv': 'conv0.conv', 'classifier': 'last_linear', 'paper_ids': 'arXiv:1707.07012',
    },
})


@register_model
def nasnetamobile(pretrained: bool = False, **kwargs) -> NASNetAMobile:
    """NASNet-A-Mobile, without weights of its own."""
    return build_model_with_cfg(
        NASNetAMobile, 'nasnetamobile', pretrained, feature_cfg=dict(feature_cls='hook', no_rewrite=True), **kwargs)
