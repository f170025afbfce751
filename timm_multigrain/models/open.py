"""The way in: any model that a command line or a program names, as a MultiGrain with its data configuration.

Nothing that is opened is executed, and no name inside a file leads to the network or to another file.
"""
import argparse
import difflib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, get_pretrained_cfg_value, is_model_pretrained

from timm_multigrain.files import read_json
from timm_multigrain.images.labels import read_class_names
from timm_multigrain.layers import GeM, is_multigrain_pool

from .download import check_reachable, download
from .multigrain import MultiGrain, rebuilding_args
from .registry import register_multigrain
from .trunk import model_cfg, own_size, sharing_copy
from .weights import (
    CONFIG,
    SSCD_CFG,
    WEIGHTS,
    UnreadableWeightsError,
    check_config,
    check_saved_args,
    checkpoint_filter_fn,
    is_multigrain,
    is_sscd,
    model_state,
    read_checkpoint,
    recognize_model,
    telling_line,
    weights_in,
)

# what a configuration says of the published weights, and not of weights that someone trained in the same way
_OF_THE_WEIGHTS = ('url', 'hf_hub_id', 'tag', 'description', 'notes', 'test_input_size')
_OF_THE_AUTHORS = ('license', 'origin_url')  # and which still holds of weights that were tuned from them
# beside the data configuration, what a MultiGrain takes from the timm model that it is made of
_ALSO_KEPT = ('license', 'tag', 'label_names', 'label_descriptions', 'test_input_size', 'test_crop_pct', 'crop_mode')


def open_model(
        name: str | os.PathLike,
        *,
        pool: str | None = None,
        p: float | None = None,
        pretrained: bool = True,
        num_classes: int | None = None,
        ema: bool = True,
        architecture: str | None = None,
) -> MultiGrain:
    """Open a model by folder, file or name, with its data configuration as pretrained_cfg: of a checkpoint, what it was
    trained with. Nothing of it is executed.

    Args:
        name: A folder of `save_pretrained` or of timm; a checkpoint of timm's train.py, of the original implementation,
            of SSCD (for torchvision), or bare weights, as a file or http(s) address; a MultiGrain with or without its
            tag; 'hf-hub:...'; or any timm model ('resnet50', 'resnet50.a1_in1k'). A timm model is opened as it was
            trained, with its pooling ('trunk', or 'gem' and the like where it was trained with that) and its
            classifier, if that is a linear one on the embedding; otherwise with none, and a warning.
        pool: Another pooling, see `MultiGrain`: 'gem', 'mac', 'spoc', 'rmac', 'crow', 'avg', 'max', 'cls', 'cls+gem',
            or of a timm model 'trunk' or 'map'. A classifier stays where it still says the same.
        p: Another exponent of GeM, which a timm model is then opened with.
        pretrained: False for random weights, with names only.
        num_classes: Classes of the model, 0 for none. A number that is not the model's own gives it a random
            classifier. None: as it is.
        ema: Take a checkpoint's averaged weights, if it has them.
        architecture: Model that the weights in a file are of, where that is not inferred from the file:
            'multigrain_resnet50', 'resnet50', 'hf-hub:...', 'local-dir:...'.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        FileNotFoundError: Folder, file or model not found.
        ValueError: It cannot be read, has no map to pool, or the pooling or p does not suit it.
        OSError, RuntimeError: Weights that cannot be downloaded, or do not fit.

    Example:
        >>> model = open_model('multigrain_resnet18', pretrained=False, pool='mac')
        >>> model.global_pool
        'mac'
    """
    name = os.fsdecode(name)
    model = _open(name, pretrained, ema, architecture)
    with _building(name):
        model = _as_multigrain(model, name)
        check_config(model.pretrained_cfg)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    if pool == '':
        raise ValueError("pool='' gives a map, not a descriptor: give 'gem', 'mac', 'spoc', 'rmac', 'crow' or 'avg'.")
    if p is not None and pool is None and model.global_pool == 'trunk':
        pool = 'gem'
    before, whitened = (model.global_pool, model.gem_p), model.whitened
    if pool is not None:
        if model.global_pool == 'trunk' and pool not in ('trunk', 'map') and not _is_average(model):
            model.reset_classifier(0)
        model.set_pool(pool)
    if whitened and (model.global_pool, model.gem_p) != before:
        raise ValueError(f'{name} was whitened for its own pooling: {pool!r} needs a model without whitening.')
    if p is not None:
        if whitened and p != model.gem_p:
            warnings.warn(f'{name} was whitened for p = {model.gem_p}, not for {p}: whiten it again.', stacklevel=2)
        model.set_gem_p(p)
    return model.eval()


