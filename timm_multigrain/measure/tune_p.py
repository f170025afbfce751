"""The exponent p* of a test resolution: fine-tuned, and scanned over a grid (arXiv 1902.05509, section 4).

The trunk runs once per image; its map is pooled with every p of the grid and, with gradient, with the p that is being
fine-tuned. The original's recipe: one pass over images prepared as at the test, in batches of 4; cross-entropy; SGD on
p alone with momentum 0.9 and the learning rate 0.005 (1 - i / N)^0.9 at step i of N; the network in eval mode.

p is changed only if the best of the grid gains more over the model's p than twice the noise of that gain: the square
root of the sum of the squared differences, image by image (top-1) or query by query (mAP), over their number. For top-1
this is McNemar's test: with w images won and l lost, w - l > 2 sqrt(w + l).
"""
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from timm_multigrain.embed.embedder import Embedder, none_readable, progress_bar
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.poolings import System, Systems
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import iter_shards, skipped_lines
from timm_multigrain.extras import extra
from timm_multigrain.files import check_json, json_p, read_json, write_text
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.layers import gem
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.search.exact import SimilarityChunks
from timm_multigrain.whiten.fit import work_folder

from .benchmarks.lists import ListBenchmark
from .classify import ranks_of_truth
from .metrics import mean_average_precision

GRID = (1., 1.5, 2., 2.5, 3., 3.5, 4., 4.5, 5., 6., 7., 8.)
SAVED_EVERY = 64  # batches
POWER = 0.9  # of the decay of the learning rate
MOMENTUM = 0.9
FEW_STEPS = 2000
SURE = 2  # times the noise
_WORDS = {'tuned': 'fine-tuned', 'best': 'best of the grid', 'kept': 'as it was: no other is surely better'}


