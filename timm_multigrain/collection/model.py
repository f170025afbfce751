"""The model an index was built with: described in config.json, told from any other by the hash of its weights."""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from timm_multigrain.models.open import open_model, weights_sha256

from .errors import OtherModel

__all__ = ['check_same_model', 'describe_model', 'label_names_of', 'open_described']

SAVED = 'model'  # folder inside the index for a model that no name leads back to


def describe_model(model: torch.nn.Module, source: str | None, options: Mapping[str, Any] | None = None) -> dict:
    """What an index keeps of its model.

    Args:
        model: The MultiGrain.
        source: What `open_model` opens it by; None if it is saved inside the index.
        options: Keyword arguments of `open_model`.
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
        OtherModel: What its name leads to has other weights now.
        OSError, ValueError, RuntimeError: It cannot be opened.
    """
    source = described['source'] or str(folder / SAVED)
    try:
        model = open_model(source, **described['options'])
    except FileNotFoundError as e:
        raise FileNotFoundError(f'The model of {folder} is not where it was ({e}): name it with --model, wherever it '
                                'is now.') from e
    check_same_model(described, model, folder, source)
    return model.to(device) if device else model


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
