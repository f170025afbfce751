"""What every measured result can do (print itself, be saved as JSON, be drawn), and the results of benchmarks."""
import json
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_multigrain.files import write_text

from .figures import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['BenchmarkResult', 'Comparison', 'Figure', 'Result']

_UNITS = {'N-S': 'of 4'}
_SAVED_ONLY = ('mP@1', 'mP@5')  # papers print mP@10


class Result(ABC):
    """Base of the results of a measure; `str` is the text to print."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Figures by name, plain numbers and lists; NaN stands for what was not measured."""

    @abstractmethod
    def plot(self, axes: 'Axes') -> None:
        """Draw into axes of matplotlib."""

    def to_json(self) -> str:
        """`to_dict` as JSON text, null where a figure is NaN."""
        return json.dumps(_plain(self.to_dict()), indent=1) + '\n'

    def save(self, path: str | os.PathLike) -> Path:
        """Write `to_json`, whole or not at all."""
        return write_text(path, self.to_json())

    def draw(self, path: str | os.PathLike) -> Path:
        """Draw into a picture; the ending of its name says which kind (.png, .svg, .pdf).

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as e:
            raise ImportError("Drawing needs matplotlib: pip install 'timm_multigrain[report]'.") from e
        figure = Figure(figsize=(6, 3.5), layout='constrained')
        self.plot(figure.subplots())
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        metric: 'mAP', 'mP@10', 'N-S', 'uAP', 'recall@P90'.
        value: In the unit it is quoted in: percent, or of 4 for N-S.
        split: Part of the set, such as 'Medium'.
    """
    metric: str
    value: float
    split: str | None = None

    @property
    def column(self) -> str:
        """Head of its column in a table."""
        name = f'{self.metric} {self.split}' if self.split else self.metric
        return f'{name} ({_UNITS[self.metric]})' if self.metric in _UNITS else name


@dataclass(frozen=True)
class BenchmarkResult(Result):
    """One system on one benchmark.

    Attributes:
        benchmark: Name of the set, with what makes it another than the published one.
        task: 'retrieval' or 'copy-detection'.
        system: The model and how it describes images, in words.
        figures: What was measured.
        size: Pixels of the side that the protocol names.
        pooling: The pooling by name.
        p: Its exponent, 'inf' for the maximum, None where it has none.
        protocol: Preprocessing and what was done after the first ranking, in words.
        whitening: Components of the whitened descriptor, None without.
        num_queries: Queries.
        num_database: Images searched, distractors among them.
        notes: What else there is to know, such as distractors that could not be read.
        command: What repeats the measurement.
    """
    benchmark: str
    task: str
    system: str
    figures: tuple[Figure, ...]
    size: int
    pooling: str
    p: float | str | None
    protocol: str
    whitening: int | None
    num_queries: int
    num_database: int
    notes: tuple[str, ...] = ()
    command: str | None = None

    def metrics(self) -> list[Metric]:
        """The figures as `timm-multigrain publish --metrics` takes them."""
        protocol = self.protocol if self.pooling == 'GeM' else f'{self.protocol}, {self.pooling}'
        return [Metric(
            task=self.task, dataset=self.benchmark, metric=figure.metric, value=round(figure.value, 4), size=self.size,
            p=self.p, protocol=protocol, whitening=self.whitening, split=figure.split, command=self.command)
            for figure in self.figures]

    def value(self, metric: str, split: str | None = None) -> float:
        """One figure.

        Raises:
            KeyError: It was not measured.
        """
        for figure in self.figures:
            if (figure.metric, figure.split) == (metric, split):
                return figure.value
        raise KeyError(f'{self.benchmark} has no {metric} of {split}: {", ".join(f.column for f in self.figures)}')

    def to_dict(self) -> dict[str, Any]:
        return Comparison((self,)).to_dict()

    def to_json(self) -> str:
        return Comparison((self,)).to_json()

    def plot(self, axes: 'Axes') -> None:
        Comparison((self,)).plot(axes)

    def __str__(self) -> str:
        return str(Comparison((self,)))


@dataclass(frozen=True)
class Comparison(Result):
    """Systems side by side on one benchmark."""
    results: tuple[BenchmarkResult, ...]

    def metrics(self) -> list[Metric]:
        """All figures as `timm-multigrain publish --metrics` takes them."""
        return [metric for result in self.results for metric in result.metrics()]

    def to_dict(self) -> dict[str, Any]:
        return {'figures': [dict(vars(metric)) for metric in self.metrics()]}

    def to_json(self) -> str:
        """`metrics` as a JSON list."""
        return json.dumps(self.to_dict()['figures'], indent=2) + '\n'

    def plot(self, axes: 'Axes') -> None:
        """The first metric of every split: a group of bars per split, a bar per system."""
        first = self.results[0]
        shown = [figure for figure in first.figures if figure.metric == first.figures[0].metric]
        width = 0.8 / len(self.results)
        for number, result in enumerate(self.results):
            places = [place + (number - (len(self.results) - 1) / 2) * width for place in range(len(shown))]
            axes.bar(places, [result.value(f.metric, f.split) for f in shown], width,
                     label=f'{result.system}, {result.size} px')
        axes.set_xticks(range(len(shown)), [figure.split or first.benchmark for figure in shown])
        axes.set(ylabel=f'{shown[0].metric} {_UNITS.get(shown[0].metric, "%")}', title=first.benchmark)
        axes.legend(fontsize=7)

    def __str__(self) -> str:
        """A Markdown table: a row per system, a column per figure, the best of each column in bold."""
        heads = [f'{r.benchmark}: {r.num_queries} queries, {r.num_database} images searched; {r.protocol}'
                 for r in self.results]
        notes = [note for result in self.results for note in result.notes]
        columns = list(dict.fromkeys(
            figure.column for r in self.results for figure in r.figures if figure.metric not in _SAVED_ONLY))
        values = [{figure.column: figure.value for figure in r.figures} for r in self.results]
        best = {column: f'{max(row[column] for row in values if column in row):.2f}' for column in columns}
        rows = [['system', 'size', *columns]]
        for result, row in zip(self.results, values, strict=True):
            shown = {column: f'{row[column]:.2f}' if column in row else '–' for column in columns}
            bold = [f'**{text}**' if len(values) > 1 and text == best[column] else text
                    for column, text in shown.items()]
            rows.append([result.system, str(result.size), *bold])
        return '\n'.join([*dict.fromkeys(heads), '', *_markdown(rows), '', *dict.fromkeys(notes)]).rstrip()


def _markdown(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['| ' + ' | '.join([row[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]) + ' |' for row in rows]
    lines.insert(1, '|-' + '-|-'.join('-' * width for width in widths) + '-|')
    return lines
