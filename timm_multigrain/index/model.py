"""The model an index was built with: described in config.json, told from any other by the hash of its weights."""
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from timm_multigrain.files import check_json, printable
from timm_multigrain.models.open import open_model, weights_sha256

from .errors import DamagedIndex, OtherModel

__all__ = ['check_same_model', 'describe_model', 'label_names_of', 'open_described', 'options_of']

_OPTIONS = {'pool': (str, None), 'p': (float, None), 'pretrained': bool, 'ema': bool}
SAVED = 'model'  # folder inside the index for a model that is not a file or folder here


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


def open_described(described: Mapping[str, Any], folder: Path, device: str | None = None) -> torch.nn.Module:
    """The model of an index.

    Args:
        described: What `describe_model` has given.
        folder: The index.
        device: Where to put it.

    Raises:
        OtherModel: Its file or folder has other weights now, or the index names something else than a file or folder.
        DamagedIndex: The model inside the index is a link, or has one in it.
        OSError, ValueError, RuntimeError: It cannot be opened.
    """
    source, options = described['source'], options_of(described)
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
    check_same_model(described, model, folder, source)
    return model.to(device) if device else model


def options_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `open_model` that the model of an index was opened with.

    Raises:
        ValueError: They are others than `timm-multigrain index` has: some could make the model another one.
    """
    options = described['options']
    unknown = options.keys() - _OPTIONS.keys()
    if unknown:
        raise ValueError(f'The model of the index has options that an index has not: {printable(min(unknown))}.')
    check_json(options, {name: _OPTIONS[name] for name in options}, 'The options of its model')
    return dict(options)


def _saved(folder: Path) -> str:
    path = folder / SAVED
    for each in [path, *(path.iterdir() if path.is_dir() and not path.is_symlink() else ())]:
        if os.path.lexists(each) and (each.is_symlink() or not (each.is_file() or each.is_dir())):
            raise DamagedIndex(each, 'it is not a file of its own')
    return str(path)


def check_same_model(described: Mapping[str, Any], model: torch.nn.Module, folder: Path, shown: str) -> None:
    """Whether this is the model of an index.

    Raises:
        OtherModel: It is not.
    """
    found = weights_sha256(model)
    if (found, model.global_pool) != (described['weights_sha256'], described['pool']):
        raise OtherModel(
            f'{shown} is not the model that {folder} was built with ({described["source"] or described["name"]}, '
            f'{described["pool"]} pooling, weights {described["weights_sha256"][:12]}..., not {model.global_pool}, '
            f'{found[:12]}...): descriptors of two models cannot be compared; use that one, or make another index.')
