"""A model that a command line names: a saved folder, a registered model with its tag, or a checkpoint of train.py."""
import argparse
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict, get_pretrained_cfg
from torch import nn

from timm_multigrain.models import MultiGrain

from .save import CARD, CONFIG, WEIGHTS

__all__ = ['Source', 'load_source']

_DATA = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


@dataclass(frozen=True)
class Source:
    """A model to publish.

    Attributes:
        model: The model.
        description: What the weights are, where that is known.
        data_config: Preprocessing it was trained for, where the model does not say it itself.
        card: README.md beside it.
        origin: What was loaded, in words.
    """
    model: nn.Module
    origin: str
    description: str | None = None
    data_config: dict | None = None
    card: Path | None = None


def load_source(name: str, ema: bool = True, wrap: bool = False) -> Source:
    """Load a model by folder, file or name. Nothing of it is executed: safetensors, JSON, or weights_only pickles.

    Args:
        name: A folder of `save_pretrained` or timm (config.json, model.safetensors), a checkpoint of timm's train.py
            (model_best.pth.tar), or a registered MultiGrain with a tag of pretrained weights.
        ema: Take a checkpoint's averaged weights, if it has them.
        wrap: Make another timm model in a folder or checkpoint the trunk of a MultiGrain instead of refusing it.

    Raises:
        FileNotFoundError: There is no such folder, file or model.
        ValueError: It is not a MultiGrain, or cannot be read.
        OSError, RuntimeError: Weights that cannot be downloaded, or do not fit.
    """
    path = Path(name)
    if path.is_dir():
        return _from_folder(path, wrap)
    if path.is_file():
        return _from_checkpoint(path, ema, wrap)
    return _from_registry(name)


def _from_folder(path: Path, wrap: bool) -> Source:
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(f'{path} has no {file}: save the model with timm_multigrain.hub.save_pretrained.')
    try:
        architecture = json.loads((path / CONFIG).read_text(encoding='utf-8'))['architecture']
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path / CONFIG} is not a configuration of timm ({type(e).__name__}: {e}).') from e
    if wrap and not _is_multigrain(architecture):
        return Source(MultiGrain(f'local-dir:{path}', num_classes=0, pretrained_trunk=True), f'the trunk in {path}')
    _check_name(architecture, f'{path / CONFIG}')
    card = path / CARD
    return Source(
        timm.create_model(f'local-dir:{path}', pretrained=True), f'the folder {path}',
        card=card if card.is_file() else None)


def _from_registry(name: str) -> Source:
    tagged = timm.list_models('multigrain*', pretrained=True)
    if os.sep in name or not (timm.is_model(name) or name.partition('.')[0].startswith('multigrain')):
        raise FileNotFoundError(f'{name} is no folder, no file and no MultiGrain model: give a folder of '
                                'save_pretrained, a checkpoint of train.py, or one of ' + ', '.join(tagged) + '.')
    _check_name(name, name)
    if name not in tagged:
        own = [tag for tag in tagged if tag.startswith(f'{name}.')]
        near = ', '.join(own or difflib.get_close_matches(name, tagged) or tagged)
        raise ValueError(f'{name} names no pretrained weights: give one of {near}, or a folder or a checkpoint.')
    return Source(timm.create_model(name, pretrained=True), name, get_pretrained_cfg(name).description)


def _from_checkpoint(path: Path, ema: bool, wrap: bool) -> Source:
    checkpoint = _read(path)
    args = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    if not isinstance(args, argparse.Namespace) or not isinstance(checkpoint.get('state_dict'), dict):
        raise ValueError(f"{path} is not a checkpoint of timm's train.py, which says how its model is made: load it "
                         'into a model and save that with timm_multigrain.hub.save_pretrained.')
    as_trunk = wrap and ':' not in args.model and not _is_multigrain(args.model)
    if ':' not in args.model and not as_trunk:  # hf-hub: and local-dir: say what they are when they are opened
        _check_name(args.model, f'{path} (its --model)')
    averaged = ema and checkpoint.get('state_dict_ema') is not None
    state = clean_state_dict(checkpoint['state_dict_ema' if averaged else 'state_dict'])
    model = MultiGrain(args.model, num_classes=0) if as_trunk else _rebuild(args, state)
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as e:
        raise ValueError(f'{path} does not fit the {args.model} that its arguments describe: '
                         f'{" ".join(str(e).split())}') from e
    data = resolve_data_config(vars(args), model=model)
    kind = 'averaged weights' if averaged else 'weights'
    return Source(
        model, f'the {kind} of {path} (epoch {checkpoint.get("epoch")})',
        data_config={name: data[name] for name in _DATA if name in data})


def _read(path: Path) -> Any:
    torch.serialization.add_safe_globals([argparse.Namespace])  # what timm stores the arguments in
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # torch raises whatever the broken file makes its readers raise
        reason = f'{type(e).__name__}: {str(e).splitlines()[0]}'
        raise ValueError(f'{path} is no checkpoint that can be read safely ({reason}).') from e


def _rebuild(args: argparse.Namespace, state: dict[str, torch.Tensor]) -> nn.Module:
    """The model that train.py made from these arguments, without fetching the weights that it started from."""
    kwargs = {k: v for k, v in (getattr(args, 'model_kwargs', None) or {}).items()
              if not k.startswith('mg_') and k not in ('pretrained_trunk', 'pretrained_cfg_overlay')}
    weight = state.get('head.fc.weight')
    size = getattr(args, 'input_size', None)
    in_chans = getattr(args, 'in_chans', None) or (size[0] if size else None)
    # Trained on, the weights are those of the configuration no more; their license stays with what was made of them.
    cfg = dict.fromkeys(('url', 'hf_hub_id', 'tag', 'description', 'notes', 'test_input_size'))
    if not getattr(args, 'pretrained', False):
        cfg['license'] = None
    return timm.create_model(
        args.model, pretrained=False, num_classes=0 if weight is None else len(weight), in_chans=in_chans,
        global_pool=getattr(args, 'gp', None), pretrained_cfg_overlay=cfg, **kwargs)


def _is_multigrain(name: str) -> bool:
    model = str(name).partition('.')[0]
    return model.startswith('multigrain') and timm.is_model(model)


def _check_name(name: str, shown: str) -> None:
    if not _is_multigrain(name):
        raise ValueError(f'{shown} is {name!r}, not a MultiGrain: publish it with timm.models.push_to_hf_hub.')
