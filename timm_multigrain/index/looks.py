"""Whether two pictures look the same: the correlation of small grey versions, mirrored, turned, cut and written on.

For a part of a picture, the one is laid over the other at a number of sizes, angles and all places, and correlated
there. Everything is tried on 16 x 16 pixels; what fits best there is tried again on 32 x 32.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ['ALIKE', 'Looks', 'Placement', 'likeness', 'place', 'small_grey']

STORED, SIDE = 64, 32
ALIKE = 0.95  # correlation from which pictures look the same, see benchmarks/README.md
COARSE, FINE = 16, 32
SHARES = (0.97, 0.92, 0.87, 0.82, 0.77, 0.72, 0.68)  # side of the part over side of the whole
ANGLES = (-16, -12, -8, -4, 4, 8, 12, 16)
REFINED = 6


class Placement(NamedTuple):
    """How one picture lies in another.

    Attributes:
        score: Correlation of the small grey versions there, at most 1.
        swapped: The second picture is the whole and the first the part, not the other way round.
        mirrored: The part is mirrored, left to right, ...
        turns: ... then turned by this many quarters, counterclockwise.
        matrix: (2, 3), from a place in that part to the place in the whole; both from the centre, in sides.
    """
    score: float
    swapped: bool = False
    mirrored: bool = False
    turns: int = 0
    matrix: np.ndarray = np.eye(2, 3)


class Looks:
    """Compares images of an index by number, reading each file once.

    Args:
        load: Reads image i; an error of kind ValueError or OSError leaves it without looks.
    """

    def __init__(self, load: Callable[[int], Image.Image]):
        self.load = load
        self.unreadable = 0
        self._small: dict[int, np.ndarray | None] = {}
        self._known: dict[tuple[int, int], bool] = {}

    def alike(self, i: int, j: int) -> bool:
        """Whether both can be read and look the same."""
        pair = (min(i, j), max(i, j))
        if pair not in self._known:
            self._known[pair] = likeness(*map(self._grey, pair)) >= ALIKE
        return self._known[pair]

    def _grey(self, i: int) -> np.ndarray | None:
        if i not in self._small:
            try:
                self._small[i] = small_grey(self.load(i))
            except (ValueError, OSError):
                self.unreadable += 1
                self._small[i] = None
        return self._small[i]


def small_grey(image: Image.Image) -> np.ndarray | None:
    """(64, 64) float32; None for a picture of nearly one colour, which proves nothing."""
    values = np.asarray(
        image.convert('L').resize((STORED, STORED), Image.BOX, reducing_gap=2), dtype=np.float32)
    return values if values.std() > 2 else None


def likeness(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Highest correlation of two `small_grey` found, at most 1; 0 where one of them is None."""
    return 0. if a is None or b is None else place(a, b).score


def place(a: np.ndarray, b: np.ndarray) -> Placement:
    """The placement of highest correlation of two `small_grey`.

    Compared are the whole pictures, mirrored and by quarter turns; three quarters of them, for a band of text at an
    edge; and, where neither is enough, the one with parts of the other.
    """
    own, other = (c.reshape(SIDE, 2, SIDE, 2).mean((1, 3)) for c in (a, b))
    ways = [(c, mirrored, turns) for mirrored, c in enumerate((other, other[:, ::-1])) for turns in range(4)]
    best = _best(*(Placement(_correlation(own, np.rot90(c, turns)), False, bool(m), turns) for c, m, turns in ways))
    if best.score < ALIKE:
        cut = SIDE // 4
        bands = (np.s_[cut:], np.s_[:-cut], np.s_[:, cut:], np.s_[:, :-cut])
        best = _best(best, *(Placement(_correlation(own[band], c[band]), False, bool(m))
                             for c, m, turns in ways if not turns for band in bands))
    return best if best.score >= ALIKE else _best(best, _place_part(a, b))


def _best(*placements: Placement) -> Placement:
    return max(placements, key=lambda placement: placement.score)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = _normalize(np.stack([a.reshape(-1), b.reshape(-1)]))
    return float(a @ b)


def _place_part(a: np.ndarray, b: np.ndarray) -> Placement:
    """Of one picture, or of its mirror image, in the other."""
    ways = [(whole, part, angle, share) for whole, part in ((a, b), (b, a)) for angle in (0, *ANGLES)
            for share in _shares(angle)]
    cache = {}
    coarse = [_fit(cache, way, COARSE, 0).score for way in ways]
    best = sorted(range(len(ways)), key=lambda i: -coarse[i])[:REFINED]
    placement, whole = max(((_fit(cache, ways[i], FINE, change), ways[i][0]) for i in best for change in (-1, 0, 1)),
                           key=lambda found: found[0].score)
    return placement._replace(swapped=whole is b)


def _shares(angle: int) -> tuple[float, ...]:
    """Of a picture that was turned, the largest upright part; of one that was not, parts of many sizes."""
    turn = math.radians(abs(angle))
    return (1 / (math.cos(turn) + math.sin(turn)),) if angle else SHARES


def _fit(cache: dict, way: tuple, size: int, change: int) -> Placement:
    """Of all places the one of highest correlation; `change` pixels are added to the side of the part."""
    whole, part, angle, share = way
    side = min(size - 1, max(size // 2, round(size * share) + change))
    over, under = (id(part), side), (id(whole), size, angle)
    if over not in cache:
        small = np.asarray(Image.fromarray(part).resize((side, side), Image.BOX))
        cache[over] = _normalize(np.stack([small, small[:, ::-1]]).reshape(2, -1))
    if under not in cache:
        image = Image.fromarray(whole).rotate(angle, Image.BILINEAR)
        cache[under] = np.asarray(image.resize((size, size), Image.BOX))
    places = np.lib.stride_tricks.sliding_window_view(cache[under], (side, side))
    scores = _normalize(places.reshape(-1, side * side)) @ cache[over].T
    window, mirrored = np.unravel_index(scores.argmax(), scores.shape)
    top, left = divmod(int(window), size - side + 1)
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    centre = np.array([left + side / 2, top + side / 2]) / size - 0.5
    return Placement(float(scores.max()), mirrored=bool(mirrored),
                     matrix=np.column_stack([rotation * side / size, rotation @ centre]))


def _normalize(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6)