def _open(name: str, pretrained: bool, ema: bool, architecture: str | None) -> nn.Module:
    """The model as timm or a MultiGrain."""
    path = Path(name.removeprefix('local-dir:'))
    if path.exists():
        if not pretrained:
            raise ValueError(f'{name} holds weights: random ones are for names, such as multigrain_resnet50.')
        return _from_folder(path) if path.is_dir() else _from_file(path, name, ema, architecture)
    if name.startswith(('http://', 'https://')):
        official = next((tag for tag, url in _official().items() if url == name), None)
        if official is None:
            with tempfile.TemporaryDirectory(prefix='multigrain-') as folder:
                path = download(name, Path(folder) / (Path(urlparse(name).path).name or 'weights.pth'))
                return _from_file(path, name, ema, architecture)
        name = official
    if name.startswith(('hf-hub:', 'hf_hub:')):
        if pretrained:
            check_reachable(name[len('hf-hub:'):].partition('@')[0], name)
        return timm.create_model(name, pretrained=pretrained)
    if not is_model(name):
        raise FileNotFoundError(
            f'{name} is neither a folder, nor a file, nor a model of timm: give a folder of save_pretrained, a '
            'checkpoint of train.py, or a name such as multigrain_resnet50 or resnet50.')
    if pretrained and not is_model_pretrained(name):
        arch = name.partition('.')[0]
        trunk = arch.removeprefix('multigrain_')
        own = [tag for tag in timm.list_models(pretrained=True) if tag.startswith(f'{arch}.')]
        near = difflib.get_close_matches(name, own, n=8, cutoff=0) or [trunk] * is_model_pretrained(trunk)
        raise ValueError(f'{name} names no pretrained weights: give ' + f'{", ".join(near)}, or ' * bool(near)
                         + 'a folder or a checkpoint.')
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    if pretrained and cfg is not None and cfg.hf_hub_id:
        check_reachable(cfg.hf_hub_id if '/' in cfg.hf_hub_id else f'{cfg.hf_hub_id}{name}', name)
    return timm.create_model(name, pretrained=pretrained)


def is_model(name: Any) -> bool:
    """Whether timm knows a model, or the trunk of a multigrain_* one, which is then registered."""
    if not isinstance(name, str) or ':' in name or os.sep in name:
        return False
    arch = name.partition('.')[0]
    trunk = arch.removeprefix('multigrain_')
    if not timm.is_model(arch) and trunk != arch and timm.is_model(trunk):
        register_multigrain(trunk)
    return timm.is_model(arch)


def _official() -> dict[str, str]:
    """Tag -> address of the published weights."""
    urls = {name: get_pretrained_cfg(name).url for name in timm.list_models('multigrain*', pretrained=True)}
    return {name: url for name, url in urls.items() if url}


def _from_folder(path: Path) -> nn.Module:
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(f'{path} has no {file}: save the model with timm_multigrain.save_pretrained.')
    config = read_json(path / CONFIG)
    with _building(f'{path / CONFIG}'):
        if not is_model(config.get('architecture')):
            raise ValueError(f'the architecture {config.get("architecture")!r:.100} is not a model of timm.')
        check_saved_args(config.get('model_args'))
        check_config(config.get('pretrained_cfg') or {})
        return timm.create_model(f'local-dir:{path}', pretrained=True)


def _from_file(path: Path, shown: str, ema: bool, architecture: str | None) -> nn.Module:
    """Of timm's train.py, which says how its model is made; of the original; or weights of a named architecture."""
    checkpoint = read_checkpoint(path, shown)
    with _building(shown, path):
        args = checkpoint.get('args') if isinstance(checkpoint, dict) else None
        args = vars(args) if isinstance(args, argparse.Namespace) else {}
        of_timm = args or not (architecture or 'multigrain').startswith('multigrain')
        state = weights_in(checkpoint, ema) if of_timm else model_state(checkpoint, ema)
        name = architecture or (args.get('model') if args else recognize_model(state))
        if ':' not in (architecture or '') and not is_model(name):
            near = ' or '.join(difflib.get_close_matches(f'{name}', timm.list_models('multigrain_*'), n=2))
            raise ValueError(f'{name!r:.200} is not a registered model' + f', did you mean {near}?' * bool(near) + (
                '' if architecture else ', and no other name in a file is followed: timm-multigrain convert FILE -o '
                                        'FOLDER --model NAME.'))
        # what is known of the authors' files is inferred from their names
        tags = [tag for tag, url in _official().items() if Path(urlparse(url).path).name == path.name and not args]
        tag = next((tag for tag in tags if tag.partition('.')[0] == name), None)
        model = timm.create_model(tag or name, pretrained=False, **_model_args(name, state, args))
        try:
            model.load_state_dict(checkpoint_filter_fn(state, model) if isinstance(model, MultiGrain) else state)
        except (RuntimeError, ValueError) as e:
            raise ValueError(f'it does not fit {name}: {" ".join(str(e).split())}') from e
        unknown = () if tag else _OF_THE_WEIGHTS if args.get('pretrained') else (*_OF_THE_WEIGHTS, *_OF_THE_AUTHORS)
        cfg = {**model.pretrained_cfg, **dict.fromkeys(unknown), 'num_classes': model.num_classes}
        if is_sscd(weights_in(checkpoint, ema)):
            cfg.update(SSCD_CFG)
        if args:  # what it was trained at replaces what is recommended for the weights that it started from
            cfg.update(resolve_data_config(args, model=model), test_crop_pct=None, test_pool_size=None, pool_size=None)
            names = read_class_names(path)
            if names is not None and len(names) == model.num_classes:
                cfg['label_names'] = list(names)
        model.pretrained_cfg = model.default_cfg = {key: value for key, value in cfg.items() if value is not None}
        return model


