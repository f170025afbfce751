"""Files as the original implementation's saver writes them, around the state dicts of `original`."""
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


def container(state: dict) -> dict:
    """What is saved after an epoch of training: beside the weights, two optimizers and beta."""
    numbers = {k: v for k, v in state.items() if v.is_floating_point() and k != 'pool.p'}
    ids = {k: 140104483430480 + 16 * i for i, k in enumerate(numbers)}  # addresses, as torch 1.0 wrote them
    group = dict(lr=0.2, momentum=0.9, dampening=0, weight_decay=1e-4, nesterov=False)
    return {
        'model_state': OrderedDict(state),
        'optimizer_state': OrderedDict({
            'backbone.state': {ids[k]: {'momentum_buffer': torch.zeros_like(v)} for k, v in list(numbers.items())[:3]},
            'backbone.param_groups': [dict(group, params=list(ids.values()))],
            'margin_beta.state': {1: {'momentum_buffer': torch.zeros(())}},
            'margin_beta.param_groups': [dict(group, weight_decay=0, params=[1])]}),
        'extra': {'beta': torch.nn.Parameter(torch.tensor(1.1))},
    }


def write(path: Path, checkpoint: object, zipped: bool = False) -> Path:
    """Save in the layout of torch 1.0, or in today's zip archive."""
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    return path


@contextmanager
def refused(kind: type | tuple[type, ...], *parts: str):
    """Expect an error that says all these parts in one line."""
    with pytest.raises(kind) as e:
        yield
    message = str(e.value)
    assert '\n' not in message
    for part in parts:
        assert part in message
