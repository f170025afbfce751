"""Pairs of similar descriptors of a collection, from which similarity on they are copies, and groups of them.

How alike different pictures are depends on the model and on the collection, so no fixed threshold serves. `certain`
decides where pictures are not looked at; real copies push it up. Else each picture is compared (detail.py) with its
nearest ones above `possible`: a copy that was turned or inset is seldom as near as pictures of one place are to each
other, but hardly any picture is nearer to it than its original.

Small collections are compared with themselves chunk by chunk. Larger ones are first divided into the Voronoi cells of a
k-means (Sivic and Zisserman 2003), and a descriptor is compared only with the cells that can hold a partner: with d the
distance that belongs to the threshold, a partner can be in cell c only if the descriptor is within d of the plane that
separates c from its own cell,

    (|x - c|^2 - |x - home|^2) / (2 |c - home|) <= d,

so nothing is lost, unless more than `PROBES` cells remain: then the closest are searched.

Joining whatever is connected lets a chain of small differences tie together pictures that have nothing in common. A
group is a star instead (star clustering, Aslam, Pelekhov and Rus 2004): a centre, and pictures that each form a pair
with the centre itself.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from timm_multigrain.search.exact import nearest

from .vectors import in_chunks

CHUNK = 4096
SAMPLE = 4000
NEIGHBOURS = 8
LONELY = 0.05  # share of the images whose nearest one is not compared with them
EXHAUSTIVE_UP_TO = 65_536  # rows that are compared with each other
PROBES = 16  # cells that a descriptor is compared with at most, besides its own
MAX_PAIRS = 50_000_000


@dataclass(frozen=True)
class Thresholds:
    """Similarities that decide.

    Attributes:
        certain: The lowest one that no more than a share of the images have another one above.
        possible: One that all but a few have a neighbour above; pairs from here on are copies if they look the same.
    """
    certain: float
    possible: float


DEFAULT = Thresholds(0.95, -0.99)  # of collections too small to say anything


def find_thresholds(vectors: np.ndarray, rows: np.ndarray, false_positives: float) -> Thresholds:
    """Thresholds of a collection, from ascending rows, one of each set of identical files, of its vectors (N, D)."""
    if not 0 <= false_positives < 1:
        raise ValueError(f'false positives is a share from 0 to below 1, got {false_positives}.')
    if len(rows) < 3:
        return DEFAULT
    sample = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    both = nearest(np.asarray(vectors[sample]), in_chunks(vectors, rows), 2)[0]
    scores = np.sort(both[:, 1].numpy())  # both[:, 0] is the image itself
    certain = np.nextafter(scores[-1 - int(false_positives * len(sample))], np.float32(2))
    return Thresholds(min(float(certain), 1.), float(np.quantile(scores, LONELY)))


@dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of rows, (E,) int64, the first one smaller, in their order; their similarities, (E,) float32; and whether
    every pair above the threshold is certain to be here."""
    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    complete: bool = True

    def where(self, chosen: np.ndarray) -> 'NearPairs':
        return NearPairs(self.first[chosen], self.second[chosen], self.scores[chosen], self.complete)

    def missing_in(self, other: 'NearPairs') -> np.ndarray:
        """(E,) whether each pair is not in the other ones."""
        mine, theirs = (pairs.first << 32 | pairs.second for pairs in (self, other))
        return ~np.isin(mine, theirs)

    def rows(self) -> np.ndarray:
        """Every row that is in a pair, ascending."""
        return np.unique(np.concatenate([self.first, self.second]))


def near_pairs(
        vectors: np.ndarray,
        threshold: float,
        rows: np.ndarray | None = None,
        neighbours: int | None = None,
) -> NearPairs:
    """Pairs of L2-normalised rows with a scalar product of at least the threshold.

    Args:
        vectors: (N, D) float16 or float32.
        threshold: Cosine similarity.
        rows: Ascending rows to look at; None for all.
        neighbours: Only pairs of which one is among as many nearest of the other.
    """
    rows = np.arange(len(vectors)) if rows is None else np.asarray(rows, dtype=np.int64)
    complete, groups = True, [(rows, np.empty(0, np.int64))]
    if len(rows) > EXHAUSTIVE_UP_TO:
        complete, groups = _cells(vectors, rows, threshold)
    lowest = np.full(len(vectors), threshold, dtype=np.float32)
    found, count, kept = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))], 0, 0
    for members, visitors in groups:
        for pairs in _compare(vectors, members, visitors, lowest):
            found.append(pairs)
            count += len(pairs[0])
            if neighbours and count > MAX_PAIRS // 10 + 2 * kept:  # sorted seldom, also where most of them stay
                found = [_nearest_of_each(*_once(found, len(vectors)), neighbours, lowest)]
                count = kept = len(found[0][0])
            if count > MAX_PAIRS:
                raise ValueError(f'More than {MAX_PAIRS:,} pairs have a similarity of {threshold:.3f} or more: raise '
                                 'the threshold.')
    pairs = _once(found, len(vectors))
    return NearPairs(*(_nearest_of_each(*pairs, neighbours, lowest) if neighbours else pairs), complete)


