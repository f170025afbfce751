"""The model and preprocessing of an index, recognised by its weights, and descriptors of pictures to search for."""
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from timm_multigrain.embed.embedder import Embedded, embed_images, in_order
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import check_json, printable
from timm_multigrain.images.pixels import decode, read_image
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.models.open import open_model, weights_sha256

from .records import DamagedIndex, OtherModel

SAVED = 'model'  # folder inside the index for a model that is not a file or folder here
LARGEST = 1 << 14  # pixels of a side
_OPTIONS = {'pool': (str, None), 'p': (float, None), 'pretrained': bool, 'ema': bool}


def describe_model(model: torch.nn.Module, source: str | None, options: Mapping[str, Any] | None = None) -> dict:
    """What an index keeps of its model, opened from a file or folder (an absolute path; None: it is saved inside the
    index) with these keyword arguments of `open_model`."""
    p = getattr(model.head.pool, 'p', None)
    return {
        'name': model.pretrained_cfg.get('architecture') or 'multigrain', 'trunk': model.trunk_name,
        'source': source, 'options': dict(options or {}), 'weights_sha256': weights_sha256(model),
        'pool': model.global_pool,
        'p': [float(x) for x in p.detach().reshape(-1)] if isinstance(p, torch.Tensor) else None,
        'whitening': model.embed_dim if model.whitened else None, 'dim': model.embed_dim,
        'num_classes': model.num_classes, 'label_names': label_names_of(model),
        'license': model.pretrained_cfg.get('license')}


def label_names_of(model: torch.nn.Module) -> list[str] | None:
    """Names of the model's classes: its own, ImageNet's where its weights are tagged as of that, or None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = model.pretrained_cfg
    names = cfg.get('label_names')
    if isinstance(names, dict):  # timm's form for rows with gaps between them
        return [names.get(str(row), str(row)) for row in range(model.num_classes)]
    if names and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is None or not re.search(r'in\d+k', cfg.get('tag') or ''):
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(row) for row in range(model.num_classes)]


def open_described(
        described: Mapping[str, Any],
        folder: Path | str,
        model: str | os.PathLike | torch.nn.Module | None = None,
        options: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """The model of an index as `describe_model` has described it.

    Args:
        model: A model, or what `open_model` opens, where the user says it is; None for where the index says it is.
        options: Of `open_model`, besides the index's own.

    Raises:
        OtherModel: It has other weights, or the index names something else than a file or folder.
        DamagedIndex: The model inside the index is a link, or has one in it.
        OSError, ValueError, RuntimeError: It cannot be opened.
    """
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    shown, own = model if isinstance(model, str) else 'This model', dict(described['options'])
    if own.keys() - _OPTIONS.keys():
        odd = printable(min(own.keys() - _OPTIONS.keys()))
        raise ValueError(f'The model of the index has options that an index does not have: {odd}.')
    check_json(own, {name: _OPTIONS[name] for name in own}, 'The options of its model')
    if isinstance(model, str):
        model = open_model(model, **{**own, **(options or {})})
    elif model is None:
        shown = described['source']
        if shown is None:
            shown, own = _saved(folder), {}
        elif not os.path.isabs(shown):
            raise OtherModel(f'{folder} says that its model is {printable(shown)}, which is not looked for, as the '
                             'index may be from anybody: if you trust it, name it with --model.')
        try:
            model = open_model(shown, **own)
        except FileNotFoundError as e:
            raise FileNotFoundError(f'The model of {folder} is not where it was ({e}): name it with --model, wherever '
                                    'it is now.') from e
    found = weights_sha256(model)
    if (found, model.global_pool) != (described['weights_sha256'], described['pool']):
        raise OtherModel(
            f'{shown} is not the model that {folder} was built with ({described["source"] or described["name"]}, '
            f'{described["pool"]} pooling, weights {described["weights_sha256"][:12]}..., not {model.global_pool}, '
            f'{found[:12]}...): descriptors of two models cannot be compared; use that one, or make another index.')
    return model


def _saved(folder: Path | str) -> str:
    path = Path(folder) / SAVED
    for each in [path, *(path.iterdir() if path.is_dir() and not path.is_symlink() else ())]:
        if os.path.lexists(each) and (each.is_symlink() or not (each.is_file() or each.is_dir())):
            raise DamagedIndex(each, 'it is not a file of its own')
    return str(path)


def protocol_from_json(value: Mapping) -> Protocol:
    """The preprocessing that an index names; ValueError if it cannot be used."""
    try:
        protocol = Protocol(**{key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})
        if not (isinstance(protocol.flip, bool) and isinstance(protocol.exif, bool)
                and len(protocol.mean) == len(protocol.std) == 3 and protocol.size * max(protocol.scales) <= LARGEST):
            raise ValueError(f'{value!r:.200}')
        return protocol
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RuntimeError) as e:
        raise ValueError(f'The preprocessing of the index cannot be used ({printable(str(e))}): make the index '
                         'anew.') from e


class Queries(ImageSource):
    """Files and pictures, the same part cut out of each."""

    def __init__(self, images: Sequence[str | os.PathLike | Image.Image], crop: Sequence[float] | None):
        self.images, self.crop = list(images), crop
        self.names = [f'picture {i}' if isinstance(image, Image.Image) else os.fspath(image)
                      for i, image in enumerate(self.images, 1)]

    def load(self, i: int, exif: bool = True) -> Image.Image:
        image = self.images[i]
        image = decode(image, exif) if isinstance(image, Image.Image) else read_image(image, exif=exif)
        return image if self.crop is None else cut(image, self.crop, self.names[i])


def cut(image: Image.Image, crop: Sequence[float], name: str) -> Image.Image:
    """The part (x, y, width, height) of a picture, what reaches beyond its edges left off; ValueError for nothing."""
    x, y, width, height = crop
    box = (max(0, round(x)), max(0, round(y)), min(image.width, round(x + width)), min(image.height, round(y + height)))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f'The crop {x:g},{y:g},{width:g},{height:g} has nothing of {name}, which is {image.width} x '
                         f'{image.height} pixels: give left, top, width and height within it.')
    return image.crop(box)


def embed_queries(
        model: torch.nn.Module,
        protocol: Protocol,
        images: Sequence[str | os.PathLike | Image.Image],
        crop: Sequence[float] | None = None,
) -> Embedded:
    """`Embedded` of files or pictures, in their order, with logits where the model has classes."""
    if not len(images):
        raise ValueError('No picture to search for: give at least one.')
    return in_order(list(embed_images(
        model, Queries(images, crop), protocol, logits=model.num_classes > 0, workers=0, progress=False)))
