"""What an index says of its model and preprocessing, and opening the model, recognised by its weights."""
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import check_json, printable
from timm_multigrain.models.open import open_model, weights_sha256

from .errors import DamagedIndex, OtherModel

__all__ = ['SAVED', 'describe_model', 'label_names_of', 'open_described', 'open_named', 'protocol_from_json']

_OPTIONS = {'pool': (str, None), 'p': (float, None), 'pretrained': bool, 'ema': bool}
SAVED = 'model'  # folder inside the index for a model that is not a file or folder here
LARGEST = 1 << 14  # pixels of a side


def describe_model(model: torch.nn.Module, source: str | None, options: Mapping[str, Any] | None = None) -> dict:
    """What an index keeps of its model.

    Args:
        model: The MultiGrain.
        source: File or folder that it was opened from, absolute; None if it is saved inside the index.
        options: Keyword arguments of `open_model` that it was opened with.
    """
    p = getattr(model.head.pool, 'p', None)
    return {
        'name': model.pretrained_cfg.get('architecture') or 'multigrain', 'trunk': model.trunk_name,
        'source': source, 'options': dict(options or {}), 'weights_sha256': weights_sha256(model),
        'pool': model.global_pool,
        'p': [float(x) for x in p.detach().reshape(-1)] if isinstance(p, torch.Tensor) else None,
        'whitening': model.embed_dim if model.whitened else None, 'dim': model.embed_dim,
        'num_classes': model.num_classes, 'label_names': label_names_of(model),
        'license': model.pretrained_cfg.get('license'),
    }


def label_names_of(model: torch.nn.Module) -> list[str] | None:
    """Names of the model's classes: its own, ImageNet's where its weights are tagged as of that, or None."""
    cfg = model.pretrained_cfg
    names = cfg.get('label_names')
    if isinstance(names, dict):  # timm's form for rows with gaps between them
        return [names.get(str(row), str(row)) for row in range(model.num_classes)]
    if names and len(names) == model.num_classes:
        return list(names)
    from timm.data import ImageNetInfo, infer_imagenet_subset
    subset = infer_imagenet_subset(model)
    if subset is None or not re.search(r'in\d+k', cfg.get('tag') or ''):
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(row) for row in range(model.num_classes)]


def open_described(described: Mapping[str, Any], folder: Path) -> torch.nn.Module:
    """The model of an index, from where it says that it is.

    Args:
        described: What `describe_model` has given.
        folder: The index.

    Raises:
        OtherModel: Its file or folder has other weights now, or the index names something else than a file or folder.
        DamagedIndex: The model inside the index is a link, or has one in it.
        OSError, ValueError, RuntimeError: It cannot be opened.
    """
    source, options = described['source'], _options_of(described)
    if source is None:
        source, options = _saved(folder), {}
    elif not os.path.isabs(source):
        raise OtherModel(f'{folder} says that its model is {printable(source)}, which is not looked for, as the index '
                         'may be from anybody: if you trust it, name it with --model.')
    try:
        model = open_model(source, **options)
    except FileNotFoundError as e:
        raise FileNotFoundError(f'The model of {folder} is not where it was ({e}): name it with --model, wherever it '
                                'is now.') from e
    _check_same(described, model, folder, source)
    return model


def open_named(
        described: Mapping[str, Any],
        model: str | torch.nn.Module,
        folder: Path | str,
        options: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """The model of an index, from where the user says that it is; arguments as of `open_described`.

    Raises:
        OtherModel: It is another one.
        OSError, ValueError, RuntimeError: It cannot be opened.
    """
    shown = model if isinstance(model, str) else 'This model'
    if isinstance(model, str):
        model = open_model(model, **{**_options_of(described), **(options or {})})
    _check_same(described, model, folder, shown)
    return model


def _options_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `open_model`; ValueError for others than `timm-multigrain index` has."""
    options = described['options']
    unknown = options.keys() - _OPTIONS.keys()
    if unknown:
        raise ValueError(f'The model of the index has options that an index does not have: {printable(min(unknown))}.')
    check_json(options, {name: _OPTIONS[name] for name in options}, 'The options of its model')
    return dict(options)


def _saved(folder: Path) -> str:
    path = folder / SAVED
    for each in [path, *(path.iterdir() if path.is_dir() and not path.is_symlink() else ())]:
        if os.path.lexists(each) and (each.is_symlink() or not (each.is_file() or each.is_dir())):
            raise DamagedIndex(each, 'it is not a file of its own')
    return str(path)


def _check_same(described: Mapping[str, Any], model: torch.nn.Module, folder: Path | str, shown: str) -> None:
    found = weights_sha256(model)
    if (found, model.global_pool) != (described['weights_sha256'], described['pool']):
        raise OtherModel(
            f'{shown} is not the model that {folder} was built with ({described["source"] or described["name"]}, '
            f'{described["pool"]} pooling, weights {described["weights_sha256"][:12]}..., not {model.global_pool}, '
            f'{found[:12]}...): descriptors of two models cannot be compared; use that one, or make another index.')


def protocol_from_json(value: Mapping) -> Protocol:
    """The preprocessing that an index names.

    Raises:
        ValueError: It names none, or one that nobody means.
    """
    try:
        protocol = Protocol(**{key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})
        if not isinstance(protocol.flip, bool) or not isinstance(protocol.exif, bool):
            raise ValueError(f'flip {protocol.flip!r:.50}, exif {protocol.exif!r:.50}')
        if len(protocol.mean) != 3 or len(protocol.std) != 3 or protocol.size * max(protocol.scales) > LARGEST:
            raise ValueError(str(protocol))
        return protocol
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RuntimeError) as e:
        raise ValueError(f'The preprocessing of the index cannot be used ({printable(str(e))}): make the index '
                         'anew.') from e
