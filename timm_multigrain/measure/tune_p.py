"""The exponent p* of a test resolution: fine-tuned, and scanned over a grid (arXiv 1902.05509, section 4).

The trunk runs once an image; its map is pooled with every p of the grid and, with gradient, with the p that is being
fine-tuned.
"""
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.stream import decode, none_readable, progress_bar
from timm_multigrain.files import check_json, read_json, write_text
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.layers import GeM, gem
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.open import weights_sha256

from .classify import ranks_of_truth
from .p_result import PResult
from .p_tuner import PTuner

__all__ = ['GRID', 'check_grid', 'check_p_model', 'scan_p', 'tune_p']

GRID = (1., 1.5, 2., 2.5, 3., 3.5, 4., 4.5, 5., 6., 7., 8.)
SAVED_EVERY = 64  # batches


def scan_p(model: MultiGrain, source: ImageSource, protocol: Protocol, grid: Sequence[float] = GRID,
           **kwargs: Any) -> PResult:
    """Top-1 at each p of a grid, in one pass of the trunk. Arguments and errors as `tune_p`."""
    return tune_p(model, source, protocol, grid=grid, finetune=False, **kwargs)


def tune_p(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        grid: Sequence[float] = GRID,
        finetune: bool = True,
        batch_size: int = 4,
        lr: float = 0.005,
        momentum: float = 0.9,
        seed: int = 0,
        state_file: str | os.PathLike | None = None,
        workers: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = True,
) -> PResult:
    """Fine-tune p on labelled images and scan a grid, in one pass; the model keeps its p.

    Args:
        model: Model with GeM, a classifier, and no whitening.
        source: Labelled images, in the original the first 50 of each class; not the test images.
        protocol: Test protocol, one scale, no flip.
        grid: Exponents to scan, beside the model's own; none: fine-tune only.
        finetune: Also fine-tune p.
        batch_size: Images of a step.
        lr: Learning rate of the first step.
        momentum: Of SGD.
        seed: Of the order of the images.
        state_file: JSON file from which a run that was killed goes on; removed by no one.
        workers: Processes that read images.
        device: Where the model runs.
        dtype: torch.bfloat16 or torch.float16 to run the trunk under autocast.
        progress: Show a bar if stderr is a terminal.

    Raises:
        ValueError: Another pooling than GeM with one p, a whitened model, no classifier or labels, an impossible grid,
            or a state file of another run.
    """
    check_p_model(model)
    grid = check_grid(grid, model.gem_p)
    if not model.num_classes or source.labels is None:
        raise ValueError('p is fine-tuned and scanned by classification: give a model with a classifier and labelled '
                         'images, or groups of images of an instance to scan_p_groups.')
    if protocol.scales != (1.,) or protocol.flip:
        raise ValueError(f'{protocol}: p is fitted at one scale, without flip.')
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}: give at least 1.')
    if device is not None:
        model.to(device)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    tuner = PTuner(model.head.pool, model.head.classify, model.gem_p, math.ceil(len(order) / batch_size), lr,
                   momentum) if finetune else None
    scan = _Scan(model, grid)
    run = _Run(tuner, scan, state_file, [
        weights_sha256(model), source.fingerprint(), list(source.labels), protocol.to_dict(),
        [str(p) for p in grid], finetune, batch_size, lr, momentum, seed, str(dtype)])
    with _evaluating(model), torch.no_grad(), progress_bar(len(order), progress, 'Finding p') as bar:
        bar.update(run.done)
        maps = _maps(model, source, protocol, order[run.done:], workers, dtype, run.skipped)
        with contextlib.closing(maps):
            run.go(maps, source.labels, batch_size, len(order), bar)
    if not scan.count:
        raise ValueError(none_readable(len(source), run.skipped.values()))
    return PResult(
        'top-1', grid, scan.values(), scan.noise(), scan.losses(), model.gem_p, tuner.p if tuner else None,
        tuple(tuner.trace) if tuner else (), scan.count, protocol, run.skipped)


def check_p_model(model: MultiGrain) -> None:
    """Whether another p can be given to a model.

    Raises:
        ValueError: It can not, and why.
    """
    if not isinstance(model.head.pool, GeM):
        raise ValueError(f'The model pools with {model.global_pool!r}, which has no exponent: open it with pool gem.')
    if not isinstance(model.gem_p, float):
        raise ValueError('The model has an exponent for each channel: one p cannot replace them.')
    if model.whitened:
        raise ValueError(f'The model was whitened at p = {model.gem_p:g}, and another p needs another whitening: find '
                         'p with the model without whitening, then whiten that.')


def check_grid(grid: Sequence[float], start: float) -> tuple[float, ...]:
    """The grid, and the p that it is compared with, in ascending order, each once; an empty one stays empty."""
    wrong = [p for p in grid if not p > 0]
    if wrong:
        raise ValueError(f'The grid holds p = {wrong[0]:g}: exponents are above 0.')
    return tuple(sorted({float(p) for p in (*grid, start)})) if len(grid) else ()


