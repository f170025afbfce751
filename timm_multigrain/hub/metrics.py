"""Measured figures of a model, each with the settings it was measured at: a JSON file, and the card's model-index.

The JSON file is a list of objects, one a figure:

    [{"task": "classification", "dataset": "ImageNet-1k", "metric": "top1", "value": 78.6,
      "size": 500, "p": 4, "protocol": "longer side", "whitening": null,
      "split": "validation", "source_name": "...", "source_url": "https://...", "command": "timm-multigrain ..."}]

`Metric` says what the fields are; those from split on may be left out.
"""
import difflib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        texts = ('dataset', 'metric', 'protocol')
        optional = ('split', 'source_name', 'source_url', 'command')
        checks = (
            ('task', isinstance(self.task, str) and self.task in TASKS, f'one of {", ".join(TASKS)}'),
            *((name, _is_text(getattr(self, name)), 'a text') for name in texts),
            *((name, getattr(self, name) is None or _is_text(getattr(self, name)), 'a text') for name in optional),
            ('value', _is_number(self.value) and math.isfinite(self.value), 'a finite number'),
            ('size', _is_count(self.size), 'a number of pixels'),
            ('p', self.p in (None, 'inf') or (_is_number(self.p) and 0 < self.p < math.inf),
             'a number above 0, "inf" or null'),
            ('whitening', self.whitening is None or _is_count(self.whitening) or _is_text(self.whitening),
             'a number of components, a text or null'),
            ('source_url', self.source_name is None or self.source_url is not None, 'given with source_name'),
        )
        for name, good, wanted in checks:
            if not good:
                raise ValueError(f'{name} is {getattr(self, name)!r}, and has to be {wanted}')

    def to_eval_result(self) -> 'EvalResult':
        """The figure as the Hub's model-index takes it, the settings among the metric's arguments."""
        from huggingface_hub import EvalResult

        task_type, task_name = TASKS[self.task]
        args = {name: 'none' if getattr(self, name) is None else getattr(self, name) for name in _SETTINGS}
        if self.command:
            args['command'] = self.command
        return EvalResult(
            task_type=task_type, task_name=task_name, dataset_name=self.dataset, dataset_type=_slug(self.dataset),
            dataset_split=self.split, metric_type=_HUB_METRICS.get(self.metric, self.metric), metric_name=self.metric,
            metric_value=self.value, metric_args=args, source_name=self.source_name, source_url=self.source_url)

    @classmethod
    def from_eval_result(cls, result: 'EvalResult') -> 'Metric | None':
        """The figure that `to_eval_result` wrote; None for one that came from elsewhere."""
        args = result.metric_args
        task = next((task for task, (kind, _) in TASKS.items() if kind == result.task_type), None)
        if task is None or not isinstance(args, dict) or not set(_SETTINGS) <= set(args):
            return None
        settings = {name: None if args[name] == 'none' else args[name] for name in _SETTINGS}
        try:
            return cls(
                task=task, dataset=result.dataset_name, metric=result.metric_name, value=result.metric_value,
                split=result.dataset_split, source_name=result.source_name, source_url=result.source_url,
                command=args.get('command'), **settings)
        except ValueError:
            return None


def read_metrics(path: str | os.PathLike) -> list[Metric]:
    """Figures of a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not follow the schema.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: there is no such file of figures.') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f'{path} is not JSON: {e}.') from e
    try:
        return parse_metrics(entries)
    except ValueError as e:
        raise ValueError(f'{path}: {e}.') from e


def parse_metrics(entries: Iterable[dict[str, Any]]) -> list[Metric]:
    """Figures of a list of objects.

    Raises:
        ValueError: An object without a field, with an unknown one, or with a value of the wrong kind.
    """
    if not isinstance(entries, list):
        raise ValueError(f'a list of figures is needed, not {type(entries).__name__}')
    return [_parse(entry, f'figure {number}') for number, entry in enumerate(entries, 1)]


def _parse(entry: Any, shown: str) -> Metric:
    if isinstance(entry, Metric):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f'{shown} is {entry!r}, and has to be an object')
    names = [f.name for f in fields(Metric)]
    unknown = next((name for name in entry if name not in names), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, names, n=1) or names
        raise ValueError(f'{shown} has an unknown field {unknown!r}: did you mean {" or ".join(near)}?')
    missing = [f.name for f in fields(Metric) if f.default is MISSING and f.name not in entry]
    if missing:
        raise ValueError(f'{shown} lacks {", ".join(missing)}; "p" and "whitening" may be null')
    try:
        return Metric(**entry)
    except ValueError as e:
        raise ValueError(f'{shown}: {e}') from e


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _slug(name: str) -> str:
    return '-'.join(''.join(c if c.isalnum() else ' ' for c in name.lower()).split())
