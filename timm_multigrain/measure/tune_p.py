"""The exponent p* of a test resolution: fine-tuned, and scanned over a grid (arXiv 1902.05509, section 4).

The trunk runs once per image; its map is pooled with every p of the grid and, with gradient, with the p that is being
fine-tuned. The original's recipe: one pass over images prepared as at the test, in batches of 4; cross-entropy; SGD on
p alone with momentum 0.9 and the learning rate 0.005 (1 - i / N)^0.9 at step i of N; the network in eval mode.
"""
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from timm_multigrain.embed.embedder import decode, none_readable, progress_bar
from timm_multigrain.embed.extract import extract_shards
from timm_multigrain.embed.poolings import System, Systems
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import iter_shards
from timm_multigrain.files import check_json, read_json, write_text
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.layers import GeM, gem
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.search.exact import SimilarityChunks
from timm_multigrain.whiten.fit import work_folder

from .benchmarks.folder import Groups
from .classify import ranks_of_truth
from .p_result import PResult

__all__ = ['GRID', 'check_p_model', 'scan_p_groups', 'tune_p']

GRID = (1., 1.5, 2., 2.5, 3., 3.5, 4., 4.5, 5., 6., 7., 8.)
SAVED_EVERY = 64  # batches
POWER = 0.9  # of the decay of the learning rate


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
        state_file: JSON file from which a run that was killed goes on; it is not removed at the end.
        workers: Processes that read images.
        device: Where the model runs.
        dtype: torch.bfloat16 or torch.float16 to run the trunk under autocast.
        progress: Show a bar if stderr is a terminal.

    Raises:
        ValueError: Another pooling than GeM with one p, a whitened model, no classifier or labels, an impossible grid,
            or a state file of another run.
    """
    grid = _check(model, protocol, grid)
    if not model.num_classes or source.labels is None:
        raise ValueError('p is fine-tuned and scanned by classification: give a model with a classifier and labelled '
                         'images, or groups of images of an instance to scan_p_groups.')
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}: give at least 1.')
    if device is not None:
        model.to(device)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    tuner = _Tuner(model, math.ceil(len(order) / batch_size), lr, momentum) if finetune else None
    run = _Run(tuner, _Scan(model, grid), state_file, [
        weights_sha256(model), source.fingerprint(), list(source.labels), protocol.to_dict(),
        [str(p) for p in grid], finetune, batch_size, lr, momentum, seed, str(dtype)])
    with _evaluating(model), torch.no_grad(), progress_bar(len(order), progress, 'Finding p') as bar:
        bar.update(run.done)
        maps = _maps(model, source, protocol, order[run.done:], workers, dtype, run.skipped)
        with contextlib.closing(maps):
            run.go(maps, source.labels, batch_size, len(order), bar)
    scan = run.scan
    if not scan.count:
        raise ValueError(none_readable(len(source), run.skipped.values()))
    values, losses = (tuple((sums / scan.count).tolist()) for sums in (scan.hits, scan.loss))
    noise = tuple((scan.changed.sqrt() / scan.count).tolist())  # a difference is 1, 0 or -1
    return PResult(
        'top-1', grid, values, noise, model.gem_p, scan.count, protocol, losses, tuner.p if tuner else None,
        tuple(tuner.trace) if tuner else (), run.skipped)


def scan_p_groups(
        model: MultiGrain,
        groups: Groups,
        protocol: Protocol,
        grid: Sequence[float] = GRID,
        *,
        work_dir: str | os.PathLike | None = None,
        **extraction: Any,
) -> PResult:
    """mAP at each p of a grid on groups of images of the same instance, in one pass of the trunk.

    Args:
        model: Model with GeM and no whitening.
        groups: Images in groups, see `timm_multigrain.measure.benchmarks.load_folder`; not the test images.
        protocol: Test protocol, one scale, no flip.
        grid: Exponents to scan, beside the model's own.
        work_dir: Folder that keeps the embeddings, so that a run that was cut off goes on.
        **extraction: As of `extract`: batch_size, workers, device, dtype, progress.

    Raises:
        UnreadableImage: An image that cannot be read.
        ValueError: Another pooling than GeM with one p, a whitened model, or an impossible grid.
    """
    grid = _check(model, protocol, grid)
    if not grid:
        raise ValueError('The grid is empty: give exponents, such as 1 2 3 4.')
    systems = Systems.of(model, [System('gem', p) for p in grid])
    rows, aps = torch.as_tensor(groups.query_rows), []
    with work_folder(work_dir) as folder:
        extracted = extract_shards(
            systems, groups.database, protocol, folder, strict=True, descriptor=False, **extraction)
        for number in range(len(grid)):
            vectors = torch.cat([systems.take(vectors, number) for _, vectors in iter_shards(folder)])
            aps.append(groups.average_precisions(SimilarityChunks(vectors[rows], vectors)))
    aps = np.stack(aps)
    noise = np.sqrt(((aps - aps[grid.index(model.gem_p)]) ** 2).sum(1)) / aps.shape[1]
    return PResult('mAP', grid, tuple(aps.mean(1).tolist()), tuple(noise.tolist()), model.gem_p, extracted.number,
                   protocol)


def check_p_model(model: MultiGrain) -> None:
    """Raises ValueError, with the reason, if another p cannot be given to a model."""
    if not isinstance(model.head.pool, GeM):
        raise ValueError(f'The model pools with {model.global_pool!r}, which has no exponent: open it with pool gem.')
    if not isinstance(model.gem_p, float):
        raise ValueError('The model has an exponent for each channel: one p cannot replace them.')
    if model.whitened:
        raise ValueError(f'The model was whitened at p = {model.gem_p:g}, and another p needs another whitening: find '
                         'p with the model without whitening, then whiten that.')


def _check(model: MultiGrain, protocol: Protocol, grid: Sequence[float]) -> tuple[float, ...]:
    """The grid and the model's p in ascending order, each once; an empty grid stays empty."""
    check_p_model(model)
    wrong = [p for p in grid if not p > 0]
    if wrong:
        raise ValueError(f'The grid holds p = {wrong[0]:g}: exponents are above 0.')
    if protocol.scales != (1.,) or protocol.flip:
        raise ValueError(f'{protocol}: p is fitted at one scale, without flip.')
    return tuple(sorted({float(p) for p in (*grid, model.gem_p)})) if len(grid) else ()


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