def _model_args(name: str, state: dict, args: dict) -> dict[str, Any]:
    """What `timm.create_model` takes: as train.py gave it, without the weights that the training started from."""
    kwargs = args.get('model_kwargs') or {}
    if isinstance(kwargs, dict):
        kwargs = {k: v for k, v in kwargs.items()
                  if not str(k).startswith('mg_') and k not in ('pretrained_trunk', 'pretrained_cfg_overlay')}
    check_saved_args(kwargs)
    ours = is_multigrain(state) or name.startswith('multigrain')
    classifier = 'head.fc' if ours else is_model(name) and get_pretrained_cfg_value(name, 'classifier')
    classes = len(state.get(f'{classifier}.weight', ()))
    size = args.get('input_size')
    return dict(
        kwargs, num_classes=classes if classes or ours else args.get('num_classes'), global_pool=args.get('gp'),
        in_chans=args.get('in_chans') or (size[0] if size else None),
        bn_momentum=args.get('bn_momentum'), bn_eps=args.get('bn_eps'))


def _as_multigrain(model: nn.Module, shown: str) -> MultiGrain:
    """A MultiGrain as it is, and any other timm model with its own pooling and, if that is a linear one, classifier."""
    if isinstance(model, MultiGrain):
        return model
    if not hasattr(model, 'pretrained_cfg') or not hasattr(model, 'forward_head'):
        raise ValueError(f'{shown} is a {type(model).__name__}, without the verbs of a timm model.')
    pooling = _pooling_of(model)
    if pooling is not None:
        with suppress(ValueError):  # weights that a trunk without its pooling has no place for
            own = _wrap(model, model.num_classes, trunk_pool=None, **pooling)
            if _same_outputs(model, own):
                return own
    own = _wrap(model, model.num_classes, global_pool='trunk')
    if not _same_outputs(model, own):
        own = _wrap(model, 0, global_pool='trunk')
        warnings.warn(
            f'{shown} does not classify by a linear layer on its embedding: it is opened without its classifier.',
            stacklevel=3)
    return own


def _wrap(model: nn.Module, num_classes: int, **pooling: Any) -> MultiGrain:
    """A MultiGrain on a timm model, with its weights and configuration."""
    cfg = model.pretrained_cfg
    own = MultiGrain(cfg['architecture'], num_classes=num_classes, in_chans=getattr(model, 'in_chans', 3),
                     **{**rebuilding_args(model), **pooling})
    own.load_state_dict(model.state_dict())
    kept = {key: cfg[key] for key in _ALSO_KEPT if cfg.get(key) is not None}
    own.pretrained_cfg = own.default_cfg = model_cfg(cfg, architecture='multigrain', num_classes=num_classes, **kept)
    return own


def _is_average(model: MultiGrain) -> bool:
    """Whether the head of a trunk averages its map and does nothing else, so that the classifier is one of any map."""
    average = sharing_copy(model)
    average.set_pool('avg')
    return _same_outputs(model, average)


def _pooling_of(model: nn.Module) -> dict[str, Any] | None:
    """MultiGrain's arguments for a pooling of ours in a timm model, None if it is another one."""
    gem = next((module for module in model.modules() if isinstance(module, GeM)), None)
    if gem is not None:
        return {'gem_p': gem.value(), 'learn_p': gem.learn_p}
    pools = [getattr(holder, 'global_pool', None) for holder in (getattr(model, 'head', None), model)]
    names = [getattr(pool, 'pool_type', pool) for pool in pools]
    return next(({'global_pool': name} for name in names if is_multigrain_pool(name)), None)


@torch.no_grad()
def _same_outputs(model: nn.Module, own: MultiGrain) -> bool:
    """Whether the MultiGrain computes what the timm model does, seen on one picture of the model's size."""
    size = own_size(model)
    x = torch.linspace(-2, 2, own.in_chans * size[0] * size[1]).sin().view(1, own.in_chans, *size)
    expected, got = model.eval()(x), own.eval()(x)
    if not isinstance(expected, torch.Tensor) or expected.shape != got.shape:
        return False
    return bool((expected - got).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-6))


@contextmanager
def _building(shown: str, path: Path | None = None) -> Iterator[None]:
    """One sentence that names the file, whatever a constructor of timm makes of what it says."""
    try:
        yield
    except (FileNotFoundError, UnreadableWeightsError):
        raise
    except Exception as e:
        known = isinstance(e, ValueError | RuntimeError)
        text = str(e) if known and '\n' not in str(e) else telling_line(e)
        if not known:
            text = f'it does not describe a model that can be built ({type(e).__name__}: {text}).'
        if path is not None:  # which may be a temporary one
            text = text.replace(str(path), shown)
        raise ValueError(text if text.startswith(shown) else f'{shown}: {text}') from e


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
