"""From which similarity on two pictures of a collection are copies, found from the collection itself.

How alike different pictures are depends on the model and on the collection, so no fixed number serves. Of a sample of
the images each looks for its nearest ones. Pairs that look the same (see looks.py) are taken for real copies; the rest
are taken for different pictures. `certain` is the lowest threshold at which no more than the given share of images
have a different picture above it. Copies that do not look the same any more count as different pictures here, so in a
collection with many of those the threshold errs on the high side.

`possible` is lower: half of the images have a neighbour above it. A pair between the two counts if it looks the same.
"""
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .looks import Looks

__all__ = ['DEFAULT', 'Thresholds', 'find_thresholds']

SAMPLE = 4000
NEIGHBOURS = 8


@dataclass(frozen=True)
class Thresholds:
    """Similarities that decide.

    Attributes:
        certain: Pairs from here on are copies.
        possible: Pairs from here on are copies if they look the same.
        false_positives: Share of images that may have a different picture above `certain`.
        sample: Images that it was found from; 0 if it was given or there were none.
    """
    certain: float
    possible: float
    false_positives: float | None = None
    sample: int = 0

    def to_json(self) -> dict:
        """As a dictionary."""
        return asdict(self)


DEFAULT = Thresholds(0.95, 0.9)  # of collections too small to say anything


def find_thresholds(vectors: np.ndarray, rows: np.ndarray, looks: Looks, false_positives: float) -> Thresholds:
    """Thresholds of a collection.

    Args:
        vectors: (N, D) L2-normalised.
        rows: Ascending rows to take, one of each set of identical files.
        looks: Compares the pictures.
        false_positives: Share of the images, above 0 and below 1.

    Raises:
        ValueError: The share is none.
    """
    if not 0 < false_positives < 1:
        raise ValueError(f'false positives is a share above 0 and below 1, got {false_positives}.')
    if len(rows) < 3:
        return DEFAULT
    sample = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    scores, partners = _neighbours(vectors, rows, sample)
    order = np.argsort(-scores, axis=None, kind='stable')
    allowed, wrong, found = int(false_positives * len(sample)), set(), None
    for place in order:
        i, score = place // scores.shape[1], float(scores.flat[place])
        if i not in wrong and not looks.alike(int(sample[i]), int(partners.flat[place])):
            wrong.add(i)
            if len(wrong) > allowed:
                found = score
                break
    possible = float(np.median(scores[:, 0]))
    if found is None:  # every picture has so many copies that no others were met
        return Thresholds(DEFAULT.certain, min(possible, DEFAULT.possible), false_positives, len(sample))
    return Thresholds(min(float(np.nextafter(np.float32(found), np.float32(2))), 1.), min(possible, found),
                      false_positives, len(sample))


def _neighbours(vectors: np.ndarray, rows: np.ndarray, sample: np.ndarray, chunk: int = 8192):
    """Scores (S, k) and rows (S, k) of the nearest others of each row of the sample, highest first."""
    queries = torch.from_numpy(np.array(vectors[sample], dtype=np.float32))
    k = min(NEIGHBOURS, len(rows) - 1)
    best = torch.empty(len(sample), 0)
    partners = torch.empty(len(sample), 0, dtype=torch.int64)
    for start in range(0, len(rows), chunk):
        part = rows[start:start + chunk]
        scores = queries @ torch.from_numpy(np.array(vectors[part], dtype=np.float32)).T
        own = torch.from_numpy(sample)[:, None] == torch.from_numpy(part)[None]
        best = torch.cat([best, scores.masked_fill_(own, -2)], 1)
        partners = torch.cat([partners, torch.from_numpy(part).expand(len(sample), -1)], 1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        partners = partners.gather(1, places)
    return best.numpy(), partners.numpy()
