"""Measure models on a benchmark: describe its images, rank the database for each query, judge the ranking.

    benchmark = load_benchmark('rparis6k', 'data/rparis6k')
    result = evaluate(model, benchmark, protocol=Protocol.for_model(model, size=1024, **benchmark.published))
    print(result)
    result.save('results.json')

The database is streamed, distractors after it: neither their descriptors nor the scores are ever in memory together.
"""
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm_multigrain.embed.descriptors import iter_shards
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.systems import SUMS, Systems, UnitPool, choose_systems, with_own_head
from timm_multigrain.images.sources import ImageSource, open_images
from timm_multigrain.models.multigrain import MultiGrain

from .benchmark_result import BenchmarkResult, Comparison
from .benchmark_vectors import BenchmarkVectors, describe, describe_benchmark, one_pass
from .benchmarks import Benchmark, Figure, load_benchmark
from .rankings import AfterRanking, normalize, rank

__all__ = ['AfterRanking', 'compare', 'evaluate']

Images = ImageSource | str | os.PathLike
SCORE_METRICS = ('uAP', 'recall@P90')  # those that compare scores of different queries


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
    protocols = None if protocol is None else [protocol]
    return compare({name: model}, benchmark, data, protocols, **kwargs).results[-1]


def compare(
        models: Mapping[str, MultiGrain],
        benchmark: str | Benchmark,
        data: str | os.PathLike | None = None,
        protocols: Sequence[Protocol] | Callable[[MultiGrain], Sequence[Protocol]] | None = None,
        *,
        poolings: Sequence[str] = (),
        exponents: Sequence[float] = (),
        whiten: Images | None = None,
        components: int | None = None,
        distractors: Images | None = None,
        after: AfterRanking | None = None,
        cache_dir: str | os.PathLike | None = None,
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
        components: Components of the whitening, all by default.
        distractors: More images for the database.
        after: Query expansion, database augmentation, score normalisation.
        cache_dir: Folder that keeps the descriptors, so that a run that was cut off goes on; temporary by default.
        command: What repeats the measurement, for the results.
        options: The benchmark's own, see `load_benchmark`.
        **extraction: As `timm_multigrain.embed.extract.extract` takes them: batch_size, workers, device, dtype.

    Raises:
        FileNotFoundError: Images or ground truth are missing.
        ValueError: An image of the benchmark cannot be read, ground truth that does not fit, or unknown options.
    """
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark, data, **(options or {}))
    after = after or AfterRanking()
    distractors, whiten, training = _open(distractors), _open(whiten), _training(benchmark, after)
    results = []
    with _folder(cache_dir) as folder:
        for name, model in models.items():
            for protocol in _protocols(protocols, model, benchmark):
                systems = Systems(model, choose_systems(model, poolings, exponents))
                if whiten is not None:
                    add_whitened(systems, whiten, protocol, components, folder, **extraction)
                alone = [systems] if one_pass(protocol) else map(systems.single, range(len(systems.systems)))
                for part in alone:
                    vectors = describe_benchmark(
                        part, benchmark, protocol, folder, distractors, training, **extraction)
                    results += [_result(benchmark, vectors, number, name, protocol, after, command)
                                for number in range(len(part.systems))]
    return Comparison(tuple(results))


def _result(benchmark: Benchmark, vectors: BenchmarkVectors, number: int, name: str, protocol: Protocol,
            after: AfterRanking, command: str | None) -> BenchmarkResult:
    system = vectors.systems.systems[number]
    device = next(vectors.systems.parameters()).device
    scores = rank(vectors, number, after, benchmark.query_rows, device)
    figures = benchmark.measure(scores)
    if vectors.has_training:
        normalized = benchmark.measure(normalize(scores, vectors, number))
        figures += [Figure(f.metric, f.value, f'{f.split}, normalised' if f.split else 'normalised')
                    for f in normalized if f.metric in SCORE_METRICS]
    added = vectors.num_database - len(benchmark.database)
    words = ', '.join(filter(None, (str(protocol), _query_crop(benchmark, protocol), str(after))))
    notes = [*_deviations(benchmark, protocol), *(f'Left out, not readable: {r}' for r in vectors.skipped.values())]
    return BenchmarkResult(
        benchmark=benchmark.title + (f' + {_count(added)}' if added else ''), task=benchmark.task,
        system=f'{name}, {system}', figures=tuple(figures), size=protocol.size, p=system.exponent,
        pooling=system.name, protocol=words, whitening=system.whitening,
        num_queries=benchmark.num_queries, num_database=vectors.num_database,
        notes=tuple(notes), command=command)


def _query_crop(benchmark: Benchmark, protocol: Protocol) -> str:
    """What is done with the part of an image that is the query."""
    if not getattr(benchmark.queries, 'boxes', None):
        return ''
    return 'queries cut out, then ' + (
        'reduced as the whole image' if protocol.kind == 'thumbnail' else 'resized as an image of their own')


def _deviations(benchmark: Benchmark, protocol: Protocol) -> list[str]:
    differing = [f'{name} {value}' for name, value in benchmark.published.items() if getattr(protocol, name) != value]
    return [f'Not comparable with published figures, which have {", ".join(differing)}.'] if differing else []


def _protocols(protocols: Sequence[Protocol] | Callable | None, model: MultiGrain,
               benchmark: Benchmark) -> Sequence[Protocol]:
    if callable(protocols):
        return protocols(model)
    return [Protocol.for_model(model, **benchmark.published)] if protocols is None else protocols


def _training(benchmark: Benchmark, after: AfterRanking) -> ImageSource | None:
    if after.score_norm is not True:
        return _open(after.score_norm)
    training = getattr(benchmark, 'training', None)
    if training is None:
        raise ValueError(f'{benchmark.title} has no training images to normalise scores with: name a folder of some.')
    return training


def _count(number: int) -> str:
    return 'R1M' if number == 1_001_001 else f'{number} distractors'


def _open(images: Images | None) -> ImageSource | None:
    return images if images is None or isinstance(images, ImageSource) else open_images(images)


def add_whitened(systems: Systems, images: ImageSource, protocol: Protocol, components: int | None, folder: Path,
                 **extraction: Any) -> None:
    """For each system one more, whitened; all of them are fitted on one pass over the images.

    Of poolings that are sums the embedding is L2-normalised before, as their papers do: how long it is depends on the
    shape of the image, and the whitening would take that from its constant channel and enlarge it.

    Raises:
        ValueError: The model is whitened already, or there are too few images.
    """
    from timm_multigrain.whiten.whiten import fit_whitening, fold_whitening

    if any(system.whitening for system in systems.systems):
        raise ValueError('The model is whitened already: evaluate it as it is, or take the one without whitening.')
    where, _ = describe(systems, images, protocol, folder, strict=False, raw=True, **extraction)
    for number, system in enumerate(list(systems.systems)):
        unit = system.pooling in SUMS
        pooled = (systems.take(vectors, number, normalize=unit) for _, vectors in iter_shards(where))
        fit = fit_whitening(pooled, components)
        model = with_own_head(systems.models[number])
        if unit:
            model.head.pool = UnitPool(model.head.pool)
        fold_whitening(model, fit)
        systems.add(replace(system, whitening=model.embed_dim), model)


@contextmanager
def _folder(cache_dir: str | os.PathLike | None) -> Iterator[Path]:
    if cache_dir is not None:
        yield Path(cache_dir)
        return
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ValueError('Several processes share the descriptors through a folder: give a cache_dir that all of them '
                         'see.')
    with tempfile.TemporaryDirectory(prefix='timm-multigrain-') as folder:
        yield Path(folder)
