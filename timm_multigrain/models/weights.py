"""Weights of every origin as a state dict of ours: read without running code, renamed, checked, loaded through timm.

The original implementation saves `model_state` beside the optimizer. Its keys are `features.<trunk>`, `pool.p`,
`classifier.*` and, once whitened, `whitening.pca.pca_{m,P}`; the NASNets' bodies sit one level deeper.
"""
import argparse
import json
import logging
import re
import zipfile
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg_value, resolve_pretrained_cfg

from timm_multigrain.files import check_json, file_sha256

from .download import download, hub_errors

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
SHA256 = 'weights_sha256'  # where config.json holds the hash of model.safetensors beside it

_logger = logging.getLogger(__name__)
_WRAPPERS = re.compile(r'^((_orig_mod|module)\.)+')  # of torch.compile and DistributedDataParallel, in any order
_BODY = re.compile(r'^features\.(0\.base_net\.|module\.)?')
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


# --- files


class UnreadableWeightsError(RuntimeError):
    """A file that is not a checkpoint, or no longer one."""


def read_checkpoint(path: str | Path, shown: str | None = None) -> Any:
    """What torch.save or safetensors wrote to a file: tensors, numbers, texts, and timm's arguments (a Namespace).

    Errors name the file as ``shown``: a FileNotFoundError, or an UnreadableWeightsError if it is not a checkpoint, a
    damaged one, or a program.
    """
    path, shown = Path(path), shown or f'{path}'
    if not path.exists():
        raise FileNotFoundError(f'{shown} does not exist: check the path of the weights.')
    start = b''
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
        if path.suffix == '.safetensors' or start[8:9] == b'{':
            if path.name == WEIGHTS:
                _check_hash(path)
            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        names = zipfile.ZipFile(path).namelist() if zipped else []
        if any(name.endswith('constants.pkl') or '/code/' in f'/{name}' for name in names):
            raise UnreadableWeightsError('it is a TorchScript program, which is never run')  # as some torch.load do
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped, so that the state of the optimizer is not read with the weights
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except Exception as e:  # damaged files raise nearly anything
        code = re.search(r'GLOBAL ([\w.]+)', str(e))
        cause = ('it is a web page' if start.lstrip().startswith(b'<') else
                 f'it asks to run Python code ({code[1]}), which is never done' if code else
                 telling_line(e) if isinstance(e, UnreadableWeightsError | OSError) else
                 f'it is cut off, damaged or something else ({telling_line(e)})')
        raise UnreadableWeightsError(
            f'{shown} cannot be read as weights: {cause}; save, copy or download it again.') from e


def _check_hash(path: Path) -> None:
    """Whether a model.safetensors is the one that the config.json beside it was written with, if that says so."""
    try:
        expected = json.loads(path.with_name(CONFIG).read_text(encoding='utf-8')).get(SHA256)
    except (OSError, ValueError, AttributeError):
        return  # whoever reads the configuration says what is wrong with it
    if expected is not None and file_sha256(path) != expected:
        raise UnreadableWeightsError('it is not the file that config.json was saved with (its SHA-256 is another)')


def telling_line(error: BaseException) -> str:
    """The line of an error that says most: torch's have headings and advice around it."""
    unpickling = re.search(r'WeightsUnpickler error:\s*([^\n]+)', str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1] if len(lines) > 1 and lines[0].startswith('Error(s) in loading') else lines[0]
    return (unpickling[1] if unpickling else line)[:200].rstrip('.:; ')


# --- what a file says beside the weights

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
        values = value if isinstance(value, list) else [value]
        if ((key in _SIZES and not (len(values) == 3 and all(0 < side <= _LARGEST for side in values)))
                or (key in _POSITIVE and not all(number > 0 for number in values))
                or (key in ('mean', 'std') and not values)
                or (isinstance(value, dict) and not all(row.isdecimal() for row in value))):
            raise ValueError(f'{key} of the configuration is {value!r:.200}.')


# --- state dicts


def is_multigrain(state: dict) -> bool:
    """Whether a state dict has our names."""
    return any(k.startswith('trunk.') for k in state)


def weights_in(checkpoint: Any, ema: bool = True) -> dict[str, torch.Tensor]:
    """The state dict in the container of train.py, timm or the original, averaged if it has that and ``ema``.

    Without the prefixes of torch.compile and DistributedDataParallel; a ValueError if it holds anything but tensors of
    real numbers.
    """
    state = checkpoint if isinstance(checkpoint, dict) else {}
    containers = ('state_dict_ema', 'model_ema') * ema + ('state_dict', 'model', 'model_state')
    state = next((state[key] for key in containers if isinstance(state.get(key), dict)), state)
    if not any(isinstance(v, torch.Tensor) for v in state.values()):
        found = f'only entries such as {list(state)[:4]}' if state else f'a {type(checkpoint).__name__}'
        raise ValueError(f'The checkpoint has no weights, {found}.')
    odd = next((k for k, v in state.items() if not (isinstance(k, str) and _is_real(v))), None)
    if odd is not None:
        raise ValueError(f'{odd!r:.100} in its state dict is not a plain tensor of real numbers.')
    return unwrapped(state)


