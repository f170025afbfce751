"""timm's model configuration: of a MultiGrain, what one in a file may say, and what a model was fitted for."""
import json
import math
from typing import Any

import torch

from timm_multigrain.files import check_json, parse_json

__all__ = ['check_config', 'check_saved_args', 'fitted', 'json_p', 'model_cfg', 'note_fitted', 'whitened_for']

_KEPT = ('input_size', 'min_input_size', 'fixed_input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std')


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


# --- what comes with a file

# arguments that lead out of the file that they stand in
_OUTSIDE = (
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_trunk', 'checkpoint_path', 'cache_dir')
_LARGEST = 4096  # pixels
_SIZES = ('input_size', 'test_input_size', 'min_input_size')
_POSITIVE = ('std', 'crop_pct', 'test_crop_pct')
_FORM = {
    **{key: [int] for key in _SIZES},
    'mean': [float],
    'std': [float],
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), float),
    **dict.fromkeys(('interpolation', 'crop_mode', 'architecture', 'tag', 'license', 'description'), str),
    'notes': (str, [str]),
    'label_names': ([str], {str: str}),
}


def check_saved_args(args: Any) -> None:
    """Whether the arguments that a file says its model is made with lead nowhere else; ValueError if they do."""
    if args is None:
        return
    if not isinstance(args, dict):
        raise ValueError(f'the arguments of the model are a {type(args).__name__}.')
    trunk = args.get('trunk')
    if trunk is not None and not (isinstance(trunk, str) and not {':', '/', '\\'} & set(trunk)):
        raise ValueError(f'the trunk {trunk!r:.200} is not the name of a model of timm, and no other name in a file is '
                         'followed.')
    outside = next((name for name in _OUTSIDE if args.get(name)), None)
    if outside is not None:
        raise ValueError(f'{outside}={args[outside]!r:.200} leads out of the file, and is not followed: remove it.')


def check_config(cfg: dict) -> None:
    """Whether a model's configuration has the types that timm gives it; ValueError if not."""
    for key in _FORM.keys() & {key for key, value in cfg.items() if value is not None}:
        value = list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key]
        check_json(value, _FORM[key], f'{key} of the configuration')
        if key in _SIZES:
            good = len(value) == 3 and all(0 < side <= _LARGEST for side in value)
        elif key in _POSITIVE:
            good = value and all(number > 0 for number in (value if key == 'std' else [value]))
        else:
            good = key != 'mean' or value
        if not good or (isinstance(value, dict) and not all(row.isdecimal() for row in value)):
            raise ValueError(f'{key} of the configuration is {value!r:.200}.')


# --- what a model was fitted for: in the notes of timm's pretrained_cfg, one JSON object per note, so that the settings
# stay with the model through saving, loading and publishing

_SETTINGS = {'p': (float, str, [float], None), 'protocol': {'size': int, 'kind': str}}


def note_fitted(model: torch.nn.Module, kind: str, settings: dict[str, Any]) -> None:
    """Keep in the model what a fit ('whitening' or 'p') belongs to, in place of an earlier one of its kind."""
    notes = [note for note in _notes(model) if not note.startswith(f'{kind}: {{')]
    notes.append(f'{kind}: {json.dumps(settings)}')
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'notes': notes}


def fitted(model: torch.nn.Module, kind: str) -> dict[str, Any] | None:
    """The settings that `note_fitted` kept, or None."""
    note = next((note for note in _notes(model) if note.startswith(f'{kind}: {{')), None)
    try:
        settings = parse_json(note.partition(': ')[2]) if note else None
        check_json(settings, {name: form for name, form in _SETTINGS.items() if name in (settings or ())}, kind)
        return settings
    except ValueError:
        return None


def whitened_for(model: torch.nn.Module) -> dict[str, Any]:
    """Size and kind of the protocol that the model's whitening was fitted for, as arguments of a Protocol."""
    settings = fitted(model, 'whitening') if getattr(model, 'whitened', False) else None
    protocol = (settings or {}).get('protocol', {})
    return {name: protocol[name] for name in ('size', 'kind') if name in protocol}


def json_p(p: float | list[float] | None) -> float | str | list[float] | None:
    """An exponent as strict JSON can hold it."""
    if isinstance(p, list):
        return [json_p(value) for value in p]
    return 'inf' if p == math.inf else p


def _notes(model: torch.nn.Module) -> list[str]:
    notes = (getattr(model, 'pretrained_cfg', None) or {}).get('notes') or ()
    return [str(note) for note in ([notes] if isinstance(notes, str) else notes)]