def _maps(model, source, protocol, indices, workers, dtype, skipped) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Number and the trunk's map of each image, one by one, in this order; None for one that cannot be read."""
    device = next(model.parameters()).device
    with contextlib.closing(decode(source, protocol, indices, workers, model.input_sizes)) as stream:
        for item in stream:
            if item.pixels is None:
                skipped[source.names[item.index]] = item.message
                yield item.index, None
                continue
            x = protocol.normalize(torch.from_numpy(item.pixels)[None].to(device))
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype not in (None, torch.float32)):
                maps = model.forward_features(x)
            yield item.index, maps.float()


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Scan:
    """Sums of hits, of images that are a hit or not unlike at the model's p, and of losses at every p of a grid."""

    def __init__(self, model: MultiGrain, grid: Sequence[float]):
        self.grid, self.count = grid, 0
        self.pool, self.classify = model.head.pool, model.head.classify
        self.start = grid.index(model.gem_p) if grid else None
        self.hits, self.changed, self.loss = torch.zeros(3, len(grid), dtype=torch.float64)

    def add(self, maps: torch.Tensor, label: int) -> None:
        self.count += 1
        if not self.grid:
            return
        logits = self.classify(torch.cat([pool_map(self.pool, maps, p) for p in self.grid])).float().cpu()
        labels = torch.full((len(self.grid),), label)
        hits = ranks_of_truth(logits, labels) < 1
        self.hits += hits
        self.changed += hits != hits[self.start]
        self.loss += F.cross_entropy(logits.double(), labels, reduction='none')

    def values(self) -> tuple[float, ...]:
        return tuple((self.hits / self.count).tolist())

    def noise(self) -> tuple[float, ...]:
        return tuple((self.changed.sqrt() / self.count).tolist())  # a difference is 1, 0 or -1

    def losses(self) -> tuple[float, ...]:
        return tuple((self.loss / self.count).tolist())

    def state_dict(self) -> dict:
        return {'count': self.count, **{name: getattr(self, name).tolist() for name in ('hits', 'changed', 'loss')}}

    def load_state_dict(self, state: dict) -> None:
        self.count = state['count']
        for name in ('hits', 'changed', 'loss'):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))


def pool_map(pool: GeM, maps: torch.Tensor, p: float) -> torch.Tensor:
    """The map pooled as by a GeM of another exponent."""
    if pool.input_fmt == 'NLC':
        maps = maps[:, pool.num_prefix_tokens:]
    return gem(maps, p, pool.eps, pool.dim)


class _Run:
    """A pass over the images that can be cut off and go on."""

    def __init__(self, tuner: PTuner | None, scan: _Scan, state_file: str | os.PathLike | None, settings: list):
        self.parts = {'tuner': tuner, 'scan': scan}
        self.path = None if state_file is None else Path(state_file)
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.done, self.skipped = 0, {}
        if self.path is not None and self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            state = read_json(self.path)
            numbers = [float]
            check_json(state, {
                'key': str, 'done': int, 'skipped': {str: str},
                'tuner': ({'step': int, 'p': float, 'velocity': float, 'trace': numbers}, None),
                'scan': {'count': int, 'hits': numbers, 'changed': numbers, 'loss': numbers}}, str(self.path))
            sizes = {len(state['scan'][name]) for name in ('hits', 'changed', 'loss')}
            same = state['key'] == self.key and sizes == {len(self.parts['scan'].grid)}
        except ValueError:
            same = False
        if not same:
            raise ValueError(f'{self.path} is not the progress of a run with this model, these images and settings: '
                             'remove it to start anew.')
        self.done, self.skipped = state['done'], state['skipped']
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(state[name])

    def _save(self) -> None:
        if self.path is not None:
            parts = {name: part and part.state_dict() for name, part in self.parts.items()}
            write_text(self.path, json.dumps({
                'key': self.key, 'done': self.done, 'skipped': self.skipped, **parts}))

    def go(self, maps, labels: Sequence[int], batch_size: int, total: int, bar) -> None:
        """All that is left to do."""
        batch = []
        for number, (index, x) in enumerate(maps, self.done + 1):
            bar.update(1)
            if x is not None:
                self.parts['scan'].add(x, labels[index])
                batch.append((x, labels[index]))
            if number % batch_size == 0 or number == total:
                self._step(batch)
                batch, self.done = [], number
                if number % (batch_size * SAVED_EVERY) == 0 or number == total:
                    self._save()

    def _step(self, batch: list[tuple[torch.Tensor, int]]) -> None:
        if self.parts['tuner'] is not None and batch:
            self.parts['tuner'].update([x for x, _ in batch], [label for _, label in batch])