def unwrapped(state: dict) -> dict:
    """A state dict without the prefixes of torch.compile and DistributedDataParallel; itself if it has none."""
    if not any(_WRAPPERS.match(k) for k in state):
        return state  # with the versions of its modules, which torch keeps beside the keys
    return {_WRAPPERS.sub('', k): v for k, v in state.items()}


def _is_real(value: Any) -> bool:
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided
            and not value.is_complex() and not value.is_quantized)


def model_state(checkpoint: Any, ema: bool = True, own: dict | None = None) -> dict[str, torch.Tensor]:
    """As `weights_in`, with the original's weights, and SSCD's, under our names.

    ``own``, the state dict of the model that will load it, separates the original's names from a trunk's (DenseNet).
    """
    state = weights_in(checkpoint, ema)
    if is_sscd(state):
        return _from_sscd(state)
    if 'classifier.weight' not in state or not any(
            k.startswith('features.') and f'trunk.{k}' not in (own or {}) for k in state):
        return state
    # last_linear is the storage of classifier.*, saved twice
    state = {k: v for k, v in state.items() if not _BODY.sub('', k).startswith('last_linear.')}
    foreign = next((k for k in state if k not in _HEAD and not k.startswith('features.')), None)
    if foreign is not None:
        raise ValueError(f'Key {foreign!r} does not belong to a checkpoint of the original implementation.')
    return {_HEAD.get(k) or _BODY.sub('trunk.', k): v for k, v in state.items()}


# --- SSCD, "A Self-Supervised Descriptor for Image Copy Detection" (Pizzi et al., arXiv 2202.10261): a ResNet of
# torchvision, GeM with p = 3, a linear layer to 512 components, L2

SSCD_CFG = {  # shorter side 288, of which the authors cut nothing off
    'input_size': (3, 288, 288), 'crop_pct': 1., 'interpolation': 'bilinear', 'paper_ids': 'arXiv:2202.10261',
    'paper_name': 'A Self-Supervised Descriptor for Image Copy Detection',
    'origin_url': 'https://github.com/facebookresearch/sscd-copy-detection'}


def is_sscd(state: dict) -> bool:
    """Whether a state dict is one of SSCD's files for torchvision."""
    return all(k.startswith('backbone.') for k in state) and len(state.get('backbone.fc.weight', ())) == 512


def _from_sscd(state: dict) -> dict:
    """The linear layer W e + b as a whitening without mean, [W, b] [e; 1] / |[e; 1]|: L2 makes them the same."""
    fc = torch.cat([state['backbone.fc.weight'], state['backbone.fc.bias'][:, None]], 1)
    trunk = {k.replace('backbone.', 'trunk.', 1): v for k, v in state.items() if not k.startswith('backbone.fc.')}
    return trunk | {'head.pool.p': torch.tensor([3.]), 'head.whitening.mean': torch.zeros(fc.shape[1]),
                    'head.whitening.proj': fc.mT.contiguous()}


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
    for k, v in state.items():
        if k == 'head.pool.p' and not (v > 0).all():
            raise ValueError(f'The exponent p in the checkpoint is {v.tolist()}: only p > 0 can be pooled with.')
        ours = own.get(k, own.get(f'trunk.{k}', torch.zeros(1)))  # Gemma's bounds are infinite as they are made
        if k != 'head.pool.p' and v.is_floating_point() and not v.isfinite().all() and ours.isfinite().all():
            raise ValueError(f'{k!r} in the checkpoint holds NaN or infinity: its training diverged or the file is '
                             'damaged, take another one.')
    if not is_multigrain(state):
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
            value = value.flatten(1) if value is not None and value.ndim == 4 else value  # of a 1 x 1 convolution
            out[f'head.fc.{name}'] = value if value is not None and value.shape[1:] == ours.shape[1:] else ours
    return out


