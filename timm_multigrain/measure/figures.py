"""Measured figures of a model, each with the settings it was measured at: a JSON file, and the card's model-index.

The JSON file is a list of objects, one per figure; the fields of `Metric` from split on may be left out:

    [{"task": "classification", "dataset": "ImageNet-1k", "metric": "top1", "value": 78.6,
      "size": 500, "p": 4, "protocol": "longer side", "whitening": null, "split": "validation"}]
"""
import math
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_multigrain.files import read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ['Metric', 'parse_metrics', 'read_metrics']

# Our tasks, and what the Hub calls them.
TASKS = {
    'classification': ('image-classification', 'Image Classification'),
    'retrieval': ('image-retrieval', 'Image Retrieval'),
    'copy-detection': ('image-copy-detection', 'Image Copy Detection'),
}
_SETTINGS = ('size', 'p', 'protocol', 'whitening')
_HUB_METRICS = {'top1': 'accuracy', 'top5': 'top_5_accuracy'}


@dataclass(frozen=True)
class Metric:
    """One figure and how it was measured.

    Attributes:
        task: 'classification', 'retrieval' or 'copy-detection'.
        dataset: Name of the data set, such as 'ImageNet-1k' or 'INRIA Holidays'.
        metric: 'top1', 'top5', 'mAP', 'uAP' and the like.
        value: The figure, in the unit the metric is quoted in.
        size: Pixels of the side that the protocol names.
        p: Exponent of the pooling at the test (p*), 'inf' for the maximum; None where the model has several or none.
        protocol: Which side the size is of, the crop, what becomes of smaller images and of queries that are cut out,
            such as 'shorter side 256, centre crop'.
        whitening: Components of the whitened descriptor, or words for it; None without.
        split: Part of the data set.
        source_name: Who published the figure, if it was not measured on these very weights here.
        source_url: Where.
        command: What repeats the measurement.

    Raises:
        ValueError: A field of the wrong kind.
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
        checks = {
            'task': (isinstance(self.task, str) and self.task in TASKS, f'one of {", ".join(TASKS)}'),
            **{name: (_is_text(getattr(self, name)), 'a text') for name in ('dataset', 'metric', 'protocol')},
            'value': (_is_number(self.value), 'a finite number'),
            'size': (_is_count(self.size), 'a number of pixels'),
            'p': (self.p in (None, 'inf') or (_is_number(self.p) and self.p > 0), 'a number above 0, "inf" or null'),
            'whitening': (self.whitening is None or _is_count(self.whitening) or _is_text(self.whitening),
                          'a number of components, a text or null'),
            **{name: (getattr(self, name) is None or _is_text(getattr(self, name)), 'a text')
               for name in ('split', 'source_name', 'source_url', 'command')},
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f'{name} is {getattr(self, name)!r}, and has to be {wanted}')
        if self.source_name and not self.source_url:
            raise ValueError('source_name needs source_url')

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


def read_metrics(path: str | os.PathLike) -> list[Metric]:
    """Figures of a JSON file.

    Raises:
        FileNotFoundError: File not found.
        ValueError: It does not follow the schema.
    """
    path = Path(path)
    entries = read_json(path, 'file of figures')
    try:
        return parse_metrics(entries)
    except ValueError as e:
        raise ValueError(f'{path}: {e}.') from e


def parse_metrics(entries: Sequence[Metric | dict[str, Any]]) -> list[Metric]:
    """Figures of a list of objects.

    Raises:
        ValueError: An object without a field, with an unknown one, or with a value of the wrong kind.
    """
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f'a list of figures is needed, not {type(entries).__name__}')
    return [entry if isinstance(entry, Metric) else _parse(entry, number) for number, entry in enumerate(entries, 1)]


def _parse(entry: Any, number: int) -> Metric:
    if not isinstance(entry, dict):
        raise ValueError(f'figure {number} is {entry!r:.100}, and has to be an object')
    names = [f.name for f in fields(Metric)]
    missing = [f.name for f in fields(Metric) if f.default is MISSING and f.name not in entry]
    unknown = [name for name in entry if name not in names]
    if unknown:
        raise ValueError(f'figure {number} has an unknown field {unknown[0]!r}: the fields are {", ".join(names)}')
    if missing:
        raise ValueError(f'figure {number} lacks {", ".join(missing)}; "p" and "whitening" may be null')
    try:
        return Metric(**entry)
    except ValueError as e:
        raise ValueError(f'figure {number}: {e}') from e


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_number(value: Any) -> bool:
    integer = isinstance(value, int) and not isinstance(value, bool)
    return abs(value) < 2**63 if integer else isinstance(value, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value > 0