class _Tuner:
    """SGD on the p of a copy of the model's GeM, in N steps."""
    FORM = {'step': int, 'p': float, 'velocity': float, 'trace': [float]}

    def __init__(self, model: MultiGrain, steps: int, lr: float, momentum: float):
        pool, p = model.head.pool, model.gem_p
        if not (0 < p < math.inf):
            raise ValueError(f'p = {p} has no gradient to follow: start from a finite one, such as 3.')
        self.pool = GeM(p, learn_p=True, eps=pool.eps, input_fmt=pool.input_fmt,
                        num_prefix_tokens=pool.num_prefix_tokens).to(pool.p.device)
        self.classify, self.steps, self.lr, self.momentum = model.head.classify, steps, lr, momentum
        self.step, self.velocity, self.trace = 0, 0., [p]

    @property
    def p(self) -> float:
        """The exponent now."""
        return self.pool.p.item()

    def update(self, maps: list[torch.Tensor], labels: list[int]) -> None:
        """One step on the maps (1, ...) of a batch, of any sizes; ValueError if p has left the positive numbers."""
        with torch.enable_grad():
            logits = self.classify(torch.cat([self.pool(x) for x in maps])).float()
            loss = F.cross_entropy(logits, torch.tensor(labels, device=logits.device))
        gradient, = torch.autograd.grad(loss, self.pool.p)
        self.velocity = self.momentum * self.velocity + gradient.item()
        self._set(self.p - self.lr * (1 - self.step / self.steps) ** POWER * self.velocity)
        self.step += 1
        self.trace.append(self.p)
        if not (0 < self.p < math.inf):
            raise ValueError(f'p = {self.p} after step {self.step}: it has run away; take a lower lr than {self.lr}.')

    def _set(self, p: float) -> None:
        with torch.no_grad():
            self.pool.p.fill_(p)

    def state(self) -> dict:
        return {'step': self.step, 'p': self.p, 'velocity': self.velocity, 'trace': self.trace}

    def load(self, state: dict) -> None:
        self.step, self.velocity, self.trace = state['step'], state['velocity'], list(state['trace'])
        self._set(state['p'])


