"""Measure models on a benchmark: describe its images, rank the database for each query, judge the ranking.

    benchmark = load_benchmark('rparis6k', 'data/rparis6k')
    result = evaluate(model, benchmark, protocol=Protocol.for_model(model, size=1024, **benchmark.published))
    print(result)
    result.save('results.json')

The database is streamed, distractors after it: neither their descriptors nor the scores are ever in memory together.
"""
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.poolings import SUMS, System, Systems, UnitPool, choose_systems, with_own_head
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import Descriptors, iter_shards
from timm_multigrain.images.sources import ImageSource, open_images
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.search.exact import SimilarityChunks
from timm_multigrain.search.rerank import alpha_query_expansion, database_augmentation, score_offsets
from timm_multigrain.whiten.fit import fit_whitening, fold_whitening

from .benchmarks import Benchmark, load_benchmark
from .results import BenchmarkResult, Comparison, Figure

__all__ = ['AfterRanking', 'add_whitened', 'compare', 'evaluate']

Images = ImageSource | str | os.PathLike
SCORE_METRICS = ('uAP', 'recall@P90')  # those that compare scores of different queries
NORM_NEIGHBOR, NORM_WEIGHT = 10, 2.0  # of the organisers of DISC21


@dataclass(frozen=True)
class AfterRanking:
    """What is done with the descriptors after the first ranking; see `timm_multigrain.search.rerank`.

    Attributes:
        qe: Neighbours k and alpha of the query expansion, None without.
        dba: Neighbours k and alpha of the database-side augmentation, None without.
        score_norm: Images whose similarity to a query is taken off its scores, True for the training images that the
            benchmark has, None without. The figures of copy detection are then given both ways.
    """
    qe: tuple[int, float] | None = None
    dba: tuple[int, float] | None = None
    score_norm: Images | bool | None = None

    def __str__(self) -> str:
        both = ('query expansion', self.qe), ('database augmentation', self.dba)
        return ', '.join(f'{name} k={value[0]} alpha={value[1]:g}' for name, value in both if value)


def evaluate(
        model: MultiGrain,
        benchmark: str | Benchmark,
        data: str | os.PathLike | None = None,
        protocol: Protocol | None = None,
        *,
        name: str = 'model',
        **kwargs: Any,
) -> BenchmarkResult:
    """Measure one model with its own pooling, or with the one system that `poolings` and `exponents` name.

    Args:
        model: The model, in eval mode.
        benchmark: Name of one, see `timm_multigrain.measure.benchmarks.BENCHMARKS`, or one that is loaded.
        data: Its folder.
        protocol: Preprocessing; by default as in the public evaluation of the benchmark, at the model's own size.
        name: What to call the model.
        **kwargs: As `compare` takes them. With `whiten` the result is the whitened one.

    Raises:
        ValueError: As `compare`, or more than one system.
    """
    systems = choose_systems(model, kwargs.get('poolings', ()), kwargs.get('exponents', ()))
    if len(systems) > 1:
        raise ValueError(f'{len(systems)} systems are asked for, {", ".join(map(str, systems))}: compare() measures '
                         'several.')
    return compare({name: model}, benchmark, data, None if protocol is None else [protocol], **kwargs).results[-1]


