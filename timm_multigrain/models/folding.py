"""Batch norms folded into the convolutions before them, for inference."""
import copy

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ['fold_batch_norm']

_SIDE = 64  # pixels of the image it is run with
_CONVS = (nn.Conv2d, Conv2dSame)  # these very types: subclasses may change their weights as they run


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode whose batch norms are part of the convolutions before them.

    Which follows which is found by running the model once. The copy is compared with the model; where it is not the
    same function up to rounding, the copy is the model as it is.

    Args:
        model: Model that takes (N, in_chans, H, W) images. It is not changed.
    """
    model = copy.deepcopy(model).eval()
    parameter = next(model.parameters())
    size = model.input_sizes.nearest(_SIDE, _SIDE) if hasattr(model, 'input_sizes') else (_SIDE, _SIDE)
    x = torch.randn(
        1, getattr(model, 'in_chans', 3), *size, generator=torch.Generator().manual_seed(0)).to(parameter)
    with torch.inference_mode(False), torch.no_grad():
        try:
            expected, pairs = _trace(model, x)
            folded = _fold(copy.deepcopy(model), pairs)
            if torch.allclose(folded(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()):
                return folded
        except (RuntimeError, AssertionError, ValueError):
            pass
    return model


def _trace(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """The model's output, and the names of each convolution and the batch norm that takes its output."""
    made, pairs, calls = {}, [], []

    def after_conv(name):
        def hook(module, args, output):
            calls.append(name)
            made[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id
        return hook

    def before_norm(name):
        def hook(module, args):
            calls.append(name)
            if id(args[0]) in made:
                pairs.append((made[id(args[0])][0], name))
        return hook

    handles = []
    for name, module in model.named_modules():
        if type(module) in _CONVS:
            handles.append(module.register_forward_hook(after_conv(name)))
        elif _is_norm(module):
            handles.append(module.register_forward_pre_hook(before_norm(name)))
    try:
        return model(x), [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)]
    finally:
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats


def _fold(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        parent, _, name = norm_name.rpartition('.')
        setattr(model.get_submodule(parent), name, rest)
    return model.eval()
