"""Whether one picture is a part of another, or a turned part, told from small grey versions of them.

The one is laid over the other at a number of sizes, angles and all places, and correlated there. Everything is tried on
16 x 16 pixels; what fits best there is tried again on 32 x 32.
"""
import math

import numpy as np
from PIL import Image

__all__ = ['part_likeness']

COARSE, FINE = 16, 32
SHARES = (0.97, 0.92, 0.87, 0.82, 0.77, 0.72, 0.68)  # side of the part over side of the whole
ANGLES = (-16, -12, -8, -4, 4, 8, 12, 16)
REFINED = 6


def part_likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Highest correlation of one picture with a part of the other or of its mirror image, -1 to 1.

    Args:
        a: (S, S) grey values, float32, S at least 32.
        b: The same of the other picture.
    """
    ways = [(whole, part, angle, share) for whole, part in ((a, b), (b, a)) for angle in (0, *ANGLES)
            for share in _shares(angle)]
    cache = {}
    coarse = [_fit(cache, way, COARSE, 0) for way in ways]
    best = sorted(range(len(ways)), key=lambda i: -coarse[i])[:REFINED]
    return max(_fit(cache, ways[i], FINE, change) for i in best for change in (-1, 0, 1))


def _shares(angle: int) -> tuple[float, ...]:
    """Of a picture that was turned, the largest upright part; of one that was not, parts of many sizes."""
    if not angle:
        return SHARES
    turn = math.radians(abs(angle))
    return (1 / (math.cos(turn) + math.sin(turn)),)


def _fit(cache: dict, way: tuple, size: int, change: int) -> float:
    whole, part, angle, share = way
    over, under = ('part', id(part), size, round(size * share) + change), ('whole', id(whole), size, angle)
    side = min(size - 1, max(size // 2, over[3]))
    if over not in cache:
        small = np.asarray(Image.fromarray(part).resize((side, side), Image.BOX))
        cache[over] = _normalize(np.stack([small, small[:, ::-1]]).reshape(2, -1))
    if under not in cache:
        image = Image.fromarray(whole)
        image = image.rotate(angle, Image.BILINEAR) if angle else image
        cache[under] = np.asarray(image.resize((size, size), Image.BOX))
    places = np.lib.stride_tricks.sliding_window_view(cache[under], (side, side))
    return float((_normalize(places.reshape(-1, side * side)) @ cache[over].T).max())


def _normalize(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6)
