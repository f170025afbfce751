"""NASNet-A-Mobile (4 @ 1056), the trunk of one of MultiGrain's official checkpoints. timm has NASNet-A-Large only.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition", arXiv 1707.07012,
figure 4. Each cell takes the outputs of the two layers before it. The names below are those of the checkpoint; its
padding is described in nasnet_padding, the cells are in nasnet_cells.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, create_classifier, get_device_dtype

from .nasnet_cells import NormalCell, ReductionCell, norm

__all__ = ['NASNetAMobile']

_STEM = 32
_CELLS = {  # name: channels of each of its branches
    'cell_stem_0': 11, 'cell_stem_1': 22,
    'cell_0': 44, 'cell_1': 44, 'cell_2': 44, 'cell_3': 44,
    'reduction_cell_0': 88,
    'cell_6': 88, 'cell_7': 88, 'cell_8': 88, 'cell_9': 88,
    'reduction_cell_1': 176,
    'cell_12': 176, 'cell_13': 176, 'cell_14': 176, 'cell_15': 176,
}
_REDUCTIONS = ('cell_stem_0', 'cell_stem_1', 'reduction_cell_0', 'reduction_cell_1')
_TAPS = ('conv0', 'cell_stem_0', 'cell_3', 'cell_9', 'cell_15')  # the last layer of each resolution
_FEATURE_INFO = (
    dict(num_chs=32, reduction=2, module='conv0'),
    dict(num_chs=44, reduction=4, module='cell_stem_1.conv_1x1.act'),
    dict(num_chs=264, reduction=8, module='reduction_cell_0.conv_1x1.act'),
    dict(num_chs=528, reduction=16, module='reduction_cell_1.conv_1x1.act'),
    dict(num_chs=1056, reduction=32, module='act'),
)


class NASNetAMobile(nn.Module):
    """NASNet-A-Mobile with timm's model verbs.

    Args:
        num_classes: Classes, 0 for none.
        in_chans: Channels of the input image.
        drop_rate: Dropout before the classifier.
        global_pool: Any pooling of timm, '' for the map.

    Shape:
        (N, in_chans, H, W) float to (N, num_classes); the map has 1056 channels.
    """

    def __init__(
            self,
            num_classes: int = 1000,
            in_chans: int = 3,
            drop_rate: float = 0.,
            global_pool: str = 'avg',
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.conv0 = ConvNormAct(
            in_chans, _STEM, kernel_size=3, stride=2, padding=0, norm_layer=norm, apply_act=False, **dd)
        prev_chs = x_chs = _STEM
        after_reduction = False
        for name, chs in _CELLS.items():
            reduction = name in _REDUCTIONS
            # the first cell has one input only, and the one padding of the reduction cells that rounds up
            first = dict(project_prev=False, floor=False) if name == 'cell_stem_0' else {}
            cell = (ReductionCell if reduction else NormalCell)(
                prev_chs, x_chs, chs, halve_prev=after_reduction, **first, **dd)
            self.add_module(name, cell)
            prev_chs, x_chs, after_reduction = x_chs, (4 if reduction else 6) * chs, reduction
        self.act = nn.ReLU()
        self.layer_names = ['conv0', *_CELLS]
        self.feature_info = [dict(info) for info in _FEATURE_INFO]
        self.num_features = x_chs
        self.global_pool, self.head_drop, self.last_linear = create_classifier(
            x_chs, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = x_chs * self.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer decay: the stem, then one a cell."""
        return dict(
            stem=r'^conv0|^cell_stem_[01]',
            blocks=[(r'^cell_(\d+)', None), (r'^reduction_cell_0', (5,)), (r'^reduction_cell_1', (11,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the backward, cell by cell."""
        for module in self.modules():
            if isinstance(module, (NormalCell, ReductionCell)):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.last_linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.last_linear = create_classifier(self.num_features, num_classes, pool_type=pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.last_linear.train(self.training)

    @torch.jit.ignore
    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The last map of each resolution, activated but for the first one; arguments as in timm."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} is not what this model gives: use 'NCHW'.")
        taken = _taken(indices)
        names = self.layer_names
        if stop_early:
            names = names[:names.index(_TAPS[max(taken)]) + 1]
        intermediates = []
        x = prev = self.conv0(x)
        for name in names:
            if name != 'conv0':
                prev, x = x, getattr(self, name)(prev, x)
            if name in _TAPS and _TAPS.index(name) in taken:
                intermediates.append(x if name == 'conv0' else F.relu(x))
        if intermediates_only:
            return intermediates
        return (x if names[-1] == 'conv0' else F.relu(x)), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop the layers behind the last of these maps; arguments and result as in timm."""
        taken = _taken(indices)
        last = self.layer_names.index(_TAPS[max(taken)])
        pruned = self.layer_names[last + 1:]
        for name in pruned:
            setattr(self, name, None)
        self.layer_names = self.layer_names[:last + 1]
        if pruned:
            self.num_features = self.feature_info[max(taken)]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to the (N, 1056, h, w) map."""
        conv0 = self.conv0(x)
        if self.cell_stem_0 is None:  # pruned behind one of the intermediate maps
            return conv0
        stem_0 = self.cell_stem_0(conv0, conv0)
        if self.cell_stem_1 is None:
            return self.act(stem_0)
        stem_1 = self.cell_stem_1(conv0, stem_0)
        x_0 = self.cell_0(stem_0, stem_1)
        x_1 = self.cell_1(stem_1, x_0)
        x_2 = self.cell_2(x_0, x_1)
        x_3 = self.cell_3(x_1, x_2)
        if self.reduction_cell_0 is None:
            return self.act(x_3)
        reduced_0 = self.reduction_cell_0(x_2, x_3)
        x_6 = self.cell_6(x_3, reduced_0)
        x_7 = self.cell_7(reduced_0, x_6)
        x_8 = self.cell_8(x_6, x_7)
        x_9 = self.cell_9(x_7, x_8)
        if self.reduction_cell_1 is None:
            return self.act(x_9)
        reduced_1 = self.reduction_cell_1(x_8, x_9)
        x_12 = self.cell_12(x_9, reduced_1)
        x_13 = self.cell_13(reduced_1, x_12)
        x_14 = self.cell_14(x_12, x_13)
        x_15 = self.cell_15(x_13, x_14)
        return self.act(x_15)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map to (N, num_classes) logits, or with ``pre_logits`` to the pooled features."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.last_linear(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _taken(indices: int | list[int] | None) -> list[int]:
    """The chosen intermediate maps, as timm counts them: all, the last n, or a list that may count from the end."""
    n = len(_TAPS)
    if indices is None:
        return list(range(n))
    chosen = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not chosen or not all(-n <= i < n for i in chosen):
        raise ValueError(f'indices={indices!r} do not name any of the {n} intermediate maps: use 1 to {n} for the last '
                         f'ones, or a list of {-n} to {n - 1}.')
    return [i % n for i in chosen]
