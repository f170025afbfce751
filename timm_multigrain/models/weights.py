"""Weights of every origin as a state dict of ours: read without running code, renamed, checked, loaded through timm.

The original implementation saves `model_state` beside the optimizer. Its keys are `features.<trunk>`, `pool.p`,
`classifier.*` and, once whitened, `whitening.pca.pca_{m,P}`; the NASNets' bodies sit one level deeper.
"""
import argparse
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg_value, resolve_pretrained_cfg

from timm_multigrain.files import file_sha256

__all__ = [
    'CONFIG', 'SHA256', 'WEIGHTS', 'UnreadableWeightsError', 'build_pretrained', 'checkpoint_filter_fn', 'model_state',
    'new_classifier', 'read_checkpoint', 'recognize_model', 'starting_weights', 'telling_line', 'unwrapped',
    'weights_in']

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
SHA256 = 'weights_sha256'  # where config.json holds the hash of model.safetensors beside it

_logger = logging.getLogger(__name__)
_WRAPPERS = re.compile(r'^((_orig_mod|module)\.)+')  # of torch.compile and DistributedDataParallel, in any order
_BODY = ('features.0.base_net.', 'features.module.', 'features.')
_HEAD = {
    'classifier.weight': 'head.fc.weight',
    'classifier.bias': 'head.fc.bias',
    'pool.p': 'head.pool.p',
    'whitening.pca.pca_m': 'head.whitening.mean',
    'whitening.pca.pca_P': 'head.whitening.proj',
}
# the networks the original implementation can train, the frequent ones first
_CANDIDATES = tuple(f'multigrain_{trunk}' for trunk in (
    'resnet50', 'resnet18', 'resnet34', 'resnet101', 'resnet152', 'senet154', 'pnasnet5large', 'nasnetamobile'))
_BY_HAND = ('download it by other means and give the file: pretrained_cfg_overlay=dict(file=PATH), or '
            '--pretrained-path PATH of train.py')
_new_classifier = ContextVar('new_classifier', default=False)


class UnreadableWeightsError(RuntimeError):
    """A file that is not a checkpoint, or no longer one."""


def read_checkpoint(
        path: str | Path, shown: str | None = None, remedy: str = 'copy or download it again') -> Any:
    """What torch.save or safetensors wrote to a file: tensors, numbers, texts, and timm's arguments (a Namespace).

    Args:
        path: The file.
        shown: Its name in errors.
        remedy: What to do if it cannot be read, as the end of a sentence.

    Raises:
        FileNotFoundError: The file does not exist.
        UnreadableWeightsError: It is not a checkpoint, or a damaged one, or a program.
    """
    path = Path(path)
    shown = shown or f'{path}'
    if not path.exists():
        raise FileNotFoundError(f'{shown} does not exist: check the path of the weights.')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            if path.name == WEIGHTS:
                _check_hash(path)
            return load_file(path)
        _refuse_program(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped, so that the state of the optimizer is not read with the weights
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # damaged files raise nearly anything
        raise UnreadableWeightsError(f'{shown} cannot be read as weights: {_cause(e, path)}; {remedy}.') from e


def _refuse_program(path: Path) -> None:
    """Refuse a TorchScript archive: some versions of torch.load run it."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith('constants.pkl') or name.startswith('code/') or '/code/' in name for name in names):
        raise UnreadableWeightsError('it is a TorchScript program, which is never run')


def _check_hash(path: Path) -> None:
    """Whether a model.safetensors is the one that the config.json beside it was written with, if that says so."""
    try:
        expected = json.loads(path.with_name(CONFIG).read_text(encoding='utf-8')).get(SHA256)
    except (OSError, ValueError, AttributeError):
        return  # whoever reads the configuration says what is wrong with it
    if expected is not None and file_sha256(path) != expected:
        raise UnreadableWeightsError('it is not the file that config.json was saved with (its SHA-256 is another)')


def _cause(error: Exception, path: Path) -> str:
    if isinstance(error, UnreadableWeightsError):
        return str(error)
    if path.is_dir():
        return 'it is a folder'
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
    except OSError as e:
        return f'{e.strerror}'
    if not start:
        return 'the file is empty'
    if start.lstrip().startswith(b'<'):
        return 'it is a web page'
    if start[8:9] == b'{' and path.suffix != '.safetensors':
        return 'it may be safetensors, which are expected under a name that ends in .safetensors'
    code = re.search(r'GLOBAL ([\w.]+)', str(error))
    if code:
        return f'it asks to run Python code ({code[1]}), which is never done'
    return f'it is cut off, damaged or something else ({telling_line(error)})'


def telling_line(error: BaseException) -> str:
    """The line of an error that says most: torch's have headings and advice around it."""
    unpickling = re.search(r'WeightsUnpickler error:\s*([^\n]+)', str(error))
    if unpickling:
        return unpickling[1].rstrip('.:; ')
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1] if len(lines) > 1 and lines[0].startswith('Error(s) in loading') else lines[0]
    return line[:200].rstrip('.:; ')


