"""Figures, and what was measured on a benchmark.

A file of figures, which `timm-multigrain evaluate` and `validate` write and `publish` takes, is a JSON list of objects,
one per figure; the fields of `Metric` from split on may be left out:

    [{"task": "classification", "dataset": "ImageNet-1k", "metric": "top1", "value": 78.6,
      "size": 500, "p": 4, "protocol": "longer side", "whitening": null, "split": "validation"}]
"""
import json
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from timm_multigrain.files import check_json, read_json, write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Our tasks, and what the Hub calls them.
TASKS = {
    'classification': ('image-classification', 'Image Classification'),
    'retrieval': ('image-retrieval', 'Image Retrieval'),
    'copy-detection': ('image-copy-detection', 'Image Copy Detection'),
}
_SETTINGS = ('size', 'p', 'protocol', 'whitening')
_HUB_METRICS = {'top1': 'accuracy', 'top5': 'top_5_accuracy'}
_UNITS = {'N-S': 'of 4'}
_SAVED_ONLY = ('mP@1', 'mP@5')  # papers print mP@10


@dataclass(frozen=True)
class Metric:
    """A figure and how it was measured; ValueError for a field of the wrong kind.

    Attributes:
        task: 'classification', 'retrieval' or 'copy-detection'.
        dataset: Name of the data set, such as 'ImageNet-1k' or 'INRIA Holidays'.
        metric: 'top1', 'top5', 'mAP', 'mP@10', 'N-S', 'uAP', 'recall@P90' and the like.
        value: In the unit the metric is quoted in: percent, or of 4 for N-S.
        size: Pixels of the side that the protocol names.
        p: Exponent of the pooling at the test (p*), 'inf' for the maximum; None where the model has several or none.
        protocol: Which side the size is of, the crop, what becomes of smaller images and of queries that are cut out,
            such as 'shorter side 256, centre crop'.
        whitening: Components of the whitened descriptor, or words for it; None without.
        split: Part of the data set.
        source_name: Who published the figure, if it was not measured on these very weights here.
        source_url: Where.
    """
    task: str
    dataset: str
    metric: str
    value: float
    size: int
    p: float | str | None
    protocol: str
    whitening: int | str | None
    split: str | None = None
    source_name: str | None = None
    source_url: str | None = None
    command: str | None = None

    def __post_init__(self):
        check_json(vars(self), _FORM, 'it')
        if self.task not in TASKS:
            raise ValueError(f'task is {self.task!r}, and has to be one of {", ".join(TASKS)}.')
        if isinstance(self.p, str) and self.p != 'inf':
            raise ValueError(f'p is {self.p!r}, and has to be a number, "inf" or null.')
        for name, value in vars(self).items():
            if isinstance(value, str) and not (value.strip() and value.isprintable()):
                raise ValueError(f'{name} is {value!r}, and has to be a printable text.')
            if name in ('size', 'p', 'whitening') and isinstance(value, (int, float)) and value <= 0:
                raise ValueError(f'{name} is {value}, and has to be above 0.')

    @property
    def column(self) -> str:
        """Head of its column in a table."""
        name = f'{self.metric} {self.split}' if self.split else self.metric
        return f'{name} ({_UNITS[self.metric]})' if self.metric in _UNITS else name

    def to_eval_result(self) -> 'EvalResult':
        """The figure as the Hub's model-index takes it, the settings among the metric's arguments."""
        from huggingface_hub import EvalResult

        task_type, task_name = TASKS[self.task]
        args = {name: 'none' if getattr(self, name) is None else getattr(self, name) for name in _SETTINGS}
        if self.command:
            args['command'] = self.command
        return EvalResult(
            task_type=task_type, task_name=task_name, dataset_name=self.dataset,
            dataset_type='-'.join(re.findall(r'[^\W_]+', self.dataset.lower())), dataset_split=self.split,
            metric_type=_HUB_METRICS.get(self.metric, self.metric), metric_name=self.metric, metric_value=self.value,
            metric_args=args, source_name=self.source_name, source_url=self.source_url)

    @classmethod
    def from_eval_result(cls, result: 'EvalResult') -> 'Metric | None':
        """The figure that `to_eval_result` wrote; None for one that came from elsewhere."""
        args = result.metric_args if isinstance(result.metric_args, dict) else {}
        tasks = {kind: task for task, (kind, _) in TASKS.items()}
        try:
            return cls(
                task=tasks[result.task_type], dataset=result.dataset_name, metric=result.metric_name,
                value=result.metric_value, split=result.dataset_split, source_name=result.source_name,
                source_url=result.source_url, command=args.get('command'),
                **{name: None if args[name] == 'none' else args[name] for name in _SETTINGS})
        except (KeyError, ValueError):
            return None


