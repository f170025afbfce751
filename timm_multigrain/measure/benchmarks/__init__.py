"""Benchmarks of image retrieval and copy detection, read from the layouts they are published in."""
import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial

from timm_multigrain.measure.archives import RemoteFile, fetch_files

from . import copydays, disc21, folder, holidays, revisited, ukbench
from .benchmark import Benchmark, Figure
from .copydays import load_copydays
from .disc21 import load_disc21
from .folder import load_folder
from .holidays import load_holidays
from .revisited import load_revisited
from .ukbench import load_ukbench

__all__ = ['BENCHMARKS', 'Benchmark', 'Figure', 'download_benchmark', 'load_benchmark']

BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    'holidays': load_holidays,
    'ukbench': load_ukbench,
    'copydays': load_copydays,
    'roxford5k': partial(load_revisited, name='roxford5k'),
    'rparis6k': partial(load_revisited, name='rparis6k'),
    'disc21': load_disc21,
    'folder': load_folder,
}
_DOWNLOADS: dict[str, Sequence[RemoteFile]] = {
    'holidays': holidays.DOWNLOADS, 'ukbench': ukbench.DOWNLOADS, 'copydays': copydays.DOWNLOADS,
    **revisited.DOWNLOADS, 'revisitop1m': revisited.DISTRACTORS}
_SOURCES = {'disc21': f'{disc21.TITLE}: {disc21.SOURCE}', 'folder': f'Your own images: {folder.SOURCE}'}


def load_benchmark(name: str, data: str | os.PathLike, **options) -> Benchmark:
    """A benchmark from a folder in its published layout.

    Args:
        name: One of `BENCHMARKS`.
        data: The folder.
        **options: The loader's own: `subset`, `upright` (holidays), `ground_truth` (roxford5k, rparis6k, disc21,
            folder), `queries` (disc21). None counts as not given.

    Raises:
        ValueError: Unknown name, an option that the benchmark does not have, or ground truth of another form.
        FileNotFoundError: The folder, its ground truth or some of its images are missing.
    """
    loader = BENCHMARKS[_known(name)]
    options = {key: value for key, value in options.items() if value not in (None, False)}
    allowed = set(inspect.signature(loader).parameters) - {'data', 'name'}
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise ValueError(f'{name} has no option {", ".join(unknown)}; it has {", ".join(sorted(allowed)) or "none"}.')
    return loader(data, **options)


def download_benchmark(name: str, data: str | os.PathLike, report: Callable[[str], None] = print) -> None:
    """Fetch and unpack what is missing of a benchmark.

    Args:
        name: One of `BENCHMARKS`, or 'revisitop1m' for the million distractors of Revisited Oxford and Paris.
        data: Folder, made if missing.
        report: Takes a sentence for each file.

    Raises:
        ValueError: It has no public address, and where to get it; or as `fetch_files`.
        FileNotFoundError, RuntimeError: The download fails.
    """
    if name not in _DOWNLOADS and _known(name):
        raise ValueError(f'{name} cannot be downloaded by a program. {_SOURCES[name]}.')
    fetch_files(_DOWNLOADS[name], data, report)


def _known(name: str) -> str:
    if name not in BENCHMARKS:
        near = ', '.join(difflib.get_close_matches(name, BENCHMARKS, n=1) or BENCHMARKS)
        raise ValueError(f'{name!r} is not a benchmark: take {near}.')
    return name
