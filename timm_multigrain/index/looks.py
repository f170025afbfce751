"""Whether two pictures look the same: the correlation of small grey versions, mirrored, turned, cut and written on."""
from collections.abc import Callable

import numpy as np
from PIL import Image

from .alignment import part_likeness

__all__ = ['ALIKE', 'Looks', 'likeness', 'small_grey']

STORED, SIDE = 64, 32
ALIKE = 0.95  # correlation from which pictures look the same, see benchmarks/README.md


def small_grey(image: Image.Image) -> np.ndarray | None:
    """(64, 64) float32; None for a picture of nearly one colour, which proves nothing."""
    values = np.asarray(
        image.convert('L').resize((STORED, STORED), Image.BOX, reducing_gap=2), dtype=np.float32)
    return values if values.std() > 2 else None


def likeness(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Highest correlation of two `small_grey` found, at most 1; 0 where one of them is None.

    Compared are the whole pictures, mirrored and by quarter turns; three quarters of them, for a band of text at an
    edge; and, where neither is enough, the one with parts of the other, see `part_likeness`.
    """
    if a is None or b is None:
        return 0.
    own, other = (c.reshape(SIDE, 2, SIDE, 2).mean((1, 3)) for c in (a, b))
    mirrored = other[:, ::-1]
    best = max(_correlation(own, np.rot90(c, turns)) for c in (other, mirrored) for turns in range(4))
    if best < ALIKE:
        cut = SIDE // 4
        bands = (np.s_[cut:], np.s_[:-cut], np.s_[:, cut:], np.s_[:, :-cut])
        best = max(best, *(_correlation(own[band], c[band]) for c in (other, mirrored) for band in bands))
    return best if best >= ALIKE else max(best, part_likeness(a, b))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6))


class Looks:
    """Compares images of an index by number, reading each file once.

    Args:
        load: Reads image i; an error of kind ValueError or OSError leaves it without looks.
    """

    def __init__(self, load: Callable[[int], Image.Image]):
        self.load = load
        self.unreadable = 0
        self._seen: dict[int, np.ndarray | None] = {}
        self._told: dict[tuple[int, int], bool] = {}

    def alike(self, i: int, j: int) -> bool:
        """Whether both can be read and look the same."""
        pair = (min(i, j), max(i, j))
        if pair not in self._told:
            self._told[pair] = likeness(self._small(pair[0]), self._small(pair[1])) >= ALIKE
        return self._told[pair]

    def _small(self, i: int) -> np.ndarray | None:
        if i not in self._seen:
            try:
                self._seen[i] = small_grey(self.load(i))
            except (ValueError, OSError):
                self.unreadable += 1
                self._seen[i] = None
        return self._seen[i]
