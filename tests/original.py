"""Checkpoints and inputs of the original implementation, as state dicts and as files of its saver, rebuilt from the
formula behind its reference numbers."""
import json
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parent / 'golden'


def noise(name: str, shape) -> np.ndarray:
    """Deterministic noise in [-1, 1), float64, from the CRC of a name and the index of the element."""
    h = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint32) * np.uint32(2654435761)
    h = h + np.uint32(zlib.crc32(name.encode('ascii')))
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return (2 * (h / 2 ** 32) - 1).reshape(shape)


def fill(key: str, shape, p: float = 3.0) -> torch.Tensor:
    """Value of a checkpoint tensor."""
    if key.endswith('num_batches_tracked'):
        return torch.zeros((), dtype=torch.int64)
    if key == 'pool.p':
        return torch.tensor(p)
    s = noise(key.replace('features.0.base_net.last_linear.', 'classifier.'), shape)
    if key == 'whitening.pca.pca_m':
        s = 0.02 * s
    elif key == 'whitening.pca.pca_P':
        s = np.eye(shape[0]) + s / np.sqrt(shape[0])
    elif key.endswith('running_mean'):
        s = 0.1 * s
    elif key.endswith('running_var'):
        s = 1 + 0.5 * s
    elif len(shape) == 4:
        fan = np.prod(shape[1:])
        if fan > 1:
            s = s - s.mean((1, 2, 3), keepdims=True)
        s = s * np.sqrt(6 / fan)
    elif len(shape) == 2:
        s = s * np.sqrt(3 / shape[1])
    elif key.endswith('weight'):
        s = 0.8 + 0.2 * s
    else:
        s = 0.1 * s
    return torch.from_numpy(s.astype(np.float32))


@lru_cache
def _keys() -> dict:
    return json.loads((GOLDEN / 'checkpoint_keys.json').read_text())


def shapes(network: str) -> dict[str, list[int]]:
    """Keys and shapes of a model state."""
    return dict(_keys()[network]['plain'])


@lru_cache(maxsize=400)  # of a ResNet or two; most tests ask for the same
def _filled(key: str, shape: tuple, p: float) -> torch.Tensor:
    return fill(key, shape, p)


def state_dict(network: str, whitened: bool = False, p: float = 3.0) -> dict[str, torch.Tensor]:
    """Model state of 'resnet18', 'resnet50', 'senet154' or 'pnasnet5large' under the original's keys."""
    keys = shapes(network) | (_keys()[network]['whitened'] if whitened else {})
    make = _filled if network.startswith('resnet') else fill
    return {key: make(key, tuple(shape), p).clone() for key, shape in keys.items()}


def image(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Input batch of a reference forward."""
    b, c, y, x = np.ogrid[:batch, :3, :height, :width]
    wave = 1.2 * np.sin(2 * np.pi * ((b + 1) * x / width + (c + 1) * y / height) + b + 0.7 * c)
    return torch.from_numpy((wave + 0.8 * noise(f'input.{height}x{width}', wave.shape)).astype(np.float32))


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


def close(actual: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    """Equal up to a part of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rel * expected.abs().max().item())


@contextmanager
def refused(kind: type | tuple[type, ...], *parts: str):
    """Expect an error that says all these parts in one line."""
    with pytest.raises(kind) as e:
        yield
    message = str(e.value)
    assert '\n' not in message
    for part in parts:
        assert part in message