def compare(
        models: Mapping[str, MultiGrain],
        benchmark: str | Benchmark,
        data: str | os.PathLike | None = None,
        protocols: Sequence[Protocol] | Callable[[MultiGrain], Sequence[Protocol]] | None = None,
        *,
        poolings: Sequence[str] = (),
        exponents: Sequence[float] = (),
        whiten: Images | None = None,
        dim: int | None = None,
        distractors: Images | None = None,
        after: AfterRanking | None = None,
        work_dir: str | os.PathLike | None = None,
        command: str | None = None,
        options: Mapping[str, Any] | None = None,
        **extraction: Any,
) -> Comparison:
    """Measure models, with every pooling at every protocol, on one benchmark; a trunk runs once for all its poolings.

    Args:
        models: Models in eval mode, by what to call them.
        benchmark: Name of one, or one that is loaded.
        data: Its folder.
        protocols: Preprocessings, each a row of the table; by default as in the public evaluation of the benchmark, at
            the model's own size. Or a function that gives those of a model, where the models differ in normalisation.
        poolings: Comparison systems, see `POOLINGS`; none: the model's own pooling.
        exponents: A GeM for each.
        whiten: Images to fit a whitening on, for every system at every protocol; it is measured beside the system
            without. They should be other images than the benchmark's.
        dim: Components of the whitening, all by default.
        distractors: More images for the database.
        after: Query expansion, database augmentation, score normalisation.
        work_dir: Folder that keeps the descriptors, so that a run that was cut off goes on; temporary by default.
        command: What repeats the measurement, for the results.
        options: The benchmark's own, see `load_benchmark`.
        **extraction: As of `extract`: batch_size, workers, device, dtype, fast, progress.

    Raises:
        FileNotFoundError: Images or ground truth are missing.
        ValueError: An image of the benchmark cannot be read, ground truth that does not fit, or unknown options.
    """
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark, data, **(options or {}))
    after = after or AfterRanking()
    distractors, whiten, training = _open(distractors), _open(whiten), _training(benchmark, after)
    if not callable(protocols):
        given = protocols
        protocols = lambda model: given or [Protocol.for_model(model, **benchmark.published)]  # noqa: E731
    results = []
    with _folder(work_dir) as folder:
        for name, model in models.items():
            for protocol in protocols(model):
                systems = Systems.of(model, choose_systems(model, poolings, exponents))
                if whiten is not None:
                    systems = add_whitened(systems, whiten, protocol, dim, folder, **extraction)
                alone = zip(systems.systems, systems.models, strict=True)
                for together in [systems] if _one_pass(protocol) else [Systems([s], [m]) for s, m in alone]:
                    described = _describe_benchmark(
                        together, benchmark, protocol, folder, distractors, training, **extraction)
                    for number, system in enumerate(together.systems):
                        figures = _figures(benchmark, described, number, after)
                        results.append(_result(
                            benchmark, described, system, figures, name, protocol, after, command))
    return Comparison(tuple(results))


@dataclass(frozen=True, eq=False)
class _Described:
    """A described benchmark: the folders of the database and the distractors, and of the training images."""
    systems: Systems
    query_vectors: torch.Tensor
    folders: tuple[Path, ...]
    training: Path | None
    num_database: int
    skipped: Mapping[str, str]

    def queries(self, number: int) -> torch.Tensor:
        """Descriptors of the queries, one system's, (Q, d)."""
        return self.systems.take(self.query_vectors, number)

    def database(self, number: int) -> 'Shards':
        """Descriptors of the database and then the distractors, one system's."""
        return Shards(self.folders, self.systems, number)


@dataclass(frozen=True, eq=False)
class Shards:
    """One system's descriptors in folders as (n, d) shards, read anew each time they are iterated."""
    folders: Sequence[Path]
    systems: Systems
    number: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        for folder in self.folders:
            for _, vectors in iter_shards(folder):
                yield self.systems.take(vectors, self.number)


def _describe_benchmark(systems: Systems, benchmark: Benchmark, protocol: Protocol, folder: Path,
                        distractors: ImageSource | None, training: ImageSource | None, **extraction) -> _Described:
    """Images of the benchmark itself have to be readable; distractors and training images that are not are listed."""
    where, described = _describe(systems, benchmark.database, protocol, folder, **extraction)
    folders, number, skipped = [where], len(described), {}
    if benchmark.queries is None:
        queries = described.vectors[torch.from_numpy(benchmark.query_rows)]
    else:
        queries = _describe(systems, benchmark.queries, protocol, folder, **extraction)[1].vectors
    if distractors is not None:
        where, described = _describe(systems, distractors, protocol, folder, strict=False, **extraction)
        folders.append(where)
        number += len(described)
        skipped.update(described.skipped)
    where = None
    if training is not None:
        where, described = _describe(systems, training, protocol, folder, strict=False, **extraction)
        skipped.update(described.skipped)
    return _Described(systems, queries, tuple(folders), where, number, skipped)


def _describe(systems: Systems, source: ImageSource, protocol: Protocol, folder: Path, strict: bool = True,
              raw: bool | None = None, **extraction) -> tuple[Path, Descriptors]:
    """Embeddings of images, side by side if they are of several systems, in a folder of their own in `folder`.

    They are raw where an image is seen once, and descriptors are the same but for the normalisation.
    """
    raw = _one_pass(protocol) if raw is None else raw
    model = systems.models[0] if len(systems) == 1 else systems
    content = [weights_sha256(systems), [str(system) for system in systems.systems], protocol.to_dict(),
               source.fingerprint(), strict, raw]
    where = folder / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return where, extract(model, source, protocol, where, strict=strict, descriptor=not raw, **extraction)


def _one_pass(protocol: Protocol) -> bool:
    """Whether an image is seen once. Averages over views are taken of descriptors, for each system by itself."""
    return protocol.scales == (1.,) and not protocol.flip