class _Scan:
    """Sums of hits, of images that are a hit or not unlike at the model's p, and of losses at every p of a grid."""
    FORM = {'count': int, 'hits': [float], 'changed': [float], 'loss': [float]}

    def __init__(self, model: MultiGrain, grid: Sequence[float]):
        self.grid, self.count = grid, 0
        self.pool, self.classify = model.head.pool, model.head.classify
        self.start = grid.index(model.gem_p) if grid else None
        self.hits, self.changed, self.loss = torch.zeros(3, len(grid), dtype=torch.float64)

    def add(self, maps: torch.Tensor, label: int) -> None:
        self.count += 1
        if not self.grid:
            return
        if self.pool.input_fmt == 'NLC':
            maps = maps[:, self.pool.num_prefix_tokens:]
        pooled = torch.cat([gem(maps, p, self.pool.eps, self.pool.dim) for p in self.grid])
        logits, labels = self.classify(pooled).float().cpu(), torch.full((len(self.grid),), label)
        hits = ranks_of_truth(logits, labels) < 1
        self.hits += hits
        self.changed += hits != hits[self.start]
        self.loss += F.cross_entropy(logits.double(), labels, reduction='none')

    def state(self) -> dict:
        return {'count': self.count, **{name: getattr(self, name).tolist() for name in ('hits', 'changed', 'loss')}}

    def load(self, state: dict) -> None:
        self.count = state['count']
        for name in ('hits', 'changed', 'loss'):
            getattr(self, name).copy_(torch.tensor(state[name], dtype=torch.float64))


class _Run:
    """A pass over the images that can be cut off and go on."""

    def __init__(self, tuner: _Tuner | None, scan: _Scan, state_file: str | os.PathLike | None, settings: list):
        self.tuner, self.scan = tuner, scan
        self.path = None if state_file is None else Path(state_file)
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.done, self.skipped = 0, {}
        if self.path is not None and self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            state = read_json(self.path)
            check_json(state, {'key': str, 'done': int, 'skipped': {str: str}, 'tuner': (_Tuner.FORM, None),
                               'scan': _Scan.FORM}, str(self.path))
            sizes = {len(state['scan'][name]) for name in ('hits', 'changed', 'loss')}
            same = state['key'] == self.key and sizes == {len(self.scan.grid)}
        except ValueError:
            same = False
        if not same:
            raise ValueError(f'{self.path} is not the progress of a run with this model, these images and settings: '
                             'remove it to start anew.')
        self.done, self.skipped = state['done'], state['skipped']
        self.scan.load(state['scan'])
        if self.tuner is not None:
            self.tuner.load(state['tuner'])

    def go(self, maps: Iterable[tuple[int, torch.Tensor | None]], labels: Sequence[int], batch_size: int, total: int,
           bar) -> None:
        """All that is left to do."""
        batch = []
        for number, (index, x) in enumerate(maps, self.done + 1):
            bar.update(1)
            if x is not None:
                self.scan.add(x, labels[index])
                batch.append((x, labels[index]))
            if number % batch_size == 0 or number == total:
                if self.tuner is not None and batch:
                    self.tuner.update(*map(list, zip(*batch, strict=True)))
                batch, self.done = [], number
                if self.path is not None and (number % (batch_size * SAVED_EVERY) == 0 or number == total):
                    write_text(self.path, json.dumps({
                        'key': self.key, 'done': self.done, 'skipped': self.skipped,
                        'tuner': self.tuner and self.tuner.state(), 'scan': self.scan.state()}))