def _once(found: list[tuple], number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rows, second rows and scores of pairs, each once and in order."""
    first, second, scores = map(np.concatenate, zip(*found, strict=True))
    first, second = np.minimum(first, second), np.maximum(first, second)
    _, once = np.unique(first * number + second, return_index=True)
    return first[once], second[once], scores[once]


def _nearest_of_each(first: np.ndarray, second: np.ndarray, scores: np.ndarray, neighbours: int, lowest: np.ndarray):
    """The pairs of which one row is among the nearest of the other; `lowest` becomes the score of each row's last one.
    """
    rows, both = np.concatenate([first, second]), np.tile(scores, 2)
    order = np.lexsort([-both, rows])
    starts, counts = np.unique(rows[order], return_index=True, return_counts=True)[1:]
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    last = order[rank == neighbours - 1]
    lowest[rows[last]] = both[last]
    kept = np.zeros(len(first), bool)
    kept[order[rank < neighbours] % len(first)] = True
    return first[kept], second[kept], scores[kept]


def _read(vectors: np.ndarray, rows: np.ndarray | slice) -> torch.Tensor:
    return torch.from_numpy(np.require(vectors[rows], np.float32, 'W'))  # a copy only where it must be


def _compare(vectors: np.ndarray, members: np.ndarray, visitors: np.ndarray, lowest: np.ndarray) -> Iterator[tuple]:
    """Rows and scores of pairs of members, and of a visitor and a member, chunk by chunk; not below the lowest of both.
    """
    for other in range(0, len(members), CHUNK):
        inside = members[other:other + CHUNK]
        b = _read(vectors, inside)
        everyone = np.concatenate([members[:other + len(inside)], visitors])
        for start in range(0, len(everyone), CHUNK):
            outside = everyone[start:start + CHUNK]
            scores = (_read(vectors, outside) @ b.T).numpy()
            i, j = np.nonzero(scores >= np.minimum.outer(lowest[outside], lowest[inside]))
            different = outside[i] != inside[j]
            i, j = i[different], j[different]
            yield outside[i], inside[j], scores[i, j]


def _cells(vectors: np.ndarray, rows: np.ndarray, threshold: float) -> tuple[bool, list[tuple]]:
    """Whether the cells hold every pair, and of each cell the rows in it and the rows it has to be compared with."""
    centres = _kmeans(vectors, rows, max(2, int(2 * len(rows) ** 0.5)))
    between = torch.cdist(centres, centres).clamp_min(1e-12)
    reach = (2 - 2 * threshold) ** 0.5 + 1e-3
    complete, probes = True, min(PROBES, len(centres) - 1)
    homes, visits = [], []  # cell of each position; (cell, position) of every visit
    for start in range(0, len(rows), CHUNK):
        x = _read(vectors, rows[start:start + CHUNK])
        squared = _squared_distances(x, centres)
        closest, home = squared.min(1)
        margin = (squared - closest[:, None]).div_(2 * between[home])
        margin[torch.arange(len(x)), home] = torch.inf
        smallest, cells = margin.topk(probes, largest=False)
        needed = smallest <= reach
        complete &= int((margin <= reach).sum()) == int(needed.sum())
        homes.append(home.numpy())
        i, j = needed.nonzero(as_tuple=True)
        visits.append(torch.stack([cells[i, j], i + start], 1).numpy())
    visits = np.concatenate(visits)
    members = _by_cell(np.concatenate(homes), rows, len(centres))
    return complete, list(zip(members, _by_cell(visits[:, 0], rows[visits[:, 1]], len(centres)), strict=True))


def _by_cell(cells: np.ndarray, rows: np.ndarray, number: int) -> list[np.ndarray]:
    order = np.argsort(cells, kind='stable')
    return np.split(rows[order], np.searchsorted(cells[order], np.arange(1, number)))


def _squared_distances(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(n, cells), up to a summand of each row."""
    return centres.square().sum(1) - 2 * x @ centres.T


def _kmeans(vectors: np.ndarray, rows: np.ndarray, num_cells: int) -> torch.Tensor:
    """Centres (num_cells, D) of a sample; the seed is fixed, so that the same rows give the same cells."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num_cells * 32]
    sample = _read(vectors, np.sort(rows[chosen]))
    centres = sample[torch.linspace(0, len(sample) - 1, num_cells).long()].clone()
    for _ in range(6):
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
