"""Any timm model as a trunk: created without its classifier and pooling, and asked for the map it gives."""
import difflib
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from torch.func import functional_call

from . import nasnet

__all__ = ['FeatureMap', 'create_trunk', 'probe_trunk']


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


def create_trunk(name: str, pretrained: bool | str = False, in_chans: int = 3, **kwargs) -> nn.Module:
    """Create a timm model that gives its last feature map instead of logits.

    PNASNet-5-Large gets the padding of the original implementation, see `restore_padding`.

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
    try:
        trunk = timm.create_model(
            name, pretrained=bool(pretrained), num_classes=0, global_pool='', in_chans=in_chans, **kwargs)
    except AssertionError as e:
        raise ValueError(f'Trunk {name!r} cannot be built without its pooling and classifier ({e}).') from e
    if isinstance(trunk, timm.models.PNASNet5Large):

        nasnet.restore_padding(trunk)
    return trunk


def probe_trunk(trunk: nn.Module, name: str) -> FeatureMap:
    """Find format and channels of a trunk's map by one forward of shapes only (meta device: no data, no arithmetic).

    Raises:
        ValueError: The trunk gives no map of positions: a pooled vector, several tensors, or an unknown layout.
    """
    x = _meta_forward(trunk, name)
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


def _meta_forward(trunk: nn.Module, name: str):
    size = getattr(getattr(trunk, 'patch_embed', None), 'img_size', None) or trunk.default_cfg['input_size'][-2:]
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
    except (RuntimeError, NotImplementedError, IndexError, AssertionError) as e:
        raise ValueError(f'Trunk {name!r} does not run without its pooling and classifier: {e}') from e
    finally:
        trunk.train(training)
