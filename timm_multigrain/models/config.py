"""timm's model configurations: of a MultiGrain on any trunk, of the weights that the paper's authors published, and
what a configuration that comes with a file may say.
"""
import math
from typing import Any

from timm.models import get_pretrained_cfg

__all__ = ['check_config', 'check_saved_args', 'model_cfg', 'official_cfg', 'paper_cfg', 'trunk_cfg']

_URL = 'https://dl.fbaipublicfiles.com/multigrain/'
_PAPER_TEST = {'crop_pct': 0.875, 'interpolation': 'bilinear'}  # shorter side 256, centre crop 224

_KEPT = ('input_size', 'min_input_size', 'fixed_input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std')


def model_cfg(trunk_cfg: dict, **kwargs) -> dict:
    """Configuration of a model on a trunk with this timm configuration, without weights unless given in ``kwargs``."""
    first_conv = trunk_cfg.get('first_conv')
    if first_conv is not None:
        single = isinstance(first_conv, str)
        first_conv = f'trunk.{first_conv}' if single else tuple(f'trunk.{name}' for name in first_conv)
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


def trunk_cfg(trunk: str, **kwargs) -> dict:
    """Configuration of a model on a registered trunk, without weights unless given in ``kwargs``."""
    base = get_pretrained_cfg(trunk)
    return model_cfg(base.to_dict() if base else {}, **kwargs)


def paper_cfg(trunk: str, **kwargs) -> dict:
    """As `trunk_cfg`, with the paper's preprocessing."""
    return trunk_cfg(trunk, **{**_PAPER_TEST, **kwargs})


def official_cfg(trunk: str, file: str, training: str, top1: str, **kwargs) -> dict:
    """Configuration of weights published by the authors, whose license forbids commercial use.

    Args:
        trunk: Registered trunk.
        file: Path on the authors' server.
        training: What the weights are: p, lambda, augmentation.
        top1: Published ImageNet accuracy, with the test size.
        **kwargs: Other fields of timm's configuration.
    """
    return paper_cfg(trunk, **{
        'url': _URL + file,
        'license': 'cc-by-nc-4.0',
        'description': f'MultiGrain, {training}; top-1 {top1}',
        'notes': ('not for commercial use', 'top-1 as published by the authors of the paper'),
        **kwargs})


# arguments that lead out of the file that they stand in
_OUTSIDE = (
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_trunk', 'checkpoint_path', 'cache_dir')
_LARGEST = 4096  # pixels


def check_saved_args(args: Any) -> None:
    """Whether the arguments that a file says its model is made with lead nowhere else.

    Raises:
        ValueError: They name another file, a repository, or weights to fetch, or are no arguments.
    """
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
    """Whether a model's configuration has the types that timm gives it.

    Raises:
        ValueError: It has others.
    """
    for key, value in cfg.items():
        if value is not None and key in _TYPES and not _TYPES[key](value):
            raise ValueError(f'{key} of the configuration is {value!r:.200}.')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(
        isinstance(side, int) and 0 < side <= _LARGEST for side in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list | tuple) and all(map(_is_text, value)))


def _are_labels(value: Any) -> bool:
    if isinstance(value, dict):
        return all(str(row).isdecimal() and _is_text(name) for row, name in value.items())
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_number, value))


_TYPES = {
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), _is_size),
    'mean': _are_numbers,
    'std': lambda value: _are_numbers(value) and all(value),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), lambda value: _is_number(value) and value > 0),
    **dict.fromkeys(('interpolation', 'crop_mode', 'architecture', 'tag', 'license', 'description'), _is_text),
    'notes': _are_texts,
    'label_names': _are_labels,
}
