"""Descriptors of a benchmark's images: one pass of the trunk for all systems, kept as shards, read piece by piece."""
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_multigrain.embed.descriptors import Descriptors, iter_shards
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.systems import Systems
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.models.open import weights_sha256

from .benchmarks import Benchmark

__all__ = ['BenchmarkVectors', 'describe', 'describe_benchmark', 'one_pass']


@dataclass(frozen=True, eq=False)
class BenchmarkVectors:
    """Where the descriptors are.

    Attributes:
        systems: What they are of.
        num_database: Images searched.
        skipped: Distractors and training images that could not be read, and why.
        has_training: Whether there are images to normalise scores with.
    """
    systems: Systems
    num_database: int
    skipped: Mapping[str, str]
    has_training: bool
    _queries: torch.Tensor
    _folders: tuple[Path, ...]
    _training: Path | None

    def queries(self, number: int) -> torch.Tensor:
        """Descriptors of the queries, one system's, (Q, d)."""
        return self.systems.take(self._queries, number)

    def database(self, number: int) -> Iterator[torch.Tensor]:
        """Descriptors of the database and then the distractors, one system's, in pieces (n, d)."""
        for folder in self._folders:
            yield from self._pieces(folder, number)

    def training(self, number: int) -> Iterator[torch.Tensor]:
        """Descriptors of the images that scores are normalised with, one system's, in pieces (n, d)."""
        yield from self._pieces(self._training, number)

    def _pieces(self, folder: Path, number: int) -> Iterator[torch.Tensor]:
        for _, vectors in iter_shards(folder):
            yield self.systems.take(vectors, number)


def one_pass(protocol: Protocol) -> bool:
    """Whether an image is seen once. Averages over views are taken of descriptors, for each system by itself."""
    return protocol.scales == (1.,) and not protocol.flip


def describe_benchmark(systems: Systems, benchmark: Benchmark, protocol: Protocol, folder: Path,
                       distractors: ImageSource | None = None, training: ImageSource | None = None,
                       **extraction: Any) -> BenchmarkVectors:
    """Describe all images of a benchmark; what is in the folder already is not computed again.

    Images of the benchmark itself have to be readable. Distractors and training images that are not are left out and
    listed: they change no query's answer.

    Raises:
        ValueError: An image of the benchmark cannot be read, or the folder holds something else.
    """
    skipped = {}

    def run(source: ImageSource, strict: bool) -> tuple[Path, Descriptors]:
        where, described = describe(systems, source, protocol, folder, strict, **extraction)
        skipped.update(described.skipped)
        return where, described

    where, described = run(benchmark.database, True)
    folders, number = [where], len(described)
    if benchmark.queries is None:
        queries = described.vectors[torch.from_numpy(benchmark.query_rows)]
    else:
        queries = run(benchmark.queries, True)[1].vectors
    if distractors is not None:
        where, described = run(distractors, False)
        folders.append(where)
        number += len(described)
    where = run(training, False)[0] if training is not None else None
    return BenchmarkVectors(systems, number, skipped, where is not None, queries, tuple(folders), where)


def describe(systems: Systems, source: ImageSource, protocol: Protocol, folder: Path, strict: bool = True,
             raw: bool | None = None, **extraction: Any) -> tuple[Path, Descriptors]:
    """Embeddings of images, as they are and side by side if they are of several systems, in a folder of their own.

    Args:
        systems: What to compute.
        source: Images.
        protocol: Preprocessing.
        folder: Where the folder is made.
        strict: Stop at the first image that cannot be read.
        raw: Embeddings as they are pooled instead of descriptors; None: where an image is seen once, and they are
            the same but for the normalisation.
        **extraction: As of `extract`.

    Returns:
        The folder of shards, and what is in it.
    """
    raw = one_pass(protocol) if raw is None else raw
    model = systems.models[0] if len(systems.models) == 1 else systems
    content = [weights_sha256(systems), [str(system) for system in systems.systems], protocol.to_dict(),
               source.fingerprint(), strict, raw]
    where = folder / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return where, extract(
        model, source, protocol, where, strict=strict, descriptor=not raw, **extraction)