def weights_in(checkpoint: Any, ema: bool = True) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, without prefixes of wrappers.

    Args:
        checkpoint: A state dict, or the container that train.py, timm or the original puts it in.
        ema: Take averaged weights, if there are any.

    Raises:
        ValueError: No weights, or a value is not a tensor of real numbers.
    """
    state = checkpoint if isinstance(checkpoint, dict) else {}
    containers = ('state_dict_ema', 'model_ema') * ema + ('state_dict', 'model', 'model_state')
    state = next((state[key] for key in containers if isinstance(state.get(key), dict)), state)
    if not any(isinstance(v, torch.Tensor) for v in state.values()):
        found = f'a {type(checkpoint).__name__}' if not isinstance(checkpoint, dict) else (
            f'only entries such as {list(checkpoint)[:4]}' if checkpoint else 'nothing')
        raise ValueError(f'The checkpoint has no weights, {found}.')
    _check_numbers(state)
    return unwrapped(state)


def model_state(checkpoint: Any, ema: bool = True, own: dict | None = None) -> dict[str, torch.Tensor]:
    """As `weights_in`, with the original's weights under our names.

    Args:
        checkpoint: As there.
        ema: As there.
        own: State dict of the model that will load it, to separate the original's names from a trunk's (DenseNet).

    Raises:
        ValueError: As there, or a key that the original does not have among its own.
    """
    state = weights_in(checkpoint, ema)
    original = 'classifier.weight' in state and any(
        k.startswith('features.') and f'trunk.{k}' not in (own or {}) for k in state)
    return _from_original(state) if original else state


def _check_numbers(state: dict) -> None:
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{name!r:.50} in its state dict is not the name of a weight.')
        if not isinstance(value, torch.Tensor):
            if not name.endswith('pool.p') or isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f'{name!r:.100} in its state dict is of type {type(value).__name__}, not a tensor.')
        elif value.is_complex() or value.is_quantized or value.layout != torch.strided:
            raise ValueError(f'{name!r:.100} in its state dict is a tensor of {value.dtype}, {value.layout}: plain '
                             'tensors of real numbers are needed.')


def unwrapped(state_dict: dict) -> dict:
    """A state dict without the prefixes of torch.compile and DistributedDataParallel; itself if it has none."""
    if not any(_WRAPPERS.match(str(k)) for k in state_dict):
        return state_dict  # with the versions of its modules, which torch keeps beside the keys
    return {_WRAPPERS.sub('', str(k)): v for k, v in state_dict.items()}


def _from_original(state: dict) -> dict:
    out = {}
    for k, v in state.items():
        body = next((b for b in _BODY if k.startswith(b)), None)
        if k in _HEAD:
            out[_HEAD[k]] = v
        elif body is None:
            raise ValueError(f'Key {k!r} does not belong to a checkpoint of the original implementation.')
        elif not k.removeprefix(body).startswith('last_linear.'):  # the storage of classifier.*, saved twice
            out[f'trunk.{k.removeprefix(body)}'] = v
    return out


def checkpoint_filter_fn(state_dict: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Convert a checkpoint for ``model``, a MultiGrain.

    A whitened checkpoint gives the model its whitening. The checkpoint's p goes with it, unless a fixed ``gem_p`` was
    asked for when the model was made.

    Args:
        state_dict: The original's container or bare state dict; timm weights of the trunk; or a state dict of ours;
            with or without the prefixes of torch.compile and DistributedDataParallel.
        model: The model that will load it.

    Raises:
        ValueError: Unknown keys, or a value is NaN or infinite (p alone may be infinite).
    """
    own = model.state_dict()
    state = dict(model_state(state_dict, own=own))
    if isinstance(state.get('head.pool.p'), int | float):
        state['head.pool.p'] = torch.tensor(float(state['head.pool.p']))
    _check_finite(state)
    if not any(k.startswith('trunk.') for k in state):
        state = _from_trunk(state, model)
    proj = state.get('head.whitening.proj')
    if proj is not None and proj.shape[1] != getattr(model.head.whitening, 'out_features', None):
        model.set_whitening(proj.shape[1])
    own_p = own.get('head.pool.p')
    if own_p is None:  # a pooling without exponent
        state.pop('head.pool.p', None)
    elif model.fixed_p or 'head.pool.p' not in state:
        state['head.pool.p'] = own_p
    elif state['head.pool.p'].numel() == 1:  # for each channel, where the model has one per channel
        state['head.pool.p'] = state['head.pool.p'].detach().reshape(()).expand(own_p.shape).clone()
    return state


