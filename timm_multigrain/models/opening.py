"""Any model that a command line names, as a MultiGrain ready to embed images."""
import hashlib
import os
import warnings
from pathlib import Path

import timm
import torch

from timm_multigrain.layers import GeM

from .multigrain import MultiGrain

__all__ = ['open_model', 'weights_sha256']


def open_model(
        name: str | os.PathLike,
        *,
        pool: str | None = None,
        p: float | None = None,
        pretrained: bool = True,
        num_classes: int | None = None,
        ema: bool = True,
) -> MultiGrain:
    """Open a model by folder, file or name. Nothing of it is executed.

    Args:
        name: A folder of `save_pretrained`, a checkpoint of timm's train.py, a registered MultiGrain with or without
            its tag, 'hf-hub:...' or 'local-dir:...', or any timm model ('resnet50', 'resnet50.a1_in1k'), whose weights
            become those of the trunk.
        pool: Another pooling: 'gem', 'mac', 'spoc', 'rmac', 'crow', 'avg' or 'max'.
        p: Another exponent of GeM.
        pretrained: False for random weights, with registered names only.
        num_classes: Classes of the model, 0 for none. A number that is not the model's own gives it a random
            classifier. None: as it is; none for a timm model.
        ema: Take a checkpoint's averaged weights, if it has them.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        FileNotFoundError: There is no such folder, file or model.
        ValueError: It cannot be read, has no map to pool, or the pooling or p does not suit it.
        OSError, RuntimeError: Weights that cannot be downloaded, or do not fit.
    """
    name = os.fsdecode(name)
    model = _open(name, pretrained, ema)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    if pool is not None:
        _set_pool(model, name, pool)
    if p is not None:
        if model.whitened and p != model.gem_p:
            warnings.warn(f'{name} was whitened for p = {model.gem_p}, not for {p}: whiten it again.', stacklevel=2)
        model.set_gem_p(p)
    return model.eval()


def _open(name: str, pretrained: bool, ema: bool) -> MultiGrain:
    from timm_multigrain.hub.source import load_source

    path = Path(name)
    if path.exists():
        if not pretrained:
            raise ValueError(f'{name} holds weights: random ones are for names, such as multigrain_resnet50.')
        return load_source(name, ema=ema, wrap=True).model
    if name.startswith('multigrain') and timm.is_model(name.partition('.')[0]):
        return load_source(name).model if pretrained else timm.create_model(name, pretrained=False)
    if ':' in name:
        model = timm.create_model(name, pretrained=pretrained)
        return model if isinstance(model, MultiGrain) else _wrap(name, pretrained)
    if os.sep in name or not timm.is_model(name):
        raise FileNotFoundError(f'{name} is no folder, no file and no model of timm: give a folder of save_pretrained, '
                                'a checkpoint of train.py, or a name such as multigrain_resnet50 or resnet50.')
    return _wrap(name, pretrained)


def _wrap(trunk: str, pretrained: bool) -> MultiGrain:
    return MultiGrain(trunk, num_classes=0, pretrained_trunk=pretrained)


def _set_pool(model: MultiGrain, name: str, pool: str) -> None:
    if not pool:
        raise ValueError("pool='' gives a map, not a descriptor: give 'gem', 'mac', 'spoc', 'rmac', 'crow' or 'avg'.")
    before = (model.global_pool, model.gem_p)
    parameter = next(model.parameters())
    model.head.reset_pool(pool, device=parameter.device, dtype=parameter.dtype)
    if model.whitened and (model.global_pool, model.gem_p) != before:
        raise ValueError(f'{name} was whitened for its own pooling: {pool!r} needs a model without whitening.')


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's weights and buffers."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f'{key} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b'')
    if isinstance(getattr(getattr(model, 'head', None), 'pool', None), GeM):
        digest.update(f'p {model.gem_p}'.encode())
    return digest.hexdigest()
