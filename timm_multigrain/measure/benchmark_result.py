"""What a benchmark says of a model: figures with the settings they were measured at, one table for several systems."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .benchmarks.benchmark import Figure
from .figures import Metric
from .result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['BenchmarkResult', 'Comparison']

_UNITS = {'N-S': 'of 4'}
_SAVED_ONLY = ('mP@1', 'mP@5')  # papers print mP@10


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
        raise KeyError(f'{self.benchmark} has no {metric} of {split}: {", ".join(map(_column, self.figures))}')

    def to_dict(self) -> dict[str, Any]:
        return Comparison((self,)).to_dict()

    def to_json(self) -> str:
        """`metrics` as a JSON list."""
        return Comparison((self,)).to_json()

    def plot(self, axes: 'Axes') -> None:
        """A bar for each split."""
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
        """The first metric of every split: a group of bars a split, a bar a system."""
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
        return '\n'.join([*_heads(self.results), '', *self._rows(), '', *_notes(self.results)]).rstrip()

    def _rows(self) -> list[str]:
        """A Markdown table: a line a system, a column a figure, the best of each column in bold."""
        columns = list(dict.fromkeys(
            (f.metric, f.split) for result in self.results for f in result.figures if f.metric not in _SAVED_ONLY))
        values = [{(f.metric, f.split): f.value for f in result.figures} for result in self.results]
        cells = [[_column(Figure(metric, 0, split)) for metric, split in columns]]
        best = {column: max(row[column] for row in values if column in row) for column in columns}
        for row in values:
            shown = [_show(row.get(column)) for column in columns]
            cells.append([f'**{text}**' if len(values) > 1 and text == _show(best[column]) else text
                          for text, column in zip(shown, columns, strict=True)])
        names = [['system', 'size'], *[[result.system, str(result.size)] for result in self.results]]
        return _markdown([name + row for name, row in zip(names, cells, strict=True)])


def _heads(results: Sequence[BenchmarkResult]) -> list[str]:
    """A line for each benchmark and protocol that occurs."""
    return list(dict.fromkeys(
        f'{r.benchmark}: {r.num_queries} queries, {r.num_database} images searched; {r.protocol}' for r in results))


def _notes(results: Sequence[BenchmarkResult]) -> list[str]:
    return list(dict.fromkeys(note for result in results for note in result.notes))


def _column(figure: Figure) -> str:
    name = f'{figure.metric} {figure.split}' if figure.split else figure.metric
    return f'{name} ({_UNITS[figure.metric]})' if figure.metric in _UNITS else name


def _show(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['| ' + ' | '.join([row[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]) + ' |' for row in rows]
    lines.insert(1, '|-' + '-|-'.join('-' * width for width in widths) + '-|')
    return lines