def _check_finite(state: dict) -> None:
    for k, v in state.items():
        if not isinstance(v, torch.Tensor) or not v.is_floating_point():
            continue
        if k == 'head.pool.p':
            if not (v > 0).all():
                raise ValueError(f'The exponent p in the checkpoint is {v.tolist()}: only p > 0 can be pooled with.')
        elif not torch.isfinite(v).all():
            raise ValueError(
                f'{k!r} in the checkpoint holds {"NaN" if v.isnan().any() else "infinity"}: its training diverged or '
                'the file is damaged, take another one.')


def _from_trunk(state: dict, model: torch.nn.Module) -> dict:
    """timm's weights of the trunk; its classifier is a start for ours where the embedding has the same channels."""
    own = model.state_dict()
    counters = {k: v for k, v in own.items() if k.endswith('num_batches_tracked')}
    out = counters | {f'trunk.{k}': v for k, v in state.items() if f'trunk.{k}' in own}
    missing = [k for k in own if k.startswith('trunk.') and k not in out]
    if missing:
        raise ValueError(
            f'The checkpoint is neither a MultiGrain one nor weights of the trunk {model.trunk_name!r}: it lacks '
            f'{missing[0].removeprefix("trunk.")!r} and {len(missing) - 1} more, and starts with {list(state)[:3]}.')
    classifier = get_pretrained_cfg_value(model.trunk_name, 'classifier')
    for name in ('weight', 'bias'):
        value, ours = state.get(f'{classifier}.{name}'), own.get(f'head.fc.{name}')
        if ours is not None:
            out[f'head.fc.{name}'] = value if value is not None and value.shape[1:] == ours.shape[1:] else ours
    return out


@contextmanager
def new_classifier() -> Iterator[None]:
    """While this is open, `MultiGrain.load_state_dict` leaves out a classifier of another number of classes.

    For the weights that a training starts from; elsewhere a classifier that is left out would be a random one.
    """
    token = _new_classifier.set(True)
    try:
        yield
    finally:
        _new_classifier.reset(token)


def starting_weights(state: dict, model: torch.nn.Module) -> dict:
    """A state dict of ours; within `new_classifier` with the model's classifier in place of one of other classes."""
    own = model.state_dict()
    names = [k for k in ('head.fc.weight', 'head.fc.bias') if k in state or k in own]
    if not _new_classifier.get() or all(k in own and k in state and own[k].shape == state[k].shape for k in names):
        return state
    found = f'{len(state[names[0]])} classes' if names[0] in state else 'no classes'
    _logger.info(f'The starting weights have {found}, the model {model.num_classes}: its classifier starts anew.')
    return {**{k: v for k, v in state.items() if k not in names}, **{k: own[k] for k in names if k in own}}


def recognize_model(state: dict) -> str:
    """Name of the model whose trunk has exactly the weights of a `model_state`.

    Raises:
        ValueError: Not a network that the original implementation can train.
    """
    found = _trunk_shapes(state)
    for name in _CANDIDATES:
        if _shapes_of(name) == found:
            return name
    if not found:
        raise ValueError('It is not a checkpoint of the original implementation: it starts with '
                         f'{list(state)[:3]}; name the model that it is of.')
    raise ValueError(f'The trunk of the checkpoint ({len(found)} weights, {next(iter(found))!r} the first) matches '
                     f'none of {", ".join(_CANDIDATES)}: name the model that it is of.')


def _trunk_shapes(state: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a trunk's weights; counters, which old files lack, left out."""
    return {
        k: tuple(v.shape) for k, v in state.items() if k.startswith('trunk.') and not k.endswith('num_batches_tracked')}


@cache
def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):  # shapes without memory or arithmetic
        return _trunk_shapes(timm.create_model(name).state_dict())


