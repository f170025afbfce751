"""Which registered model a checkpoint's weights are of, told by the names and shapes of its trunk."""
from functools import cache

import timm
import torch

from .checkpoint import model_state

__all__ = ['recognize_model', 'trunk_shapes']

# the networks the original implementation can train, the frequent ones first
_CANDIDATES = (
    'multigrain_resnet50', 'multigrain_resnet18', 'multigrain_resnet34', 'multigrain_resnet101',
    'multigrain_resnet152', 'multigrain_senet154', 'multigrain_pnasnet5large', 'multigrain_nasnetamobile')


def recognize_model(state_dict: dict) -> str:
    """Name of the model whose trunk has exactly the weights of a checkpoint.

    Args:
        state_dict: The original's container or state dict, or a state dict of ours.

    Raises:
        ValueError: No network that the original implementation can train is like that.
    """
    found = trunk_shapes(model_state(state_dict))
    for name in _CANDIDATES:
        if _shapes_of(name) == found:
            return name
    if not found:
        raise ValueError(f'It is no checkpoint of the original implementation: it starts with {list(state_dict)[:3]}; '
                         'name the model that it is of.')
    raise ValueError(f'The trunk of the checkpoint ({len(found)} weights, {next(iter(found))!r} the first) is none '
                     f'of {", ".join(_CANDIDATES)}: name the model that it is of.')


def trunk_shapes(state: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a trunk's weights in a state dict of ours; counters, which old files lack, left out."""
    return {
        k: tuple(v.shape) for k, v in state.items() if k.startswith('trunk.') and not k.endswith('num_batches_tracked')}


@cache
def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):  # shapes without memory or arithmetic
        return trunk_shapes(timm.create_model(name).state_dict())