def add_whitened(systems: Systems, images: ImageSource, protocol: Protocol, dim: int | None, folder: Path,
                 **extraction: Any) -> Systems:
    """The systems, and each of them whitened; all of them are fitted on one pass over the images.

    Of poolings that are sums the embedding is L2-normalised before, as their papers do: how long it is depends on the
    shape of the image, and the whitening would take that from its constant channel and enlarge it.

    Raises:
        ValueError: The model is whitened already, or there are too few images.
    """
    if any(system.whitening for system in systems.systems):
        raise ValueError('The model is whitened already: evaluate it as it is, or take the one without whitening.')
    where, _ = _describe(systems, images, protocol, folder, strict=False, raw=True, **extraction)
    whitened, models = [], []
    for number, (system, model) in enumerate(zip(systems.systems, systems.models, strict=True)):
        unit = system.pooling in SUMS
        model = with_own_head(model)
        if unit:
            model.head.pool = UnitPool(model.head.pool)
        pooled = (systems.take(vectors, number, normalize=unit) for _, vectors in iter_shards(where))
        fold_whitening(model, fit_whitening(pooled, dim))
        models.append(model)
        whitened.append(replace(system, whitening=model.embed_dim))
    return Systems(systems.systems + whitened, systems.models + models)


def _figures(benchmark: Benchmark, described: _Described, number: int, after: AfterRanking) -> list[Figure]:
    """What the benchmark measures of one system, after what may be done before a ranking is judged."""
    device = next(described.systems.parameters()).device
    queries, database = described.queries(number).to(device), described.database(number)
    rows = None if benchmark.query_rows is None else torch.from_numpy(np.asarray(benchmark.query_rows))
    if after.dba:  # reads the whole database into memory
        database = database_augmentation(torch.cat(list(database)).to(device), *after.dba)
        queries = queries if rows is None else database[rows]
    if after.qe:
        queries = alpha_query_expansion(queries, database, *after.qe, query_rows=rows)
    figures = benchmark.measure(SimilarityChunks(queries, database))
    if described.training is not None:
        background, place = Shards([described.training], described.systems, number), NORM_NEIGHBOR - 1
        offsets = score_offsets(queries, background, NORM_WEIGHT, place, place)
        figures += [Figure(f.metric, f.value, f'{f.split}, normalised' if f.split else 'normalised')
                    for f in benchmark.measure(SimilarityChunks(queries, database, offsets=offsets))
                    if f.metric in SCORE_METRICS]
    return figures


def _result(benchmark: Benchmark, described: _Described, system: System, figures: list[Figure], name: str,
            protocol: Protocol, after: AfterRanking, command: str | None) -> BenchmarkResult:
    title, added = benchmark.title, described.num_database - len(benchmark.database)
    if added:
        title += ' + R1M' if added == 1_001_001 else f' + {added} distractors'
    words = [str(protocol), str(after)]
    if getattr(benchmark.queries, 'boxes', None):
        words.insert(1, 'queries cut out, then ' + (
            'reduced as the whole image' if protocol.kind == 'thumbnail' else 'resized as an image of their own'))
    differing = [f'{key} {value}' for key, value in benchmark.published.items() if getattr(protocol, key) != value]
    notes = [f'Not comparable with published figures, which have {", ".join(differing)}.'] * bool(differing)
    return BenchmarkResult(
        benchmark=title, task=benchmark.task, system=f'{name}, {system}', figures=tuple(figures), size=protocol.size,
        p=system.exponent, pooling=system.name, protocol=', '.join(filter(None, words)), whitening=system.whitening,
        num_queries=benchmark.num_queries, num_database=described.num_database,
        notes=(*notes, *(f'Left out, not readable: {reason}' for reason in described.skipped.values())),
        command=command)


def _training(benchmark: Benchmark, after: AfterRanking) -> ImageSource | None:
    if after.score_norm is not True:
        return _open(after.score_norm)
    training = getattr(benchmark, 'training', None)
    if training is None:
        raise ValueError(f'{benchmark.title} has no training images to normalise scores with: name a folder of some.')
    return training


def _open(images: Images | None) -> ImageSource | None:
    return images if images is None or isinstance(images, ImageSource) else open_images(images)


@contextmanager
def _folder(work_dir: str | os.PathLike | None) -> Iterator[Path]:
    if work_dir is not None:
        yield Path(work_dir)
        return
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ValueError('Several processes share the descriptors through a folder: give a work_dir that all of them '
                         'see.')
    with tempfile.TemporaryDirectory(prefix='timm-multigrain-') as folder:
        yield Path(folder)
