"""All pairs of descriptors whose similarity reaches a threshold, without ever holding or sorting N x N similarities.

Small collections are compared block by block. Larger ones are first divided into cells, the Voronoi cells of a k-means
(Sivic and Zisserman 2003), and a descriptor is compared only with the cells that can hold a partner: with d the
distance that belongs to the threshold, a partner in cell c is possible only if the descriptor is no further than d from
the plane that separates c from its own cell,

    (|x - c|^2 - |x - home|^2) / (2 |c - home|) <= d,

so nothing is lost, unless more than `probes` cells remain: then the closest are looked into.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ['NearPairs', 'near_pairs']

BLOCK = 4096
EXHAUSTIVE_UP_TO = 65_536
MAX_PAIRS = 50_000_000
_MARGIN = 1e-5  # float32 sums of blocks differ by less than this from exact ones


@dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of rows.

    Attributes:
        first: (E,) int64 rows.
        second: (E,) int64 rows, each larger than its partner; ordered by first, then second.
        scores: (E,) float32 cosine similarities.
        complete: Whether every pair above the threshold is certain to be here.
    """
    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    complete: bool = True

    def __len__(self) -> int:
        return len(self.first)


def near_pairs(
        vectors: np.ndarray,
        threshold: float,
        rows: np.ndarray | None = None,
        probes: int = 16,
        exhaustive: bool | None = None,
) -> NearPairs:
    """Pairs of L2-normalised rows with a scalar product of at least the threshold.

    Args:
        vectors: (N, D) float16 or float32, may be memory-mapped.
        threshold: Cosine similarity.
        rows: Ascending rows to look at; None for all.
        probes: Cells a descriptor is compared with at most, besides its own.
        exhaustive: Compare everything with everything; None: up to 65,536 rows.

    Raises:
        ValueError: The threshold is not above -1 and at most 1, or more than 50 million pairs reach it.
    """
    if not -1 < threshold <= 1:
        raise ValueError(f'The threshold is a cosine similarity above -1 and at most 1, got {threshold}.')
    rows = np.arange(len(vectors)) if rows is None else np.asarray(rows, dtype=np.int64)
    exhaustive = len(rows) <= EXHAUSTIVE_UP_TO if exhaustive is None else exhaustive
    cells = None if exhaustive else _Cells(vectors, rows, threshold, probes)
    found, count = [], 0
    for pair in (_blocks(vectors, rows, threshold) if exhaustive else cells.pairs(threshold)):
        found.append(pair)
        count += len(pair[0])
        if count > MAX_PAIRS:
            raise ValueError(f'More than {MAX_PAIRS:,} pairs have a similarity of {threshold:.3f} or more: raise the '
                             'threshold.')
    first, second, scores = map(np.concatenate, zip(*found, strict=True)) if found else (
        np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    first, second = np.minimum(first, second), np.maximum(first, second)
    _, once = np.unique(first * len(vectors) + second, return_index=True)
    first, second, scores = first[once], second[once], scores[once]
    certain = _decide(vectors, first, second, scores, threshold)
    return NearPairs(first[certain], second[certain], scores[certain], exhaustive or cells.complete)


def _read(vectors: np.ndarray, rows: np.ndarray | slice) -> torch.Tensor:
    return torch.from_numpy(np.array(vectors[rows], dtype=np.float32))


def _decide(vectors, first, second, scores, threshold) -> np.ndarray:
    """Which candidates are pairs; close calls in float64, so that the way of blocking decides nothing."""
    certain = scores >= threshold
    close = np.flatnonzero(np.abs(scores - threshold) < 2 * _MARGIN)
    for part in np.array_split(close, len(close) // BLOCK + 1):
        a, b = (np.asarray(vectors[rows[part]], dtype=np.float64) for rows in (first, second))
        certain[part] = (a * b).sum(1) >= threshold
    return certain


def _hits(a: torch.Tensor, b: torch.Tensor, threshold: float, upper: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = a @ b.T
    mask = scores >= threshold - _MARGIN
    i, j = (mask.triu(1) if upper else mask).nonzero(as_tuple=True)
    return i.numpy(), j.numpy(), scores[i, j].numpy()


def _blocks(vectors: np.ndarray, rows: np.ndarray, threshold: float) -> Iterator[tuple]:
    starts = range(0, len(rows), BLOCK)
    for start in starts:
        own = rows[start:start + BLOCK]
        a = _read(vectors, own)
        for other in starts[start // BLOCK:]:
            partners = rows[other:other + BLOCK]
            i, j, scores = _hits(
                a, a if other == start else _read(vectors, partners), threshold, upper=other == start)
            yield own[i], partners[j], scores


class _Cells:
    """Voronoi cells, and the cells each row has to be compared with."""

    def __init__(self, vectors: np.ndarray, rows: np.ndarray, threshold: float, probes: int):
        self.vectors, self.rows = vectors, rows
        centres = _kmeans(vectors, rows, max(2, int(2 * len(rows) ** 0.5)))
        between = torch.cdist(centres, centres).clamp_min(1e-12)
        reach = (2 - 2 * threshold) ** 0.5 + 1e-3
        self.complete = True
        probes = min(probes, len(centres) - 1)
        self.home = np.empty(len(rows), np.int32)
        visited = []  # (cell, position) of every visit
        for start in range(0, len(rows), BLOCK):
            x = _read(vectors, rows[start:start + BLOCK])
            squared = _squared_distances(x, centres)
            nearest, home = squared.min(1)
            margin = (squared - nearest[:, None]).div_(2 * between[home])
            margin[torch.arange(len(x)), home] = torch.inf
            closest, cells = margin.topk(probes, largest=False)
            needed = closest <= reach
            self.complete &= int((margin <= reach).sum()) == int(needed.sum())
            self.home[start:start + len(x)] = home.numpy()
            i, j = needed.nonzero(as_tuple=True)
            visited.append(torch.stack([cells[i, j], i + start], 1).int().numpy())
        visited = np.concatenate(visited)
        visited = visited[np.argsort(visited[:, 0], kind='stable')]
        self.visitors = np.split(visited[:, 1], np.searchsorted(visited[:, 0], np.arange(1, len(centres))))
        members = np.argsort(self.home, kind='stable')
        self.members = np.split(members, np.searchsorted(self.home[members], np.arange(1, len(centres))))

    def pairs(self, threshold: float) -> Iterator[tuple]:
        for members, visitors in zip(self.members, self.visitors, strict=True):
            if not len(members):
                continue
            inside = self.rows[members]
            b = _read(self.vectors, inside)
            for start in range(0, len(members), BLOCK):
                i, j, scores = _hits(b[start:start + BLOCK], b[start:], threshold, upper=True)
                yield inside[start + i], inside[start + j], scores
            for start in range(0, len(visitors), BLOCK):
                outside = self.rows[visitors[start:start + BLOCK]]
                i, j, scores = _hits(_read(self.vectors, outside), b, threshold, upper=False)
                yield outside[i], inside[j], scores


def _squared_distances(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(n, cells), up to a summand of each row."""
    return centres.square().sum(1) - 2 * x @ centres.T


def _kmeans(vectors: np.ndarray, rows: np.ndarray, num_cells: int, iterations: int = 6, per_cell: int = 32):
    """Centres (num_cells, D) of a sample; the seed is fixed, so that the same rows give the same cells."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num_cells * per_cell]
    sample = _read(vectors, np.sort(rows[chosen]))
    centres = sample[torch.linspace(0, len(sample) - 1, num_cells).long()].clone()
    for _ in range(iterations):
        home = torch.cat([_squared_distances(part, centres).argmin(1) for part in sample.split(BLOCK)])
        sums = torch.zeros_like(centres).index_add_(0, home, sample)
        counts = torch.bincount(home, minlength=num_cells)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return centres