@dataclass(frozen=True, eq=False)
class PResult:
    """Quality of a grid of exponents, and the fine-tuned one.

    Attributes:
        criterion: 'top-1' or 'mAP'.
        grid: Exponents, the model's among them.
        values: The criterion at each, in [0, 1].
        noise: Noise of the difference of each value to that at the model's p, in the same unit.
        start: The model's p.
        losses: Mean cross-entropy at each; None for 'mAP'.
        tuned: Fine-tuned p, if it was fine-tuned; `trace` has p after each step.
        skipped: Images that could not be read, and why.
        choose: What `p` is: 'tuned', 'best', or None: the best where it is worth it, the fine-tuned without a grid.
    """
    criterion: str
    grid: tuple[float, ...]
    values: tuple[float, ...] = field(repr=False)
    noise: tuple[float, ...] = field(repr=False)
    start: float
    num_images: int
    protocol: Protocol
    losses: tuple[float, ...] | None = field(default=None, repr=False)
    tuned: float | None = None
    trace: tuple[float, ...] = field(default=(), repr=False)
    skipped: dict[str, str] = field(default_factory=dict)
    choose: str | None = None

    @property
    def best(self) -> float | None:
        """Exponent of the grid with the highest value; of equal ones that with the lowest loss, then the lowest."""
        losses = self.losses or [0.] * len(self.grid)
        rows = [(-value, loss, p) for p, value, loss in zip(self.grid, self.values, losses, strict=True)]
        return min(rows)[2] if rows else None

    @property
    def gain(self) -> tuple[float, float]:
        """What the best of the grid has more than the model's p, and the noise of that; 0 without a grid."""
        if not self.grid:
            return 0., 0.
        best, start = self.grid.index(self.best), self.grid.index(self.start)
        return self.values[best] - self.values[start], self.noise[best]

    @property
    def how(self) -> str:
        """Where `p` is from: 'tuned', 'best' or 'kept'."""
        if self.choose or not self.grid:
            return self.choose or 'tuned'
        gain, noise = self.gain
        return 'best' if gain > SURE * noise else 'kept'

    @property
    def p(self) -> float:
        """The exponent to take."""
        return {'tuned': self.tuned, 'best': self.best, 'kept': self.start}[self.how]

    def to_dict(self) -> dict[str, Any]:
        return {
            'criterion': self.criterion, 'p': json_p(self.p), 'how': self.how, 'start': json_p(self.start),
            'tuned': self.tuned, 'best': json_p(self.best), 'grid': [json_p(p) for p in self.grid],
            'values': self.values, 'noise': self.noise, 'losses': self.losses, 'num_images': self.num_images,
            'protocol': self.protocol.to_dict(), 'skipped': self.skipped, 'trace': self.trace}

    def save(self, path: str | os.PathLike) -> Path:
        """Write `to_dict` as JSON, whole or not at all."""
        return write_text(path, json.dumps(self.to_dict(), indent=1) + '\n')

    def draw(self, path: str | os.PathLike) -> Path:
        """Draw the criterion over p into a picture."""
        with extra('report', 'Drawing'):
            from matplotlib.figure import Figure
        figure, path = Figure(figsize=(6, 3.5), layout='constrained'), Path(path)
        axes = figure.subplots()
        finite = [(p, 100 * value) for p, value in zip(self.grid, self.values, strict=True) if p < math.inf]
        if finite:
            axes.plot(*zip(*finite, strict=True), marker='o', color='tab:blue')
        for name, p, color, style in (
                ('start', self.start, 'gray', ':'), ('best of the grid', self.best, 'tab:blue', '--'),
                ('fine-tuned', self.tuned, 'tab:red', '-')):
            if p is not None and p < math.inf:
                axes.axvline(p, color=color, linestyle=style, linewidth=1, label=f'{name}: {p:.3g}')
        axes.set(xlabel='exponent p of GeM', ylabel=f'{self.criterion}, %',
                 title=f'{self.protocol}, {self.num_images} images')
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path

    def __str__(self) -> str:
        lines = [f'{self.protocol}, {self.num_images} images', f'{"p":>6}  {self.criterion:>6}' + '    loss' * bool(
            self.losses)]
        for i, (p, value) in enumerate(zip(self.grid, self.values, strict=True)):
            loss = f'  {self.losses[i]:6.4f}' if self.losses else ''
            lines.append(f'{p:6.4g}  {100 * value:6.2f}{loss}' + '  best' * (p == self.best))
        if self.tuned is not None:
            steps = len(self.trace) - 1
            few = ', few: the recipe is made for 12,500' * (steps < FEW_STEPS)
            lines.append(f'Fine-tuned from p = {self.start:.4g} to p = {self.tuned:.4g} in {steps} steps{few}.')
        lines += skipped_lines(self.skipped)
        if self.grid and self.best != self.start:
            gain, noise = (100 * value for value in self.gain)
            lines.append(f"p = {self.best:.4g} has {gain:.2f} more than the model's p = {self.start:.4g}; {SURE} times "
                         f'the noise of that is {SURE * noise:.2f}.')
        return '\n'.join([*lines, f'p* = {self.p:.4g}, {_WORDS[self.how]}'])


