"""Descriptors whitened by their own collection, which makes copies stand out from pictures that are merely alike.

Directions that many pictures share, such as those of the classes a network was trained for, say little about whether
two pictures are copies; whitening (Jégou and Chum 2012) weighs them down. SSCD (Pizzi et al. 2022) does the same for
copy detection.
"""
import tempfile
from dataclasses import dataclass

import numpy as np

__all__ = ['CollectionWhitening', 'fit_collection']

IMAGES_A_COMPONENT = 8  # fewer, and the components fit the single pictures, copies with them
FEWEST_COMPONENTS = 64
IN_MEMORY = 1 << 29  # bytes; more is mapped from a temporary file
CHUNK = 8192


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
    total, products = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, n, CHUNK):
        rows = np.asarray(vectors[start:start + CHUNK], dtype=np.float64)
        total += rows.sum(0)
        products += rows.T @ rows
    mean = total / n
    values, directions = np.linalg.eigh(products / n - np.outer(mean, mean))
    values, directions = values[::-1][:components], directions[:, ::-1][:, :components]
    kept = values > max(1e-9 * values[0], 1e-12)  # the rows have length 1: less is rounding
    if not kept.any():
        return CollectionWhitening()
    return CollectionWhitening(mean, directions[:, kept] / np.sqrt(values[kept]))
