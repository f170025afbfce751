"""Measure models on a benchmark: describe its images, compare the database with each query, judge the ranking.

    benchmark = load_benchmark('rparis6k', 'data/rparis6k')
    result = evaluate(model, benchmark, protocols=Protocol.for_model(model, size=1024, **benchmark.published))
    print(result)
    result.save('results.json')

The database is streamed, distractors after it: neither their descriptors nor the scores are ever in memory together.
"""
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.poolings import SUMS, Systems, UnitPool, choose_systems, with_own_head
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import Descriptors, iter_shards
from timm_multigrain.files import counted
from timm_multigrain.images.sources import ImageSource, open_images
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.search import rerank as after
from timm_multigrain.search.exact import SimilarityChunks, shards_of
from timm_multigrain.search.local import FeaturesOf, LocalDescriber, LocalFeatures, VerifiedChunks, check_local
from timm_multigrain.whiten.fit import fit_whitening, fold_whitening, work_folder

from .benchmarks import Benchmark, Figure, load_benchmark
from .metrics import clustering_nmi
from .results import BenchmarkResult, Metric, SystemResult

Images = ImageSource | str | os.PathLike
SCORE_METRICS = ('uAP', 'recall@P90')  # those that compare scores of different queries
NORM_NEIGHBOR, NORM_WEIGHT = 10, 2.0  # of the organisers of DISC21
R1M = 1_001_001


def evaluate(
        models: MultiGrain | Mapping[str, MultiGrain],
        benchmark: str | Benchmark,
        data: str | os.PathLike | None = None,
        protocols: Protocol | Sequence[Protocol] | Callable[[MultiGrain], Sequence[Protocol]] | None = None,
        *,
        poolings: Sequence[str] = (),
        exponents: Sequence[float] = (),
        whiten: Images | None = None,
        dim: int | None = None,
        distractors: Images | None = None,
        qe: tuple[int, float] | None = None,
        dba: tuple[int, float] | None = None,
        rerank: int | Literal['auto'] | None = None,
        local: int | None = None,
        score_norm: Images | bool | None = None,
        nmi: bool = False,
        work_dir: str | os.PathLike | None = None,
        command: str | None = None,
        **extraction: Any,
) -> BenchmarkResult:
    """Measure a model on a benchmark, or several, with every pooling at every protocol.

    A trunk runs once for all its poolings.

    Args:
        models: A model in eval mode, or several by what to call them.
        benchmark: Name of one, see `timm_multigrain.measure.benchmarks.BENCHMARKS`, or one that is loaded.
        data: Its folder.
        protocols: Preprocessing, or several; by default as in the public evaluation of the benchmark, at the model's
            own size. Or a function that gives those of a model, where the models differ in normalisation.
        poolings: Comparison systems, see `POOLINGS`; none: the model's own pooling.
        exponents: A GeM for each.
        whiten: Images to fit a whitening on, for every system at every protocol; it is measured beside the system
            without. They should be other images than the benchmark's.
        dim: Components of the whitening, all by default.
        distractors: More images for the database.
        qe: Neighbours k and alpha of a query expansion, see `timm_multigrain.search.rerank`.
        dba: Neighbours k and alpha of a database-side augmentation. Queries that are images of the database are
            neighbours too; `rerank` leaves them out.
        rerank: Neighbours of a re-ranking of the first 400 images, or 'auto', see `timm_multigrain.search.rerank`; in
            place of the two above.
        local: Images of each ranking to verify by their details, see `timm_multigrain.search.local`; 100 is usual.
        score_norm: Images whose similarity to a query is taken off its scores, True for the training images that the
            benchmark has. The figures of copy detection are then given both ways.
        nmi: Also cluster the queries by k-means, see `metrics.clustering_nmi`.
        work_dir: Folder that keeps the descriptors, so that a run that was cut off goes on; temporary by default.
        **extraction: As of `extract`: batch_size, workers, device, dtype, fast, progress.

    Raises:
        FileNotFoundError: Images or ground truth are missing.
        ValueError: An image of the benchmark cannot be read, or ground truth or options that do not fit.
    """
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark, data)
    if work_dir is None and int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ValueError('Several processes share the descriptors through a folder: give a work_dir that all of them '
                         'see.')
    if rerank is not None:
        after.check_neighbours(rerank, qe, dba)
    if local is not None:
        check_local(local)
        if distractors is not None:
            raise ValueError('local looks at the details of the images of the benchmark only: leave distractors out.')
    distractors, whiten = _open(distractors), _open(whiten)
    training = getattr(benchmark, 'training', None) if score_norm is True else _open(score_norm)
    if score_norm is True and training is None:
        raise ValueError(f'{benchmark.title} has no training images to normalise scores with: name a folder of some.')
    if nmi and min(getattr(benchmark, 'query_groups', [-1])) < 0:
        raise ValueError(f'{benchmark.title} says of no images that they belong together: no clusters to compare with.')
    rows = []
    with work_folder(work_dir) as folder:
        for name, model in ({'model': models} if isinstance(models, torch.nn.Module) else models).items():
            given = protocols(model) if callable(protocols) else protocols
            given = given or Protocol.for_model(model, **benchmark.published)
            for protocol in [given] if isinstance(given, Protocol) else given:
                systems = Systems.of(model, choose_systems(model, poolings, exponents))
                if whiten is not None:
                    systems = add_whitened(systems, whiten, protocol, dim, folder, **extraction)
                alone = zip(systems.systems, systems.models, strict=True)
                for together in [systems] if _one_pass(protocol) else [Systems([s], [m]) for s, m in alone]:
                    run = _Run(together, benchmark, protocol, folder, distractors, training, extraction)
                    rows += [run.row(name, number, qe, dba, rerank, local, nmi, command)
                             for number in range(len(together))]
    return BenchmarkResult(tuple(rows))