def load_starting_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Load the file that a training of a MultiGrain starts from, but for a classifier of other classes (logged)."""
    state, own = checkpoint_filter_fn(read_checkpoint(path), model), model.state_dict()
    fc = {k: v for k, v in own.items() if k.startswith('head.fc.')}
    given = {k: v for k, v in state.items() if k.startswith('head.fc.')}
    if {k: v.shape for k, v in fc.items()} != {k: v.shape for k, v in given.items()}:
        found = len(given['head.fc.weight']) if given else 'no'
        _logger.info(f'The starting weights have {found} classes, the model {model.num_classes}: its classifier starts '
                     'anew.')
        state = {k: v for k, v in state.items() if k not in given} | fc
    model.load_state_dict(state)


# --- networks


def recognize_model(state: dict) -> str:
    """Name of the model whose trunk has exactly these weights; ValueError unless the original could train it."""
    found = _shapes(state, 'trunk.')
    for name in _CANDIDATES:
        if _shapes_of(name) == found:
            return name
    raise ValueError(
        f'The trunk of the checkpoint ({len(found)} weights) matches none of {", ".join(_CANDIDATES)}; it starts with '
        f'{list(state)[:3]}: name the model that it is of, by timm-multigrain convert FILE --model NAME.')


def _shapes(state: dict, prefix: str = '') -> dict[str, tuple[int, ...]]:
    """Names and shapes of weights; counters, which old files lack, left out."""
    return {k: tuple(v.shape) for k, v in state.items()
            if k.startswith(prefix) and not k.endswith('num_batches_tracked')}


@cache
def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):  # shapes without memory or arithmetic
        return _shapes(timm.create_model(name).state_dict(), 'trunk.')


def _check_fits(state: dict, model: torch.nn.Module, keeps_classes: bool) -> None:
    """Refuse the weights of another network, which timm loads in part where the classes are to be others."""
    own, found = _shapes(model.state_dict()), _shapes(state)
    for key in dict.fromkeys([*own, *found]):
        ours, theirs = own.get(key), found.get(key)
        of_classes = key.startswith('head.fc.')
        adapted = ours and theirs and len(ours) == 4 and ours[:1] + ours[2:] == theirs[:1] + theirs[2:]
        # the channels of the image are timm's to adapt, and its to refuse
        if ours == theirs or adapted or (of_classes and not keeps_classes):
            continue
        way_out = 'take the model that the weights are of'
        if of_classes:
            way_out = 'add num_classes=-1 to pretrained_cfg_overlay to begin a new classifier' + (
                f', num_classes={theirs[0]} to take theirs' if theirs else '')
        raise ValueError(f'the weights are not those of {model.trunk_name}: {key!r} is {theirs or "missing"} in them '
                         f'and {ours or "missing"} in the model; {way_out}.')


# --- timm's pretrained=True


def build_pretrained(
        model_cls: type,
        variant: str,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        cache_dir: str | None = None,
        **kwargs,
) -> torch.nn.Module:
    """timm's ``build_model_with_cfg(..., pretrained=True)`` for a MultiGrain.

    The weights are read here: timm's loaders notice neither a connection that was cut nor a program. Arguments as in
    timm; url, file, state_dict or hf_hub_id of the configuration is the source of the weights.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    checkpoint, shown = _read_source(cfg, 'hf_hub_filename' in overlay, cache_dir)
    build = partial(build_model_with_cfg, model_cls, variant, True, pretrained_cfg=pretrained_cfg, **kwargs)
    if checkpoint is None:  # timm reports the missing weights
        return build(pretrained_cfg_overlay=overlay)

    def convert(_: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        try:
            state = checkpoint_filter_fn(checkpoint, model)
            _check_fits(state, model, not kwargs.get('features_only') and model.num_classes == cfg.num_classes)
        except ValueError as e:
            raise ValueError(f'{shown}: {e}') from e
        return state

    # timm would copy a state dict in its configuration: it gets the weights from the filter
    model = build(pretrained_filter_fn=convert,
                  pretrained_cfg_overlay={**overlay, 'source': None, 'state_dict': {'read': True}})
    del model.pretrained_cfg['state_dict']
    if cfg.source is not None:
        model.pretrained_cfg['source'] = cfg.source
    return model


def _read_source(cfg: PretrainedCfg, chosen: bool, cache_dir: str | None) -> tuple[Any, str]:
    """The checkpoint that a configuration names, None if it names none, and its name in errors.

    ``chosen``: the user named the file in the repository of the Hub.
    """
    if cfg.source != 'hf-hub' and cfg.state_dict:
        return cfg.state_dict, 'The given state_dict'
    if cfg.source != 'hf-hub' and cfg.file:
        path = Path(cfg.file) / WEIGHTS if cfg.source == 'local-dir' else cfg.file
        return read_checkpoint(path), f'{path}'
    if not cfg.hf_hub_id and not cfg.url:
        return None, ''
    for last in (False, True):
        path, shown = _hub_file(cfg, chosen, cache_dir) if cfg.hf_hub_id else _url_file(cfg.url, cache_dir)
        try:
            return read_checkpoint(path, shown), shown
        except UnreadableWeightsError:
            path.resolve().unlink(missing_ok=True)  # damaged in the cache: once more
            if last:
                raise
    return None, ''


def _url_file(url: str, cache_dir: str | None) -> tuple[Path, str]:
    """The file of a URL, in the place where torch.hub and timm keep it, and its name in errors."""
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / (Path(urlparse(url).path).name or 'weights.pth')
    return path if path.exists() else download(url, path, _BY_HAND), f'{path} (from {url})'


def _hub_file(cfg: PretrainedCfg, chosen: bool, cache_dir: str | None) -> tuple[Path, str]:
    """File of a Hub repository. Only the user, not the repository, can choose another format than safetensors."""
    from huggingface_hub import hf_hub_download

    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    filename = cfg.hf_hub_filename or WEIGHTS
    if cfg.source == 'hf-hub' and not chosen and not filename.endswith('.safetensors'):
        raise ValueError(f'{repo_id} names {filename} as its weights, which is not a safetensors file: if you trust '
                         f'it, add pretrained_cfg_overlay=dict(hf_hub_filename={filename!r}).')
    shown = f'{filename} of {cfg.hf_hub_id}'
    with hub_errors(f'{shown} could not be downloaded'):
        return Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir)), shown
