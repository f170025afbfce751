"""Whether one picture was made from another, by its details, and by which edit.

Two photographs of one place look alike on small grey versions; laid over each other, their details do not agree. So
the placement that looks.py finds is refined by an affine alignment with brightness and contrast (Lucas and Kanade 1981,
Baker and Matthews 2004; weighted, so that something drawn over a picture does not pull at it), and then block by block
what is left after a blur is correlated. A picture was made from another if most of the blocks agree and one picture
lies within the other: of two photographs, each shows something that the other does not.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .looks import Placement, place, small_grey

__all__ = ['Comparison', 'Picture', 'compare']

STORED = 256  # pixels of a side, whatever the shape of the picture
SIDES = (32, 64, 128)  # at which the alignment is refined
STEPS = 12
BLOCKS = 8  # to a side
AGREES = 0.7  # correlation of a block; this and the next, see benchmarks/README.md
MOST, MEDIAN = 0.85, 0.9  # share of the blocks that agree, and the median of their correlation
WHOLE = 0.95  # share of the area from which on a part is the whole
COVERED = 0.05  # share of the blocks
OUTSIDE = 0.02  # sides that a part may reach beyond the whole
OUT = -1e4  # grey level where the whole has nothing


class Picture:
    """What is compared of a picture: its size, grey versions, and colours."""

    def __init__(self, image: Image.Image, size: tuple[int, int] | None = None):
        self.size = size or image.size
        self.small = small_grey(image)
        small = image.resize((STORED, STORED), Image.BOX, reducing_gap=2)
        self.grey = np.asarray(small.convert('L'), dtype=np.float32)
        self.colours = np.asarray(small.convert('RGB').resize((8, 8), Image.BOX), dtype=np.float32)
        spread = np.ptp(np.asarray(small.convert('RGB'), dtype=np.int16), axis=2)
        self.is_grey = bool(np.quantile(spread, 0.99) <= 8)


@dataclass(frozen=True)
class Comparison:
    """A picture compared with the one it may have been made from.

    Attributes:
        certain: The details agree.
        edits: What was done to it, in words; empty if they do not agree at all.
    """
    certain: bool = False
    edits: tuple[str, ...] = ()


def compare(original: Picture, copy: Picture) -> Comparison:
    """Compare a copy with its original."""
    if original.small is None or copy.small is None:
        return Comparison()
    found = place(original.small, copy.small)
    whole, part = (copy, original) if found.swapped else (original, copy)
    grey = part.grey[:, ::-1] if found.mirrored else part.grey
    grey = np.ascontiguousarray(np.rot90(grey, found.turns))
    matrix = _align(whole.grey, grey, found.matrix)
    if matrix is None:
        return Comparison()
    side = min(SIDES[-1], max(SIDES[1], min(*whole.size, *part.size) // BLOCKS * BLOCKS))
    agreement, covered = _blocks(whole.grey, grey, matrix, side)
    if len(agreement) < BLOCKS or np.mean(agreement > AGREES) < 0.5:
        return Comparison()
    area = min(1., float(abs(np.linalg.det(matrix[:, :2]))))
    corners = np.array([[x, y, 1] for x in (-0.5, 0.5) for y in (-0.5, 0.5)]) @ matrix.T
    # a part with more pixels than the whole has there is a photograph of its own, taken from nearer
    is_part = np.abs(corners).max() <= 0.5 + OUTSIDE and (
        area > WHOLE or math.prod(part.size) <= 1.1 * area * math.prod(whole.size))
    certain = bool(is_part and np.mean(agreement > AGREES) >= MOST and np.median(agreement) >= MEDIAN)
    edits = [*_of_the_frame(original, copy, found, matrix, area), *_of_the_content(original, copy, found, area)]
    if covered > COVERED:
        edits.append('partly covered')
    elif np.mean(agreement > AGREES) < MOST:
        edits.append('blurred or compressed')
    return Comparison(certain, tuple(edits))


def _of_the_frame(original: Picture, copy: Picture, found: Placement, matrix: np.ndarray, area: float) -> Iterator[str]:
    if found.mirrored:
        yield 'mirrored'
    whole = copy if found.swapped else original
    angle = math.degrees(math.atan2(matrix[1, 0] * whole.size[1], matrix[0, 0] * whole.size[0]))
    if found.turns:
        yield f'turned by {180 if found.turns == 2 else 90} degrees'
    elif abs(angle) >= 1.5:
        yield f'turned by {abs(angle):.0f} degrees'
    if area < WHOLE:
        yield f'shows more, of which this is {100 * area:.0f} %' if found.swapped else f'cropped to {100 * area:.0f} %'
    scale = math.sqrt(math.prod(copy.size) / math.prod(original.size) * (area if found.swapped else 1 / area))
    if not 0.97 < scale < 1.03:
        yield 'smaller' if scale < 1 else 'enlarged'


def _of_the_content(original: Picture, copy: Picture, found: Placement, area: float) -> Iterator[str]:
    colours = copy.colours[:, ::-1] if found.mirrored else copy.colours
    if copy.is_grey and not original.is_grey:
        yield 'grey'
    elif area > WHOLE and np.abs(original.colours - np.rot90(colours, found.turns)).mean() > 8:
        yield 'other colours'


def _align(whole: np.ndarray, part: np.ndarray, matrix: np.ndarray) -> np.ndarray | None:
    """The matrix of a `Placement`, refined; None where that leads nowhere."""
    for side in SIDES:
        over, under = _shrink(part, side), _shrink(whole, side)
        places = (np.arange(side) + 0.5) / side - 0.5
        x, y = np.meshgrid(places, places)
        for _ in range(STEPS):
            seen = _warp(under, matrix, side)
            down, right = np.gradient(seen)
            inside = (seen > OUT / 2) & (np.abs(down) < 256) & (np.abs(right) < 256)
            if inside.mean() < 0.25:
                return None
            x_in, y_in, down, right, seen = (values[inside] for values in (x, y, side * down, side * right, seen))
            ones = np.ones_like(seen)
            light = np.stack([seen, ones], 1)
            change = np.stack([right * x_in, right * y_in, right, down * x_in, down * y_in, down, seen, ones], 1)
            residual = over[inside] - seen
            rest = residual - light @ np.linalg.lstsq(light, residual, rcond=None)[0]
            weights = 1 / (1 + (rest / (3 * np.median(np.abs(rest)) + 2)) ** 2)
            try:
                step = np.linalg.solve((change.T * weights) @ change, (change.T * weights) @ residual)[:6].reshape(2, 3)
            except np.linalg.LinAlgError:
                return None
            if not np.abs(step).max() < 0.5:
                return None
            matrix = matrix @ np.vstack([np.eye(2, 3) + step, [0, 0, 1]])
            if np.abs(step).max() < 0.1 / side:
                break
    return matrix


def _blocks(whole: np.ndarray, part: np.ndarray, matrix: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Correlation of the details of each block that has any in one of both, and the share of the blocks whose grey
    level differs by more than a change of brightness and contrast makes it; the part of (side, side) pixels."""
    seen = _shrink(_warp(whole, matrix, 2 * side), side)  # two samples to a pixel each way, against aliasing
    inside = seen >= 0
    blocks = [_in_blocks(np.where(inside, values, 0)) for values in (seen, _shrink(part, side))]
    full = _in_blocks(inside.astype(np.float32)).mean(1) > 0.95
    levels, other = (values.mean(1)[full] for values in blocks)
    light = np.polyfit(levels, other, 1) if np.ptp(levels) > 1 else (1, 0)
    close = np.abs(other - np.polyval(light, levels))
    near = close <= np.median(close)
    light = np.polyfit(levels[near], other[near], 1) if np.ptp(levels[near]) > 1 else light
    covered = float(np.mean(np.abs(other - np.polyval(light, levels)) > 30))
    first, second = (_in_blocks(_details(np.where(inside, values, 0))) for values in (seen, _shrink(part, side)))
    first, second = (values - values.mean(1, keepdims=True) for values in (first, second))
    deviations = first.std(1), second.std(1)
    telling = full & (np.maximum(*deviations) > 2)
    return (first * second).mean(1)[telling] / np.maximum(deviations[0] * deviations[1], 1e-3)[telling], covered


def _details(values: np.ndarray) -> np.ndarray:
    image = Image.fromarray(values.astype(np.float32))
    side = image.width // 4
    return values - np.asarray(image.resize((side, side), Image.BOX).resize(image.size, Image.BICUBIC))


def _in_blocks(values: np.ndarray) -> np.ndarray:
    size = len(values) // BLOCKS
    return values.reshape(BLOCKS, size, BLOCKS, size).swapaxes(1, 2).reshape(BLOCKS ** 2, -1)


def _shrink(values: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize((side, side), Image.BOX))


def _warp(whole: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """(side, side) of the whole at the places that the matrix gives, `OUT` where there are none."""
    own = len(whole)
    linear, offset = matrix[:, :2] * own / side, matrix[:, 2] * own + own / 2
    offset = offset - linear @ np.full(2, side / 2)
    coefficients = np.column_stack([linear, offset]).ravel().tolist()
    image = Image.fromarray(whole.astype(np.float32))
    return np.asarray(image.transform((side, side), Image.AFFINE, coefficients, Image.BILINEAR, fillcolor=OUT))