def add_whitened(systems: Systems, images: ImageSource, protocol: Protocol, dim: int | None, folder: Path,
                 **extraction: Any) -> Systems:
    """The systems, and each of them whitened; all of them are fitted on one pass over the images.

    Of poolings that are sums the embedding is L2-normalised before, as their papers do: how long it is depends on the
    shape of the image, and the whitening would take that from its constant channel and enlarge it.
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
        fold_whitening(model, fit_whitening(Shards([where], systems, number, unit), dim))
        models.append(model)
        whitened.append(replace(system, whitening=model.embed_dim))
    return Systems(systems.systems + whitened, systems.models + models)


@dataclass(frozen=True, eq=False)
class Shards:
    """One system's descriptors in folders as (n, d) shards, read anew each time they are iterated."""
    folders: Sequence[Path]
    systems: Systems
    number: int
    normalize: bool = True

    def __iter__(self) -> Iterator[torch.Tensor]:
        for folder in self.folders:
            for _, vectors in iter_shards(folder):
                yield self.systems.take(vectors, self.number, self.normalize)


class _Run:
    """A benchmark described by systems that share a trunk, and what it measures of each.

    The benchmark's own images have to be readable; distractors and training images that are not are listed.
    """

    def __init__(self, systems: Systems, benchmark: Benchmark, protocol: Protocol, folder: Path,
                 distractors: ImageSource | None, training: ImageSource | None, extraction: dict):
        def describe(source: ImageSource, strict: bool = True) -> tuple[Path, Descriptors]:
            where, described = _describe(systems, source, protocol, folder, strict=strict, **extraction)
            self.skipped |= described.skipped
            return where, described

        self.systems, self.benchmark, self.protocol, self.skipped = systems, benchmark, protocol, {}
        self.extraction = extraction
        where, database = describe(benchmark.database)
        self.folders, self.added, self.training = [where], 0, None
        self.rows = None if benchmark.query_rows is None else torch.as_tensor(benchmark.query_rows)
        self.queries = database.vectors[self.rows] if benchmark.queries is None else describe(
            benchmark.queries)[1].vectors
        if distractors is not None:
            where, described = describe(distractors, strict=False)
            self.folders.append(where)
            self.added = len(described)
        if training is not None:
            self.training, _ = describe(training, strict=False)

    @cached_property
    def details(self) -> tuple[list[LocalFeatures], FeaturesOf]:
        """Of the queries, and of the images of the database as they are asked for; the same for all systems."""
        options = {key: value for key, value in self.extraction.items() if key in ('workers', 'device', 'progress')}
        describer = LocalDescriber(self.systems.models[0], self.protocol, **options).fit(self.benchmark.database)
        database, queries = FeaturesOf(describer, self.benchmark.database), self.benchmark.queries
        return database(self.rows.tolist()) if queries is None else list(describer.describe(queries)), database

    def row(self, name: str, number: int, qe: tuple | None, dba: tuple | None, rerank: int | str | None,
            local: int | None, nmi: bool, command: str | None) -> SystemResult:
        """Figures of a system, after what may be done before a ranking is judged."""
        benchmark, system = self.benchmark, self.systems.systems[number]
        queries = self.systems.take(self.queries, number).to(next(self.systems.parameters()).device)
        database = Shards(self.folders, self.systems, number)
        if self.rows is not None and not self.added and len(self.rows) == len(benchmark.database):
            database = queries  # they are in memory: all images are, in their order
        if dba:  # reads the whole database into memory
            database = after.database_augmentation(torch.cat(list(shards_of(database))).to(queries.device), *dba)
            queries = queries if self.rows is None else database[self.rows]
        if qe:
            queries = after.alpha_query_expansion(queries, database, *qe, query_rows=self.rows)

        def ranking(offsets: torch.Tensor | None = None) -> SimilarityChunks | after.RerankedChunks:
            if rerank is None:
                return SimilarityChunks(queries, database, offsets=offsets)
            return after.RerankedChunks(queries, database, self.rows, rerank, offsets)

        def verified(scores: SimilarityChunks | after.RerankedChunks):
            return scores if local is None else VerifiedChunks(scores, *self.details, local)

        scores = ranking()
        figures = benchmark.measure(verified(scores))
        if nmi:
            figures.append(Figure('NMI', 100 * clustering_nmi(queries, benchmark.query_groups)))
        if self.training is not None:
            background = Shards([self.training], self.systems, number)
            offsets = after.score_offsets(queries, background, NORM_WEIGHT, NORM_NEIGHBOR - 1, NORM_NEIGHBOR - 1)
            figures += [f._replace(split=f'{f.split}, normalised' if f.split else 'normalised')
                        for f in benchmark.measure(verified(ranking(offsets)))
                        if f.metric in SCORE_METRICS]
        title, words = benchmark.title, [str(self.protocol)]
        if self.added:
            title += ' + R1M' if self.added == R1M else f' + {self.added} distractors'
        if getattr(benchmark.queries, 'boxes', None):
            words.append('queries cut out, then ' + (
                'reduced as the whole image' if self.protocol.kind == 'thumbnail' else
                'resized as an image of their own'))
        words += [f'{what} k={value[0]} alpha={value[1]:g}' for what, value in (
            ('query expansion', qe), ('database augmentation', dba)) if value]
        words += [f're-ranking {"auto" if rerank == "auto" else f"k={rerank}"}'] * (rerank is not None)
        words += [f'first {local} verified by details'] * (local is not None)
        metrics = [Metric(
            task=benchmark.task, dataset=title, metric=metric, value=round(value, 4), size=self.protocol.size,
            p=system.exponent, protocol=', '.join(words + [system.name] * (system.name != 'GeM')),
            whitening=system.whitening, split=split, command=command) for metric, value, split in figures]
        images = (f'{title}: {counted(benchmark.num_queries, "query")}, '
                  f'{counted(len(benchmark.database) + self.added, "image")} searched; '
                  f'{", ".join(words)}')
        differing = [f'{key} {value}' for key, value in benchmark.published.items()
                     if getattr(self.protocol, key) != value]
        notes = [f'Not comparable with published figures, which have {", ".join(differing)}.'] * bool(differing)
        notes += [after.chosen(scores.agreements, rerank)] if rerank is not None else []
        notes += [f'Left out, not readable: {reason}' for reason in self.skipped.values()]
        return SystemResult(f'{name}, {system}', tuple(metrics), images, tuple(notes))


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


def _open(images: Images | None) -> ImageSource | None:
    return images if images is None or isinstance(images, ImageSource) else open_images(images)