def tune_p(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        grid: Sequence[float] = GRID,
        finetune: bool = True,
        batch_size: int = 4,
        lr: float = 0.005,
        seed: int = 0,
        state_file: str | os.PathLike | None = None,
        progress: bool = True,
        **extraction: Any,
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
        seed: Of the order of the images.
        state_file: JSON file from which a run that was killed goes on; it is not removed at the end.
        **extraction: workers, device and dtype of `extract`.
    """
    grid = _check(model, protocol, grid)
    if not model.num_classes or source.labels is None:
        raise ValueError('p is fine-tuned and scanned by classification: give a model with a classifier and labelled '
                         'images, or groups of images of an instance to scan_p_groups.')
    if finetune and model.gem_p == math.inf:
        raise ValueError('p = inf has no gradient to follow: start from a finite one, such as 3.')
    embedder = Embedder(model, protocol, batch_size=batch_size, **extraction)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    steps = math.ceil(len(order) / batch_size)
    settings = [weights_sha256(model), source.fingerprint(), list(source.labels), protocol.to_dict(),
                [str(p) for p in grid], finetune, batch_size, lr, seed, str(embedder.dtype)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    state = _start(state_file, key, grid, model.gem_p if finetune else 0.)
    with embedder.evaluating(), progress_bar(len(order), progress, 'Finding p') as bar, contextlib.closing(
            embedder.decode(source, order[state['step'] * batch_size:])) as stream:
        bar.update(state['step'] * batch_size)
        while items := list(islice(stream, batch_size)):
            maps, labels = [], []
            for item in items:
                if item.pixels is None:
                    state['skipped'][source.names[item.index]] = item.message
                else:
                    maps.append(_map(embedder, item.pixels))
                    labels.append(source.labels[item.index])
                    _scan(state, model, maps[-1], labels[-1], grid)
            if finetune and maps:
                _descend(state, model, maps, labels, lr * (1 - state['step'] / steps) ** POWER)
            state['step'] += 1
            if state_file is not None and (state['step'] % SAVED_EVERY == 0 or state['step'] == steps):
                write_text(state_file, json.dumps(state))
            bar.update(len(items))
    count = state['count']
    if not count:
        raise ValueError(none_readable(len(source), state['skipped'].values()))
    values, losses = (tuple(value / count for value in state[name]) for name in ('hits', 'loss'))
    noise = tuple(math.sqrt(changed) / count for changed in state['changed'])  # a difference is 1, 0 or -1
    return PResult(
        'top-1', grid, values, noise, model.gem_p, count, protocol, losses, state['p'] if finetune else None,
        tuple(state['trace']) if finetune else (), state['skipped'])


def scan_p_groups(
        model: MultiGrain,
        groups: ListBenchmark,
        protocol: Protocol,
        grid: Sequence[float] = GRID,
        *,
        work_dir: str | os.PathLike | None = None,
        **extraction: Any,
) -> PResult:
    """mAP at each p of a grid on groups of images of the same instance, in one pass of the trunk.

    Args:
        model: Model with GeM and no whitening.
        groups: Images in groups, `load_benchmark('folder', ...)`; not the test images.
        protocol: Test protocol, one scale, no flip.
        grid: Exponents to scan, beside the model's own.
        work_dir: Folder that keeps the embeddings, so that a run that was cut off goes on.
        **extraction: As of `extract`: batch_size, workers, device, dtype, progress.
    """
    grid = _check(model, protocol, grid)
    if not grid:
        raise ValueError('The grid is empty: give exponents, such as 1 2 3 4.')
    systems = Systems.of(model, [System('gem', p) for p in grid])
    rows, aps = torch.as_tensor(groups.query_rows), []
    with work_folder(work_dir) as folder:
        extracted = extract(
            systems, groups.database, protocol, folder, strict=True, descriptor=False, **extraction)
        for number in range(len(grid)):
            vectors = torch.cat([systems.take(vectors, number) for _, vectors in iter_shards(folder)])
            scores = SimilarityChunks(vectors[rows], vectors)
            aps.append(mean_average_precision(scores, groups.relevant, groups.ignore).ap)
    aps = np.stack(aps)
    noise = np.sqrt(((aps - aps[grid.index(model.gem_p)]) ** 2).sum(1)) / aps.shape[1]
    return PResult('mAP', grid, tuple(aps.mean(1).tolist()), tuple(noise.tolist()), model.gem_p, len(extracted),
                   protocol)


def _check(model: MultiGrain, protocol: Protocol, grid: Sequence[float]) -> tuple[float, ...]:
    """The grid and the model's p in ascending order, each once; an empty grid stays empty."""
    if model.global_pool != 'gem':
        raise ValueError(f'The model pools with {model.global_pool!r}, which has no exponent to find: open it with '
                         'pool gem, or with avg to start from p = 1.')
    if not isinstance(model.gem_p, float):
        raise ValueError('The model has an exponent for each channel: one p cannot replace them.')
    if model.whitened:
        raise ValueError(f'The model was whitened at p = {model.gem_p:g}, and another p needs another whitening: find '
                         'p with the model without whitening, then whiten that.')
    if not min(grid, default=1) > 0:
        raise ValueError(f'The grid holds p = {min(grid):g}: exponents are above 0.')
    if protocol.scales != (1.,) or protocol.flip:
        raise ValueError(f'{protocol}: p is fitted at one scale, without flip.')
    return tuple(sorted({float(p) for p in (*grid, model.gem_p)})) if len(grid) else ()


def _start(path: str | os.PathLike | None, key: str, grid: Sequence[float], p: float) -> dict:
    """Where a run is: sums over the images of hits, of hits unlike at the model's p and of losses at every p of the
    grid, and the p that is fine-tuned with its velocity; as the file of an earlier run says, or at the start.
    """
    sums = {name: [0.] * len(grid) for name in ('hits', 'changed', 'loss')}
    start = {'key': key, 'step': 0, 'count': 0, **sums, 'p': p, 'velocity': 0., 'trace': [p], 'skipped': {}}
    if path is None or not Path(path).exists():
        return start
    try:
        state = read_json(path)
        check_json(state, {'key': str, 'step': int, 'count': int, **{name: [float] for name in sums}, 'p': float,
                           'velocity': float, 'trace': [float], 'skipped': {str: str}}, str(path))
        if state['key'] == key and {len(state[name]) for name in sums} == {len(grid)} and state['step'] >= 0:
            return state
    except ValueError:
        pass
    raise ValueError(f'{path} is not the progress of a run with this model, these images and settings: remove it to '
                     'start anew.')


@torch.no_grad()
def _map(embedder: Embedder, pixels: np.ndarray) -> torch.Tensor:
    """The trunk's map of an image, (1, ...), as GeM takes it."""
    x = embedder.protocol.normalize(torch.from_numpy(pixels)[None].to(embedder.device))
    with torch.autocast(x.device.type, embedder.dtype or torch.bfloat16, enabled=embedder.dtype is not None):
        maps = embedder.model.trunk(x).float()
    pool = embedder.model.head.pool
    return maps[:, pool.num_prefix_tokens:] if pool.input_fmt == 'NLC' else maps


@torch.no_grad()
def _scan(state: dict, model: MultiGrain, maps: torch.Tensor, label: int, grid: Sequence[float]) -> None:
    state['count'] += 1
    if not grid:
        return
    pool = model.head.pool
    logits = model.head.classify(torch.cat([gem(maps, p, pool.eps, pool.dim) for p in grid])).float().cpu()
    labels = torch.full((len(grid),), label)
    hits = ranks_of_truth(logits, labels) < 1
    losses = F.cross_entropy(logits.double(), labels, reduction='none')
    for name, added in (('hits', hits), ('changed', hits != hits[grid.index(model.gem_p)]), ('loss', losses)):
        state[name] = (torch.tensor(state[name], dtype=torch.float64) + added).tolist()


@torch.enable_grad()
def _descend(state: dict, model: MultiGrain, maps: list[torch.Tensor], labels: list[int], lr: float) -> None:
    """A step of SGD on p, on the maps of a batch, of any sizes."""
    pool, p = model.head.pool, torch.tensor(state['p'], device=maps[0].device, requires_grad=True)
    logits = model.head.classify(torch.cat([gem(x, p, pool.eps, pool.dim) for x in maps])).float()
    gradient, = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(labels, device=logits.device)), p)
    state['velocity'] = MOMENTUM * state['velocity'] + gradient.item()
    state['p'] = float(np.float32(state['p'] - lr * state['velocity']))  # as the model keeps it
    state['trace'].append(state['p'])
    if not 0 < state['p'] < math.inf:
        raise ValueError(f'p = {state["p"]} after step {state["step"] + 1}: it has run away; take a lower learning '
                         'rate.')
