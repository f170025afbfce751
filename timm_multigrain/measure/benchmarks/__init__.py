"""Benchmarks of image retrieval and copy detection, read from the layouts they are published in."""
import difflib
import inspect
import os

from timm_multigrain.measure.archives import fetch_files

from .base import Benchmark, Figure
from .copydays import COPYDAYS
from .disc21 import Disc21
from .layouts import LAYOUTS
from .lists import Layout
from .revisited import DISTRACTORS, ROXFORD, RPARIS

__all__ = ['BENCHMARKS', 'Benchmark', 'Figure', 'download_benchmark', 'load_benchmark']

BENCHMARKS: dict[str, type[Benchmark] | Layout] = {
    **LAYOUTS, 'copydays': COPYDAYS, 'roxford5k': ROXFORD, 'rparis6k': RPARIS, 'disc21': Disc21}


def load_benchmark(name: str, data: str | os.PathLike, **options) -> Benchmark:
    """A benchmark from a folder in its published layout.

    Args:
        name: One of `BENCHMARKS`.
        **options: Those of its `load`: `subset`, `upright` (holidays), `ground_truth` (folder, list, roxford5k,
            rparis6k, disc21), `queries` (disc21). None counts as not given.

    Raises:
        ValueError: Unknown name or option, or ground truth of another form.
        FileNotFoundError: The folder, its ground truth or some of its images are missing.
    """
    load = _find(name).load
    options = {key: value for key, value in options.items() if value not in (None, False)}
    allowed = set(inspect.signature(load).parameters) - {'data'}
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f'{name} has no option {", ".join(unknown)}; it has {", ".join(sorted(allowed))}.')
    return load(data, **options)


def download_benchmark(name: str, data: str | os.PathLike) -> None:
    """Fetch and unpack what is missing of a benchmark, or of 'revisitop1m', a million distractors."""
    downloads = DISTRACTORS if name == 'revisitop1m' else _find(name).downloads
    if not downloads:
        raise ValueError(f'{name} cannot be downloaded by a program. {BENCHMARKS[name].name}: '
                         f'{BENCHMARKS[name].source}.')
    fetch_files(downloads, data)


def _find(name: str) -> type[Benchmark] | Layout:
    if name not in BENCHMARKS:
        near = ', '.join(difflib.get_close_matches(name, BENCHMARKS, n=1) or BENCHMARKS)
        raise ValueError(f'{name!r} is not a benchmark: take {near}.')
    return BENCHMARKS[name]
