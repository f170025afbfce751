"""What a search for p* found, and whether it is worth another p.

p is changed only if the best of the grid gains more over the model's p than twice the noise of that gain: the square
root of the sum of the squared differences, image by image (top-1) or query by query (mAP), over their number. For top-1
this is McNemar's test: with w images won and l lost, w - l > 2 sqrt(w + l).
"""
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from timm_multigrain.embed.extract import skipped_lines
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.models.config import json_p

from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['PResult']

FEW_STEPS = 2000
SURE = 2  # times the noise
_WORDS = {'tuned': 'fine-tuned', 'best': 'best of the grid', 'kept': 'as it was: no other is surely better'}


@dataclass(frozen=True, eq=False)
class PResult(Result):
    """Quality of a grid of exponents, and the fine-tuned one.

    Attributes:
        criterion: 'top-1' or 'mAP'.
        grid: Exponents, the model's among them.
        values: The criterion at each, in [0, 1].
        noise: Noise of the difference of each value to that at the model's p, in the same unit.
        start: The model's p.
        num_images: Images that count.
        protocol: Test protocol.
        losses: Mean cross-entropy at each; None for 'mAP'.
        tuned: Fine-tuned p, if it was fine-tuned.
        trace: p after each step.
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
        if not self.grid:
            return None
        losses = self.losses or [0.] * len(self.grid)
        return min(zip(self.grid, self.values, losses, strict=True), key=lambda row: (-row[1], row[2], row[0]))[0]

    @property
    def gain(self) -> tuple[float, float] | None:
        """What the best of the grid has more than the model's p, and the noise of that; None without a grid."""
        if not self.grid:
            return None
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

    def plot(self, axes: 'Axes') -> None:
        """The criterion over p, and where the model's p, the best and the fine-tuned one are."""
        finite = [(p, 100 * value) for p, value in zip(self.grid, self.values, strict=True) if p < math.inf]
        if finite:
            axes.plot(*zip(*finite, strict=True), marker='o', color='tab:blue')
        lines = [('start', self.start, 'gray', ':'), ('best of the grid', self.best, 'tab:blue', '--'),
                 ('fine-tuned', self.tuned, 'tab:red', '-')]
        for name, p, color, style in lines:
            if p is not None and p < math.inf:
                axes.axvline(p, color=color, linestyle=style, linewidth=1, label=f'{name}: {p:.3g}')
        axes.set(xlabel='exponent p of GeM', ylabel=f'{self.criterion}, %',
                 title=f'{self.protocol}, {self.num_images} images')
        axes.legend()

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
