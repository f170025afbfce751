"""All pairs of similar descriptors, and groups of them without chains.

Small collections are compared with themselves chunk by chunk. Larger ones are first divided into the Voronoi cells of a
k-means (Sivic and Zisserman 2003), and a descriptor is compared only with the cells that can hold a partner: with d the
distance that belongs to the threshold, a partner can be in cell c only if the descriptor is within d of the plane that
separates c from its own cell,

    (|x - c|^2 - |x - home|^2) / (2 |c - home|) <= d,

so nothing is lost, unless more than `probes` cells remain: then the closest are searched.

Joining whatever is connected lets a chain of small differences tie together pictures that have nothing in common. A
group is a star instead (star clustering, Aslam, Pelekhov and Rus 2004): a centre, and pictures that each form a pair
with the centre itself.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ['NearPairs', 'near_pairs', 'star_groups']

CHUNK = 4096
EXHAUSTIVE_UP_TO = 65_536
MAX_PAIRS = 50_000_000
_MARGIN = 1e-5  # float32 sums differ by less than this from exact ones


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

    def where(self, chosen: np.ndarray) -> 'NearPairs':
        """Those of a mask or of numbers."""
        return NearPairs(self.first[chosen], self.second[chosen], self.scores[chosen], self.complete)

    def rows(self) -> np.ndarray:
        """Every row that is in a pair, ascending."""
        return np.unique(np.concatenate([self.first, self.second]))


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
    found, count = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))], 0
    for pairs in (_chunks(vectors, rows, threshold) if exhaustive else cells.pairs(threshold)):
        found.append(pairs)
        count += len(pairs[0])
        if count > MAX_PAIRS:
            raise ValueError(f'More than {MAX_PAIRS:,} pairs have a similarity of {threshold:.3f} or more: raise the '
                             'threshold.')
    first, second, scores = map(np.concatenate, zip(*found, strict=True))
    first, second = np.minimum(first, second), np.maximum(first, second)
    _, once = np.unique(first * len(vectors) + second, return_index=True)
    pairs = NearPairs(first[once], second[once], scores[once], exhaustive or cells.complete)
    # near-ties in float64, so that the way of chunking decides nothing
    good = pairs.scores >= threshold
    ties = np.flatnonzero(np.abs(pairs.scores - threshold) < 2 * _MARGIN)
    for chunk in np.array_split(ties, len(ties) // CHUNK + 1):
        a, b = (np.asarray(vectors[side[chunk]], dtype=np.float64) for side in (pairs.first, pairs.second))
        good[chunk] = (a * b).sum(1) >= threshold
    return pairs.where(good)


def _read(vectors: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(vectors[rows], dtype=np.float32))


def _hits(a: torch.Tensor, b: torch.Tensor, threshold: float, same: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers and scores of pairs of a and b; of each pair once if b begins with a."""
    scores = a @ b.T
    mask = scores >= threshold - _MARGIN
    i, j = (mask.triu(1) if same else mask).nonzero(as_tuple=True)
    return i.numpy(), j.numpy(), scores[i, j].numpy()


def _chunks(vectors: np.ndarray, rows: np.ndarray, threshold: float) -> Iterator[tuple]:
    for start in range(0, len(rows), CHUNK):
        own = rows[start:start + CHUNK]
        a = _read(vectors, own)
        for other in range(start, len(rows), CHUNK):
            partners = rows[other:other + CHUNK]
            b = a if other == start else _read(vectors, partners)
            i, j, scores = _hits(a, b, threshold, same=other == start)
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
        homes, visits = [], []  # cell of each position; (cell, position) of every visit
        for start in range(0, len(rows), CHUNK):
            x = _read(vectors, rows[start:start + CHUNK])
            squared = _squared_distances(x, centres)
            nearest, home = squared.min(1)
            margin = (squared - nearest[:, None]).div_(2 * between[home])
            margin[torch.arange(len(x)), home] = torch.inf
            closest, cells = margin.topk(probes, largest=False)
            needed = closest <= reach
            self.complete &= int((margin <= reach).sum()) == int(needed.sum())
            homes.append(home.numpy())
            i, j = needed.nonzero(as_tuple=True)
            visits.append(torch.stack([cells[i, j], i + start], 1).numpy())
        visits = np.concatenate(visits)
        self.members = _by_cell(np.concatenate(homes), np.arange(len(rows)), len(centres))
        self.visitors = _by_cell(visits[:, 0], visits[:, 1], len(centres))

    def pairs(self, threshold: float) -> Iterator[tuple]:
        for members, visitors in zip(self.members, self.visitors, strict=True):
            inside = self.rows[members]
            b = _read(self.vectors, inside)
            for start in range(0, len(members), CHUNK):
                i, j, scores = _hits(b[start:start + CHUNK], b[start:], threshold, same=True)
                yield inside[start + i], inside[start + j], scores
            for start in range(0, len(visitors) if len(members) else 0, CHUNK):
                outside = self.rows[visitors[start:start + CHUNK]]
                i, j, scores = _hits(_read(self.vectors, outside), b, threshold, same=False)
                yield outside[i], inside[j], scores


def _by_cell(cells: np.ndarray, positions: np.ndarray, number: int) -> list[np.ndarray]:
    order = np.argsort(cells, kind='stable')
    return np.split(positions[order], np.searchsorted(cells[order], np.arange(1, number)))


def _squared_distances(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(n, cells), up to a summand of each row."""
    return centres.square().sum(1) - 2 * x @ centres.T


def _kmeans(vectors: np.ndarray, rows: np.ndarray, num_cells: int, iterations: int = 6, per_cell: int = 32):
    """Centres (num_cells, D) of a sample; the seed is fixed, so that the same rows give the same cells."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num_cells * per_cell]
    sample = _read(vectors, np.sort(rows[chosen]))
    centres = sample[torch.linspace(0, len(sample) - 1, num_cells).long()].clone()
    for _ in range(iterations):
        home = torch.cat([_squared_distances(chunk, centres).argmin(1) for chunk in sample.split(CHUNK)])
        sums = torch.zeros_like(centres).index_add_(0, home, sample)
        counts = torch.bincount(home, minlength=num_cells)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return centres


def star_groups(pairs: NearPairs, order: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more rows, the centre of each first; a row is in one group at most.

    The row with most partners becomes a centre first and takes all its partners that are still free, and so on.

    Args:
        pairs: Pairs of rows.
        order: (N,) place of every row; decides between rows with equally many partners.
    """
    starts, ends = np.concatenate([pairs.first, pairs.second]), np.concatenate([pairs.second, pairs.first])
    ends = ends[np.argsort(starts, kind='stable')]
    rows, degrees = np.unique(starts, return_counts=True)
    partners_of = np.split(ends, np.cumsum(degrees)[:-1])
    free = np.zeros(len(order), bool)
    free[rows] = True
    groups = []
    for i in np.lexsort([order[rows], -degrees]):
        partners = partners_of[i][free[partners_of[i]]]
        if free[rows[i]] and len(partners):
            groups.append(np.append(rows[i], partners))
            free[groups[-1]] = False
    return groups
