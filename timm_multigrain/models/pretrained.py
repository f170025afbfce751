"""Pretrained weights on their way into a model, through timm's builder: fetched, checked, and errors in one sentence.

timm reads, adapts and loads the weights. What it is given is always a file on the disk, or a dict: its own loader of
URLs neither notices a connection that was cut, nor a cut file in its cache, and falls back to unpickling without
restrictions where the restricted unpickler raises a TypeError.
"""
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg

from .checkpoint import checkpoint_filter_fn, model_state
from .weights import (
    UnreadableWeightsError,
    Weights,
    check_hash,
    check_numbers,
    reading_error,
    recognize_model,
    refuse_program,
    telling_line,
    trunk_shapes,
)

__all__ = ['build_pretrained', 'use_cached']

_INSTEAD = ('download it by other means and give the file: pretrained_cfg_overlay=dict(file=PATH), or '
            '--pretrained-path PATH of train.py')
_SAFE = 'model.safetensors'
_T = TypeVar('_T')


def build_pretrained(
        model_cls: type,
        variant: str,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        cache_dir: str | None = None,
        **kwargs,
) -> torch.nn.Module:
    """timm's ``build_model_with_cfg(..., pretrained=True)`` for a MultiGrain.

    Args:
        model_cls: The class, MultiGrain.
        variant: Registered name.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm; its url, file, state_dict or hf_hub_id is the source of the weights.
        cache_dir: As in timm: folder of downloads, None for torch's or huggingface_hub's own.
        **kwargs: The rest of what timm's builder takes.

    Raises:
        FileNotFoundError: There is no such file, here, on the server or on the Hub.
        ValueError: The weights are of another network or number of classes, or not finite.
        RuntimeError: No weights are known, or they cannot be downloaded or read.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)

    def build(weights: Weights) -> torch.nn.Module:
        # timm prefers the source 'hf-hub' to a file
        given = {**overlay, 'file': str(weights.path), 'source': None} if weights.replaces else overlay
        steps = _Steps(model_cls, variant, cfg, weights, adapted=bool(kwargs.get('features_only')))
        model = steps.run(
            pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=given, cache_dir=cache_dir, **kwargs)
        if weights.replaces:
            _restore_source(model.pretrained_cfg, cfg)
        return model

    if cfg.source == 'local-dir':
        path = Path(cfg.file) / _SAFE
        return build(Weights(f'{path if path.exists() else cfg.file}', path, 'save or convert the model again'))
    if cfg.source != 'hf-hub' and cfg.state_dict:
        return build(Weights('The given state_dict'))
    if cfg.source != 'hf-hub' and cfg.file:
        return build(Weights(f'{cfg.file}', Path(cfg.file), 'copy or download it again'))
    if cfg.hf_hub_id:
        chosen = bool(overlay.get('hf_hub_filename'))
        weights = _hub_weights(cfg, chosen, cache_dir)
        try:
            return build(weights)
        except UnreadableWeightsError:  # a copy that was damaged in the cache
            if not weights.path.is_symlink():  # huggingface_hub renews what links point to only
                weights.path.unlink()
            return build(_hub_weights(cfg, chosen, cache_dir, force_download=True))
    if cfg.url and isinstance(cfg.url, str):
        return use_cached(cfg.url, lambda path: build(_cached_weights(path, cfg.url)), cache_dir)
    return build_model_with_cfg(  # it says which model has no weights
        model_cls, variant, True, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay, **kwargs)


def use_cached(url: str, use: Callable[[Path], _T], cache_dir: str | None = None) -> _T:
    """Result of ``use(path)`` for the file of a URL, in the place where torch.hub and timm keep it.

    A file that was there and cannot be read is deleted and fetched once more.

    Raises:
        FileNotFoundError, RuntimeError: As `timm_multigrain.models.download.download`, and whatever ``use`` raises.
    """
    from .download import download

    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / (Path(urlparse(url).path).name or 'weights.pth')
    if path.exists():
        try:
            return use(path)
        except UnreadableWeightsError:
            path.unlink(missing_ok=True)
    download(url, path, _INSTEAD)
    try:
        return use(path)
    except UnreadableWeightsError:
        path.unlink(missing_ok=True)
        raise


class _Steps:
    """timm's builder, watched: the step that it is at tells what an error is about."""

    def __init__(self, model_cls: type, variant: str, cfg: PretrainedCfg, weights: Weights, adapted: bool):
        self.model_cls = model_cls
        self.variant = variant
        self.cfg = cfg
        self.weights = weights
        self.adapted = adapted
        self.step = 'create'

    def run(self, **kwargs) -> torch.nn.Module:
        kwargs['pretrained_filter_fn'] = self._convert
        try:
            if self.weights.path is not None and self.weights.path.is_file():
                refuse_program(self.weights.path)
                if self.cfg.source in ('local-dir', 'hf-hub') and self.weights.path.name == _SAFE:
                    check_hash(self.weights.path.parent)
            return build_model_with_cfg(self._create, self.variant, True, **kwargs)
        except Exception as e:
            if self.step == 'read' or isinstance(e, UnreadableWeightsError):
                raise reading_error(e, self.weights) from e
            if self.step == 'load' and isinstance(e, RuntimeError):
                raise RuntimeError(f'{self.weights.shown} cannot be loaded into {self.variant}: {telling_line(e)}; '
                                   'take the model that the weights are of.') from e
            raise

    def _create(self, **kwargs) -> torch.nn.Module:
        model = self.model_cls(**kwargs)
        self.step = 'read'
        return model

    def _convert(self, state_dict: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        self.step = 'convert'
        try:
            check_numbers(model_state(state_dict, own=model.state_dict()))
            state = checkpoint_filter_fn(state_dict, model)
            keeps_classes = not self.adapted and model.num_classes == self.cfg.num_classes
            _check_fits(state, model, self.variant, keeps_classes)
        except ValueError as e:
            raise ValueError(f'{self.weights.shown}: {e}') from e
        self.step = 'load'
        return state


def _check_fits(state: dict, model: torch.nn.Module, variant: str, keeps_classes: bool) -> None:
    """Refuse the weights of another network, which timm loads in part where the classes are to be others."""
    found, own = trunk_shapes(state), trunk_shapes(model.state_dict())
    odd = next((k for k in own if k not in found), None) or next((k for k in found if k not in own), None)
    # the channels of the image are timm's to adapt, and its to refuse
    odd = odd or next((k for k in own if (found[k][:1], found[k][2:]) != (own[k][:1], own[k][2:])), None)
    if odd is not None:
        raise ValueError(
            f'The weights are not those of the trunk {model.trunk_name!r}: {odd!r} is '
            f'{found.get(odd, "missing")} in them and {own.get(odd, "missing")} in the model; '
            f'{_suggestion(state, variant)}.')
    head = [k for k in model.state_dict() if k.startswith('head.') and k not in state]
    if not keeps_classes:
        head = [k for k in head if not k.startswith('head.fc.')]
    if head:
        raise ValueError(
            f'The weights lack {head[0]!r} of the model: add num_classes=-1 to pretrained_cfg_overlay to begin a new '
            'classifier, or take the model that they are of.')
    weight = state.get('head.fc.weight')
    if keeps_classes and weight is not None and len(weight) != model.num_classes:
        raise ValueError(
            f'The classifier is of {len(weight)} classes, the model of {model.num_classes}: add '
            f'num_classes={len(weight)} to pretrained_cfg_overlay to take the classifier too, num_classes=-1 to begin '
            f'one of {model.num_classes} classes.')


def _suggestion(state: dict, variant: str) -> str:
    try:
        name = recognize_model(state)
    except ValueError:
        name = variant
    return 'take the model that the weights are of' if name == variant else f'they are of {name}'


def _hub_weights(cfg: PretrainedCfg, chosen: bool, cache_dir: str | None, force_download: bool = False) -> Weights:
    """File of a Hub repository. Only the user, not the repository, can choose another format than safetensors.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: As `timm_multigrain.models.hub_errors.hub_errors`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    from .hub_errors import hub_errors

    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    filename = cfg.hf_hub_filename or _SAFE
    if cfg.source == 'hf-hub' and not chosen and not filename.endswith('.safetensors'):
        raise ValueError(f'{repo_id} names {filename} as its weights, which is not a safetensors file: if you trust '
                         f'it, add pretrained_cfg_overlay=dict(hf_hub_filename={filename!r}).')
    shown = f'{filename} of {cfg.hf_hub_id}'
    again = ' again, as the copy in the cache is damaged' if force_download else ''
    try:
        with hub_errors(f'{shown} could not be downloaded{again}', 'read it'):
            path = hf_hub_download(
                repo_id, filename, revision=revision or None, cache_dir=cache_dir, force_download=force_download)
    except FileNotFoundError as e:
        if cfg.hf_hub_filename or not isinstance(e.__cause__, EntryNotFoundError):
            raise
        raise FileNotFoundError(f'{e} Another file than {_SAFE} is read if you name it: '
                                'pretrained_cfg_overlay=dict(hf_hub_filename=NAME).') from e
    return Weights(shown, Path(path), 'tell its owner', replaces=True)


def _cached_weights(path: Path, url: str) -> Weights:
    return Weights(f'{path} (from {url})', path, f'it was deleted; check the address, or {_INSTEAD}', True)


def _restore_source(pretrained_cfg: dict, cfg: PretrainedCfg) -> None:
    """Let a model's configuration name the source again, not the file that it was read from."""
    for key in ('file', 'source'):
        value = getattr(cfg, key)
        if value is None:
            pretrained_cfg.pop(key, None)
        else:
            pretrained_cfg[key] = value
