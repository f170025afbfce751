"""Any timm model as a trunk: created without classifier, with or without its pooling, its map, its sizes, its
configuration, its batch norms folded.
"""
import copy
import difflib
import math
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models import get_model_traits
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import nasnet

_KEPT = ('input_size', 'min_input_size', 'fixed_input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std')


class FeatureMap(NamedTuple):
    """What a trunk gives."""
    format: str  # 'NCHW', 'NHWC' or 'NLC'; 'NC' of a trunk that pools
    channels: int
    prefix_tokens: int = 0  # leading class and register tokens of an NLC map
    class_token: bool = False  # whether the first of them is one


class InputSizes(NamedTuple):
    """Image sizes that a trunk can take."""
    step: int | None  # multiples of this many pixels, for each side; None if `size` alone
    size: tuple[int, int]  # (H, W) that the trunk was built for

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size that the trunk can take."""
        if self.step is None:
            return self.size
        height, width = (max(1, (side + self.step // 2) // self.step) * self.step for side in (height, width))
        return height, width


def create_trunk(
        name: str,
        pretrained: bool | str = False,
        in_chans: int = 3,
        global_pool: str | None = '',
        **kwargs,
) -> nn.Module:
    """Create a timm model that gives its last feature map instead of logits, or with a ``global_pool`` of timm (None:
    the model's own) what its head pools that to.

    PNASNet-5-Large gets the original's padding, and transformers take images of any size where timm can make them. The
    name may have a tag or a source ('hf-hub:...'), `pretrained` may be a tag.
    """
    if isinstance(pretrained, str):
        name = f'{name.split(".")[0]}.{pretrained}'
    if ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f' Did you mean {", ".join(near)}?' if near else ' timm.list_models() lists the valid names.'
        raise ValueError(f'Unknown trunk {name!r}.{hint}')
    if name.startswith('multigrain'):
        raise ValueError(f'Trunk {name!r} is a MultiGrain model itself: name the timm model inside it.')
    kwargs = {'pretrained': bool(pretrained), 'num_classes': 0, 'in_chans': in_chans, **kwargs}
    if global_pool is not None:
        kwargs['global_pool'] = global_pool
    # sizes that not every model has, and no dropout of the embedding: that belongs to our classifier
    optional = {'dynamic_img_size': True, 'drop_rate': 0.}
    try:
        trunk = _create(name, {**optional, **kwargs}, [key for key in optional if key not in kwargs])
    except AssertionError as e:
        how = f'with global_pool={global_pool!r}' if global_pool else 'without its pooling'
        raise ValueError(f'Trunk {name!r} cannot be built {how} ({e}): choose another pooling; global_pool=\'trunk\' '
                         'is its own.') from e
    if global_pool == 'map' and getattr(trunk, 'attn_pool', None) is None:
        raise ValueError(f"Trunk {name!r} cannot have timm's attention pooling: choose 'trunk', its own pooling, or "
                         "'gem'.")
    if isinstance(trunk, timm.models.PNASNet5Large):
        nasnet.restore_padding(trunk)
    return trunk


def _create(name: str, kwargs: dict, optional: list[str]) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as e:
        unknown = next((key for key in optional if f"'{key}'" in str(e)), None)
        if unknown is None:
            raise
        return _create(name, {k: v for k, v in kwargs.items() if k != unknown}, [k for k in optional if k != unknown])


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy that may get another head, with the very parameters and buffers of the module."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def probe_trunk(trunk: nn.Module, name: str, pooled: bool = False) -> FeatureMap:
    """Find format and channels of what a trunk gives by one forward of shapes only (meta device: no arithmetic)."""
    try:
        x = _meta_forward(trunk, own_size(trunk))
    except _FAILURES as e:
        raise ValueError(f'Trunk {name!r} does not run without its classifier: {e}') from e
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else ()
    features = {trunk.num_features, getattr(trunk, 'head_hidden_size', None)} - {None}
    prefix = getattr(trunk, 'num_prefix_tokens', 0)
    if pooled:
        if len(shape) != 2:
            raise ValueError(f'Trunk {name!r} does not have a pooling of its own: choose another one.')
        return FeatureMap('NC', shape[1])
    if len(shape) == 4 and shape[1] in features and getattr(trunk, 'output_fmt', 'NCHW') == 'NCHW':
        return FeatureMap('NCHW', shape[1])
    if len(shape) == 4 and shape[3] in features:
        return FeatureMap('NHWC', shape[3])
    if len(shape) == 3 and shape[2] in features and shape[1] > prefix + 1:
        return FeatureMap('NLC', shape[2], prefix, prefix > 0 and getattr(trunk, 'cls_token', None) is not None)
    raise ValueError(
        f'Trunk {name!r} gives no map to pool: its output without pooling is a {type(x).__name__} {shape or ""}, while '
        f'(N, C, H, W), (N, H, W, C) or (N, L, C) with C in {sorted(features)} is needed. Choose a trunk with spatial '
        "features, such as resnet50, or global_pool='trunk', its own pooling.")


def find_input_sizes(trunk: nn.Module) -> InputSizes:
    """The image sizes that a trunk can take, by forwards of shapes only.

    What a trunk of a patch, grid or window size needs are multiples of some part of the size that it was built for.
    """
    height, width = own_size(trunk)
    common = math.gcd(height, width)
    steps = [n for n in range(1, common + 1) if common % n == 0]
    if isinstance(trunk, timm.models.MultiScaleVit):  # reads beyond its table of positions, which shapes do not show
        steps = []
    for step in steps:
        odd = _MORE // step // 2 * 2 + 1
        try:  # more than a cell of the map each, and other proportions: no equal number of positions by chance
            for more in (odd * step, (odd + 2) * step):
                _meta_forward(trunk, (height + more, width + 2 * more))
            return InputSizes(step, (height, width))
        except _FAILURES:
            pass
    return InputSizes(None, (height, width))


_MORE = 64  # pixels beyond its own size that a trunk is tried with
_FAILURES = (RuntimeError, NotImplementedError, IndexError, AssertionError, ValueError, TypeError)


def own_size(trunk: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a timm model is built for."""
    size = getattr(getattr(trunk, 'patch_embed', None), 'img_size', None)
    return tuple(size or get_model_traits(trunk).get('img_size') or trunk.default_cfg['input_size'][-2:])


def _meta_forward(trunk: nn.Module, size: tuple[int, int]):
    # each place of a tensor once, also where modules or tensors are shared (CoaT): torch restores no second one
    state = {f'{name}.{key}'.removeprefix('.'): torch.empty_like(value, device='meta')
             for name, module in trunk.named_modules() for named in (module.named_parameters, module.named_buffers)
             for key, value in named(recurse=False, remove_duplicate=False)}
    dtype = next((p.dtype for p in trunk.parameters()), torch.float32)
    training = trunk.training
    try:
        with torch.no_grad():
            return functional_call(
                trunk.eval(), state, (torch.empty(1, trunk.in_chans, *size, device='meta', dtype=dtype),),
                tie_weights=False)
    finally:
        trunk.train(training)


def model_cfg(trunk_cfg: dict, **kwargs) -> dict:
    """Configuration of a model on a trunk with this timm configuration, without weights unless given in ``kwargs``."""
    first_conv = trunk_cfg.get('first_conv')
    if isinstance(first_conv, str):
        first_conv = f'trunk.{first_conv}'
    elif first_conv is not None:
        first_conv = tuple(f'trunk.{name}' for name in first_conv)
    return {
        'num_classes': 1000,
        **{key: trunk_cfg[key] for key in _KEPT if trunk_cfg.get(key) is not None},
        'first_conv': first_conv,
        'classifier': 'head.fc',
        'paper_name': 'MultiGrain: a unified image embedding for classes and instances',
        'paper_ids': 'arXiv:1902.05509',
        'origin_url': 'https://github.com/facebookresearch/multigrain',
        **kwargs,
    }


# --- batch norms folded into the convolutions before them, for inference

_SIDE = 64  # pixels of the image that a model is run with
_CONVS = (nn.Conv2d, Conv2dSame)  # these very types: subclasses may change their weights as they run
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy, in eval mode, of a model of images (N, in_chans, H, W) whose batch norms are part of the convolutions
    before them, found by running it once; where that is not the same function up to rounding, the model as it is.
    """
    model = copy.deepcopy(model).eval()
    size = model.input_sizes.nearest(_SIDE, _SIDE) if hasattr(model, 'input_sizes') else (_SIDE, _SIDE)
    x = torch.randn(1, getattr(model, 'in_chans', 3), *size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()))
    with torch.inference_mode(False), torch.no_grad():
        try:
            expected, pairs = _conv_norm_pairs(model, x)
            folded = copy.deepcopy(model)
            for conv_name, norm_name in pairs:
                _fold(folded, folded.get_submodule(conv_name), norm_name)
            if torch.allclose(folded(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()):
                return folded
        except (RuntimeError, AssertionError, ValueError):
            pass
    return model


def _conv_norm_pairs(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """The model's output, and the names of each convolution and the batch norm that takes its output."""
    made, pairs, calls = {}, [], []

    def hook(name: str, is_conv: bool):
        def seen(module, args, output):
            calls.append(name)
            if is_conv:
                made[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id
            elif id(args[0]) in made:
                pairs.append((made[id(args[0])][0], name))
        return seen

    handles = [module.register_forward_hook(hook(name, type(module) in _CONVS))
               for name, module in model.named_modules()
               if type(module) in _CONVS or (type(module) in _NORMS and module.track_running_stats)]
    try:
        return model(x), [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)]
    finally:
        for handle in handles:
            handle.remove()


def _fold(model: nn.Module, conv: nn.Module, norm_name: str) -> None:
    norm = model.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    parent, _, name = norm_name.rpartition('.')
    setattr(model.get_submodule(parent), name, rest.eval())
