"""From which similarity on two pictures of a collection are copies, found from the collection itself.

Descriptors are whitened by their own collection first: directions that many pictures share, such as those of the
classes a network was trained for, say little about whether two pictures are copies; whitening (Jégou and Chum 2012)
weighs them down. SSCD (Pizzi et al. 2022) does the same for copy detection.

How alike different pictures are depends on the model and on the collection, so no fixed number serves. Of a sample of
the images each looks for its nearest ones. Pairs that look the same (looks.py) are taken for real copies; the rest for
different pictures. `certain` is the lowest threshold at which no more than the given share of images have a different
picture above it. Copies that do not look the same any more count as different pictures here, so in a collection with
many of those the threshold errs on the high side. `possible` is lower: half of the images have a neighbour above it. A
pair between the two counts if it looks the same.
"""
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from timm_multigrain.search.exact import nearest
from timm_multigrain.whiten.pca import StreamingPCA

__all__ = ['DEFAULT', 'CollectionWhitening', 'Thresholds', 'find_thresholds', 'fit_collection']

IMAGES_A_COMPONENT = 8  # fewer, and the components fit the single pictures, copies with them
FEWEST_COMPONENTS = 64
IN_MEMORY = 1 << 29  # bytes; more is mapped from a temporary file
CHUNK = 8192
SAMPLE = 4000
NEIGHBOURS = 8


@dataclass(frozen=True, eq=False)
class CollectionWhitening:
    """Whitening of descriptors.

    Attributes:
        mean: (D,) float64; None where the collection is too small to be whitened.
        projection: (D, k) float64.
    """
    mean: np.ndarray | None = None
    projection: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) descriptors whitened and L2-normalised again, (n, k) float32."""
        if self.mean is None:
            return np.asarray(rows, dtype=np.float32)
        rows = (np.asarray(rows, dtype=np.float64) - self.mean) @ self.projection
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)).astype(np.float32)

    def all(self, vectors) -> np.ndarray:
        """Every row of an index, (N, k) float32, mapped from a temporary file if that is large."""
        shape = (len(vectors), vectors.shape[1] if self.mean is None else self.projection.shape[1])
        if 4 * shape[0] * shape[1] > IN_MEMORY:
            with tempfile.TemporaryFile(prefix='multigrain-') as file:
                whitened = np.memmap(file, dtype=np.float32, mode='w+', shape=shape)
        else:
            whitened = np.empty(shape, dtype=np.float32)
        for start in range(0, len(vectors), CHUNK):
            whitened[start:start + CHUNK] = self(vectors[start:start + CHUNK])
        return whitened


def fit_collection(vectors) -> CollectionWhitening:
    """Whitening of the rows of an index: PCA to at most an eighth as many components as there are images, divided by
    their deviations. Fewer than 512 images are left as they are.

    Args:
        vectors: (N, D) L2-normalised rows.
    """
    n, dim = vectors.shape
    components = min(dim, n // IMAGES_A_COMPONENT)
    if components < FEWEST_COMPONENTS:
        return CollectionWhitening()
    pca = StreamingPCA(dim)
    for start in range(0, n, CHUNK):
        pca.update(torch.from_numpy(np.array(vectors[start:start + CHUNK])))
    values, directions = (values.numpy() for values in pca.eigh())
    values, directions = values[:components], directions[:, :components]
    kept = values > max(1e-9 * values[0], 1e-12)  # the rows have length 1: less is rounding
    if not kept.any():
        return CollectionWhitening()
    return CollectionWhitening(pca.mean.numpy(), directions[:, kept] / np.sqrt(values[kept]))


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


DEFAULT = Thresholds(0.95, 0.9)  # of collections too small to say anything


def find_thresholds(
        vectors: np.ndarray, rows: np.ndarray, alike: Callable[[int, int], bool], false_positives: float) -> Thresholds:
    """Thresholds of a collection.

    Args:
        vectors: (N, D) L2-normalised.
        rows: Ascending rows to take, one of each set of identical files.
        alike: Whether the pictures of two rows look the same.
        false_positives: Share of the images.

    Raises:
        ValueError: The share is not above 0 and below 1.
    """
    if not 0 < false_positives < 1:
        raise ValueError(f'false positives is a share above 0 and below 1, got {false_positives}.')
    if len(rows) < 3:
        return DEFAULT
    sample = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    scores, partners = _neighbours(vectors, rows, sample)
    allowed, wrong, found = int(false_positives * len(sample)), set(), None
    for place in np.argsort(-scores, axis=None, kind='stable'):
        i = place // scores.shape[1]
        if i not in wrong and not alike(int(sample[i]), int(partners.flat[place])):
            wrong.add(i)
            if len(wrong) > allowed:
                found = float(scores.flat[place])
                break
    possible = float(np.median(scores[:, 0]))
    if found is None:  # every picture has so many copies that no others were met
        return Thresholds(DEFAULT.certain, min(possible, DEFAULT.possible), false_positives, len(sample))
    return Thresholds(min(float(np.nextafter(np.float32(found), np.float32(2))), 1.), min(possible, found),
                      false_positives, len(sample))


def _neighbours(vectors: np.ndarray, rows: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (S, k) and rows (S, k) of the nearest others of each row of the sample, highest first."""
    k = min(NEIGHBOURS, len(rows) - 1)
    chunks = (np.asarray(vectors[rows[start:start + CHUNK]]) for start in range(0, len(rows), CHUNK))
    scores, found = (values.numpy() for values in nearest(np.asarray(vectors[sample]), chunks, k + 1))
    found = rows[found]
    own = found == sample[:, None]
    own[~own.any(1), -1] = True  # of many equal ones: the row itself is not among the nearest
    return scores[~own].reshape(-1, k), found[~own].reshape(-1, k)