def build_pretrained(
        model_cls: type,
        variant: str,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        cache_dir: str | None = None,
        **kwargs,
) -> torch.nn.Module:
    """timm's ``build_model_with_cfg(..., pretrained=True)`` for a MultiGrain.

    The weights are read here: timm's loaders notice neither a connection that was cut nor a program.

    Args:
        model_cls: The class, MultiGrain.
        variant: Registered name.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm; its url, file, state_dict or hf_hub_id is the source of the weights.
        cache_dir: As in timm: folder of downloads, None for torch's or huggingface_hub's own.
        **kwargs: The rest of what timm's builder takes.

    Raises:
        FileNotFoundError: File not found, here, on the server or on the Hub.
        ValueError: The weights are of another network or number of classes, or not finite.
        RuntimeError: No weights are known, or they cannot be downloaded or read.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    found = _read_source(cfg, bool(overlay.get('hf_hub_filename')), cache_dir)
    if found is None:  # timm reports the missing weights
        return build_model_with_cfg(
            model_cls, variant, True, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay, **kwargs)
    checkpoint, shown = found

    def convert(_: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        try:
            state = checkpoint_filter_fn(checkpoint, model)
            _check_fits(state, model, not kwargs.get('features_only') and model.num_classes == cfg.num_classes)
        except ValueError as e:
            raise ValueError(f'{shown}: {e}') from e
        return state

    try:
        model = build_model_with_cfg(
            model_cls, variant, True, pretrained_cfg=pretrained_cfg, pretrained_filter_fn=convert,
            # timm would copy a state dict in its configuration: it gets the weights from the filter
            pretrained_cfg_overlay={**overlay, 'source': None, 'state_dict': {'read': True}}, **kwargs)
    except RuntimeError as e:
        if 'loading state_dict' not in str(e) and 'weight shape' not in str(e):
            raise
        raise RuntimeError(f'{shown} cannot be loaded into {variant}: {telling_line(e)}; take the model that the '
                           'weights are of.') from e
    del model.pretrained_cfg['state_dict']
    if cfg.source is not None:
        model.pretrained_cfg['source'] = cfg.source
    return model


def _read_source(
        cfg: PretrainedCfg, chosen: bool, cache_dir: str | None, again: bool = True) -> tuple[Any, str] | None:
    """The checkpoint that a configuration names, and its name in errors; None if it names none.

    ``chosen``: the user named the file in the repository of the Hub. ``again``: a damaged file in a cache is deleted
    and downloaded once more.
    """
    if cfg.source == 'local-dir':
        path = Path(cfg.file) / WEIGHTS
        return read_checkpoint(path, remedy='save or convert the model again'), f'{path}'
    if cfg.source != 'hf-hub' and cfg.state_dict:
        return cfg.state_dict, 'The given state_dict'
    if cfg.source != 'hf-hub' and cfg.file:
        return read_checkpoint(cfg.file), f'{cfg.file}'
    if cfg.hf_hub_id:
        path, shown = _hub_file(cfg, chosen, cache_dir), f'{cfg.hf_hub_filename or WEIGHTS} of {cfg.hf_hub_id}'
    elif cfg.url and isinstance(cfg.url, str):
        from .download import cached
        path = cached(cfg.url, cache_dir, _BY_HAND)
        shown = f'{path} (from {cfg.url})'
    else:
        return None
    try:
        return read_checkpoint(path, shown, f'it was deleted: load it again, or {_BY_HAND}'), shown
    except UnreadableWeightsError:
        path.resolve().unlink(missing_ok=True)
        if not again:
            raise
        return _read_source(cfg, chosen, cache_dir, again=False)


def _hub_file(cfg: PretrainedCfg, chosen: bool, cache_dir: str | None) -> Path:
    """File of a Hub repository. Only the user, not the repository, can choose another format than safetensors."""
    from huggingface_hub import hf_hub_download

    from .download import hub_errors

    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    filename = cfg.hf_hub_filename or WEIGHTS
    if cfg.source == 'hf-hub' and not chosen and not filename.endswith('.safetensors'):
        raise ValueError(f'{repo_id} names {filename} as its weights, which is not a safetensors file: if you trust '
                         f'it, add pretrained_cfg_overlay=dict(hf_hub_filename={filename!r}).')
    with hub_errors(f'{filename} of {cfg.hf_hub_id} could not be downloaded', 'read it'):
        return Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))


def _check_fits(state: dict, model: torch.nn.Module, keeps_classes: bool) -> None:
    """Refuse the weights of another network, which timm loads in part where the classes are to be others."""
    found, own = _trunk_shapes(state), _trunk_shapes(model.state_dict())
    odd = next((k for k in [*own, *found] if k not in found or k not in own), None)
    # the channels of the image are timm's to adapt, and its to refuse
    odd = odd or next((k for k in own if (found[k][:1], found[k][2:]) != (own[k][:1], own[k][2:])), None)
    if odd is not None:
        raise ValueError(
            f'The weights are not those of the trunk {model.trunk_name!r}: {odd!r} is {found.get(odd, "missing")} in '
            f'them and {own.get(odd, "missing")} in the model; take the model that the weights are of.')
    lacking = [k for k in model.state_dict() if k.startswith('head.') and k not in state
               and (keeps_classes or not k.startswith('head.fc.'))]
    if lacking:
        raise ValueError(
            f'The weights lack {lacking[0]!r} of the model: add num_classes=-1 to pretrained_cfg_overlay to begin a '
            'new classifier, or take the model that they are of.')
    weight = state.get('head.fc.weight')
    if keeps_classes and weight is not None and len(weight) != model.num_classes:
        raise ValueError(
            f'The classifier is of {len(weight)} classes, the model of {model.num_classes}: add '
            f'num_classes={len(weight)} to pretrained_cfg_overlay to take the classifier too, num_classes=-1 to begin '
            f'one of {model.num_classes} classes.')
