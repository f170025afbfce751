"""Any timm model as a trunk: created without its classifier and pooling, and asked for the map it gives."""
import difflib
import math
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from timm.models import get_model_traits
from torch.func import functional_call

from . import nasnet

__all__ = ['FeatureMap', 'InputSizes', 'create_trunk', 'find_input_sizes', 'probe_trunk']


class FeatureMap(NamedTuple):
    """What a trunk gives.

    Attributes:
        format: 'NCHW', 'NHWC' or 'NLC'.
        channels: Channels C of the map.
        prefix_tokens: Leading class and register tokens of an NLC map.
    """
    format: str
    channels: int
    prefix_tokens: int = 0


class InputSizes(NamedTuple):
    """Image sizes that a trunk can take.

    Attributes:
        step: Multiples of this many pixels, for each side; None if `size` alone.
        size: (H, W) that the trunk was built for.
    """
    step: int | None
    size: tuple[int, int]

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size that the trunk can take."""
        if self.step is None:
            return self.size
        height, width = (max(1, (side + self.step // 2) // self.step) * self.step for side in (height, width))
        return height, width


def create_trunk(name: str, pretrained: bool | str = False, in_chans: int = 3, **kwargs) -> nn.Module:
    """Create a timm model that gives its last feature map instead of logits.

    PNASNet-5-Large gets the padding of the original implementation, see `restore_padding`. Transformers that can take
    images of any size, by positions that are interpolated or windows that are masked, are made to.

    Args:
        name: Any timm model name, also with a tag ('resnet50.a1_in1k') or a source ('hf-hub:...').
        pretrained: Load timm's weights: True for the model's default ones, or the name of a tag.
        in_chans: Channels of the input image.
        **kwargs: The trunk's own constructor arguments (drop_path_rate, img_size, ...).

    Raises:
        ValueError: The name is unknown to timm, or the model cannot run without its pooling.
    """
    if isinstance(pretrained, str):
        name = f'{name.split(".")[0]}.{pretrained}'
    if ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f' Did you mean {", ".join(near)}?' if near else ' timm.list_models() lists the valid names.'
        raise ValueError(f'Unknown trunk {name!r}.{hint}')
    if name.startswith('multigrain'):
        raise ValueError(f'Trunk {name!r} is a MultiGrain model itself: name the timm model inside it.')
    kwargs = {'pretrained': bool(pretrained), 'num_classes': 0, 'global_pool': '', 'in_chans': in_chans, **kwargs}
    try:
        trunk = _create_for_any_size(name, kwargs)
    except AssertionError as e:
        raise ValueError(f'Trunk {name!r} cannot be built without its pooling and classifier ({e}).') from e
    if isinstance(trunk, timm.models.PNASNet5Large):

        nasnet.restore_padding(trunk)
    return trunk


def _create_for_any_size(name: str, kwargs: dict) -> nn.Module:
    if 'dynamic_img_size' not in kwargs:
        try:
            return timm.create_model(name, dynamic_img_size=True, **kwargs)
        except TypeError as e:
            if 'dynamic_img_size' not in str(e):
                raise
    return timm.create_model(name, **kwargs)


def probe_trunk(trunk: nn.Module, name: str) -> FeatureMap:
    """Find format and channels of a trunk's map by one forward of shapes only (meta device: no data, no arithmetic).

    Raises:
        ValueError: The trunk gives no map of positions: a pooled vector, several tensors, or an unknown layout.
    """
    try:
        x = _meta_forward(trunk, _own_size(trunk))
    except _FAILURES as e:
        raise ValueError(f'Trunk {name!r} does not run without its pooling and classifier: {e}') from e
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else None
    features = {trunk.num_features, getattr(trunk, 'head_hidden_size', None)} - {None}
    if shape is not None and len(shape) == 4:
        if shape[1] in features and getattr(trunk, 'output_fmt', 'NCHW') == 'NCHW':
            return FeatureMap('NCHW', shape[1])
        if shape[3] in features:
            return FeatureMap('NHWC', shape[3])
    prefix = getattr(trunk, 'num_prefix_tokens', 0)
    if shape is not None and len(shape) == 3 and shape[2] in features and shape[1] > prefix + 1:
        return FeatureMap('NLC', shape[2], prefix)
    got = f'of shape {shape}' if shape is not None else f'a {type(x).__name__}'
    raise ValueError(
        f'Trunk {name!r} gives no map to pool: its output without pooling is {got}, while (N, C, H, W), (N, H, W, C) '
        f'or (N, L, C) with C in {sorted(features)} is needed. Choose a trunk with spatial features, such as resnet50.')


def find_input_sizes(trunk: nn.Module) -> InputSizes:
    """The image sizes that a trunk can take, by forwards of shapes only.

    What a trunk of a patch, grid or window size needs are multiples of some part of the size that it was built for.
    """
    height, width = _own_size(trunk)
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


def _own_size(trunk: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(trunk, 'patch_embed', None), 'img_size', None)
    size = size or get_model_traits(trunk).get('img_size') or trunk.default_cfg['input_size'][-2:]
    return tuple(size)


def _meta_forward(trunk: nn.Module, size: tuple[int, int]):
    state = {
        k: torch.empty_like(v, device='meta')
        for named in (trunk.named_parameters(), trunk.named_buffers()) for k, v in named
    }
    dtype = next((p.dtype for p in trunk.parameters()), torch.float32)
    x = torch.empty(1, trunk.in_chans, *size, device='meta', dtype=dtype)
    training = trunk.training
    try:
        with torch.no_grad():
            return functional_call(trunk.eval(), state, (x,))
    finally:
        trunk.train(training)
