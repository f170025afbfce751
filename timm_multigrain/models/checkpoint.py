"""Checkpoints of every origin as a state dict of ours: the original's containers and keys, timm's trunks, our own.

The original implementation saves `model_state` beside the optimizer. Its keys are `features.<trunk>`, `pool.p`,
`classifier.*` and, once whitened, `whitening.pca.pca_{m,P}`; the NASNets' bodies sit one level deeper.
"""
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from timm.models import get_pretrained_cfg_value

__all__ = ['checkpoint_filter_fn', 'model_state', 'new_classifier', 'starting_weights', 'unwrapped']

_logger = logging.getLogger(__name__)
_WRAPPERS = re.compile(r'^((_orig_mod|module)\.)+')  # of torch.compile and DistributedDataParallel, in any order
_new_classifier = ContextVar('new_classifier', default=False)

_BODY = ('features.0.base_net.', 'features.module.', 'features.')
_HEAD = {
    'classifier.weight': 'head.fc.weight',
    'classifier.bias': 'head.fc.bias',
    'pool.p': 'head.pool.p',
    'whitening.pca.pca_m': 'head.whitening.mean',
    'whitening.pca.pca_P': 'head.whitening.proj',
}


def checkpoint_filter_fn(state_dict: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Convert a checkpoint for ``model``, a MultiGrain.

    A whitened checkpoint gives the model its whitening. The checkpoint's p goes with it, unless a fixed ``gem_p`` was
    asked for when the model was made.

    Args:
        state_dict: The original's container or bare state dict; timm weights of the trunk; or a state dict of ours;
            with or without the prefixes of torch.compile and DistributedDataParallel.
        model: The model that will load it.

    Raises:
        ValueError: The keys are of none of these, or a value is NaN or infinite (p alone may be infinite).
    """
    state = model_state(state_dict, own=model.state_dict())
    if isinstance(state.get('head.pool.p'), int | float):
        state['head.pool.p'] = torch.tensor(float(state['head.pool.p']))
    _check_finite(state)
    if not any(k.startswith('trunk.') for k in state):
        state = _from_trunk(state, model)
    if 'head.whitening.proj' in state and state['head.whitening.proj'].shape[1] != getattr(
            model.head.whitening, 'out_features', None):
        model.set_whitening(state['head.whitening.proj'].shape[1])
    own_p = model.state_dict().get('head.pool.p')
    if own_p is None:  # a pooling without exponent
        state.pop('head.pool.p', None)
    elif model.fixed_p or 'head.pool.p' not in state:
        state['head.pool.p'] = own_p
    elif state['head.pool.p'].numel() == 1:  # for each channel, where the model has one a channel
        state['head.pool.p'] = state['head.pool.p'].detach().reshape(()).expand(own_p.shape).clone()
    return state


def model_state(state_dict: dict, own: dict | None = None) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, the original's under our names, others under their own.

    Args:
        state_dict: As for `checkpoint_filter_fn`.
        own: State dict of the model that will load it, to tell the original's names from a trunk's (timm's DenseNet).

    Raises:
        ValueError: There are none, or a key that the original does not have among its own.
    """
    state = state_dict.get('model_state', state_dict) if isinstance(state_dict, dict) else {}
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        entries = f'only entries such as {list(state_dict)[:4]}' if state_dict else 'nothing'
        raise ValueError(f'The checkpoint holds no weights, {entries}.')
    state = unwrapped(state)
    original = 'classifier.weight' in state and any(
        k.startswith('features.') and f'trunk.{k}' not in (own or {}) for k in state)
    return _from_original(state) if original else state


def unwrapped(state_dict: dict) -> dict:
    """A state dict without the prefixes of torch.compile and DistributedDataParallel; itself if it has none."""
    if not any(_WRAPPERS.match(str(k)) for k in state_dict):
        return state_dict  # with the versions of its modules, which torch keeps beside the keys
    return {_WRAPPERS.sub('', str(k)): v for k, v in state_dict.items()}


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


def _from_original(state: dict) -> dict:
    out = {}
    for k, v in state.items():
        if k in _HEAD:
            out[_HEAD[k]] = v
            continue
        body = next((b for b in _BODY if k.startswith(b)), None)
        if body is None:
            raise ValueError(f'Key {k!r} does not belong to a checkpoint of the original implementation.')
        name = k.removeprefix(body)
        if name.startswith('last_linear.'):  # the same storage as classifier.*, saved twice
            continue
        out[f'trunk.{name}'] = v
    return out


def _from_trunk(state: dict, model: torch.nn.Module) -> dict:
    """timm's weights of the trunk; its classifier is a start for ours where the embedding has the same channels."""
    own = model.state_dict()
    out = {f'trunk.{k}': v for k, v in state.items() if f'trunk.{k}' in own}
    missing = [k for k in own if k.startswith('trunk.') and k not in out and not k.endswith('num_batches_tracked')]
    if missing:
        raise ValueError(
            f'The checkpoint is neither a MultiGrain one nor weights of the trunk {model.trunk_name!r}: it lacks '
            f'{missing[0].removeprefix("trunk.")!r} and {len(missing) - 1} more, and starts with {list(state)[:3]}.')
    classifier = get_pretrained_cfg_value(model.trunk_name, 'classifier')
    for name in ('weight', 'bias'):
        value = state.get(f'{classifier}.{name}')
        ours = own.get(f'head.fc.{name}')
        if ours is not None:
            out[f'head.fc.{name}'] = value if value is not None and value.shape[1:] == ours.shape[1:] else ours
    return {**{k: v for k, v in own.items() if k.endswith('num_batches_tracked')}, **out}
