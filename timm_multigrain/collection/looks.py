"""Whether two pictures look the same: the correlation of small grey versions, whichever way one of them is turned."""
from collections.abc import Callable

import numpy as np
from PIL import Image

__all__ = ['ALIKE', 'Looks', 'likeness', 'small_grey']

SIDE = 32
ALIKE = 0.95  # correlation of copies, see benchmarks/README.md


def small_grey(image: Image.Image) -> np.ndarray | None:
    """(SIDE, SIDE) float32 of zero mean and unit length; None for a picture of one colour, which proves nothing."""
    values = np.asarray(image.convert('L').resize((SIDE, SIDE), Image.BOX, reducing_gap=2), dtype=np.float32)
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > SIDE else None  # a deviation of one grey value


def likeness(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Correlation of two `small_grey`, the highest over mirror image and quarter turns; 0 where one says nothing."""
    if a is None or b is None:
        return 0.
    turned = np.stack([np.rot90(c, turns) for c in (b, b[:, ::-1]) for turns in range(4)])
    return float((turned * a).sum((1, 2)).max())


class Looks:
    """Compares images of an index by number, reading each file once.

    Args:
        load: Reads image i; an error of kind ValueError or OSError leaves it without looks.
    """

    def __init__(self, load: Callable[[int], Image.Image]):
        self.load = load
        self.unreadable = 0
        self._seen: dict[int, np.ndarray | None] = {}

    def alike(self, i: int, j: int) -> bool:
        """Whether both can be read and look the same."""
        return likeness(self._small(i), self._small(j)) >= ALIKE

    def _small(self, i: int) -> np.ndarray | None:
        if i not in self._seen:
            try:
                self._seen[i] = small_grey(self.load(i))
            except (ValueError, OSError):
                self.unreadable += 1
                self._seen[i] = None
        return self._seen[i]