_FORM = {
    'task': str, 'dataset': str, 'metric': str, 'value': float, 'size': int, 'p': (float, str, None), 'protocol': str,
    'whitening': (int, str, None), **dict.fromkeys(('split', 'source_name', 'source_url', 'command'), (str, None))}


def read_metrics(path: str | os.PathLike) -> list[Metric]:
    """Figures of a JSON file; FileNotFoundError, or ValueError if it does not follow the schema."""
    try:
        return parse_metrics(read_json(path, 'file of figures'))
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from e


def parse_metrics(entries: Sequence[Metric | dict[str, Any]]) -> list[Metric]:
    """Figures of a list of objects; ValueError for an unknown field, one that is missing, or one of the wrong kind."""
    needed = {f.name: _FORM[f.name] for f in fields(Metric) if f.default is MISSING}
    if isinstance(entries, list):
        entries = [vars(entry) if isinstance(entry, Metric) else entry for entry in entries]
    check_json(entries, [needed], 'figures')
    for number, entry in enumerate(entries):
        try:
            entries[number] = Metric(**entry)
        except (TypeError, ValueError) as e:
            raise ValueError(f'figures[{number}]: {e}') from e
    return entries


class SystemResult(NamedTuple):
    """A model and how it describes images, its figures, what it was measured on, and what else there is to know."""
    system: str
    metrics: tuple[Metric, ...]
    images: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """One system on a benchmark, or several side by side."""
    systems: tuple[SystemResult, ...]

    @property
    def metrics(self) -> list[Metric]:
        """All figures as `timm-multigrain publish --metrics` takes them."""
        return [metric for system in self.systems for metric in system.metrics]

    def value(self, metric: str, split: str | None = None, system: int = -1) -> float:
        """One figure, of the last system by default; KeyError if it was not measured."""
        return {(m.metric, m.split): m.value for m in self.systems[system].metrics}[metric, split]

    def save(self, path: str | os.PathLike) -> Path:
        """Write `metrics` as a JSON list, whole or not at all."""
        return write_text(path, json.dumps([asdict(metric) for metric in self.metrics], indent=2) + '\n')

    def __str__(self) -> str:
        """A Markdown table: a row per system, a column per figure, the best of each column in bold."""
        values = [{m.column: f'{m.value:.2f}' for m in system.metrics if m.metric not in _SAVED_ONLY}
                  for system in self.systems]
        columns = list(dict.fromkeys(column for row in values for column in row))
        best = {column: max((row[column] for row in values if column in row), key=float) for column in columns}
        rows = [['system', 'size', *columns]]
        for system, row in zip(self.systems, values, strict=True):
            cells = [row.get(column, '–') for column in columns]
            rows.append([system.system, str(system.metrics[0].size), *(
                f'**{cell}**' if len(values) > 1 and cell == best[column] else cell
                for column, cell in zip(columns, cells, strict=True))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ['| ' + ' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + ' |'
                 for row in rows]
        lines.insert(1, '|-' + '-|-'.join('-' * width for width in widths) + '-|')
        heads = dict.fromkeys(system.images for system in self.systems)
        notes = dict.fromkeys(note for system in self.systems for note in system.notes)
        return '\n'.join([*heads, '', *lines, '', *notes]).rstrip()
