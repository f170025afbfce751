"""Whether one picture was made from another, by its details, and by which edit.

Local features of both (SIFT, Lowe 2004, compared as by Arandjelović and Zisserman 2012) are matched, also with those of
the mirror image, and RANSAC (Fischler and Bolles 1981) finds the affine map that most of the matches agree with: a
picture may be turned, mirrored, cut, squeezed, or inset in another. Laid over each other, the pictures look the same if
in most places what is left after a blur correlates. One was made from the other for certain if it does so nearly
everywhere and one picture lies within the other: two photographs of a place each show what the other does not.

Small grey versions, also mirrored and by quarter turns, are compared first where details are gone, as after a strong
blur; they are all that is compared without OpenCV (extra `local`).
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

try:
    import cv2
except ImportError:
    cv2 = None

NO_OPENCV = ('Pictures are compared in small versions only, which misses turned, cut and inset copies and makes none '
             "certain: pip install 'timm_multigrain[local]'")
SIDE, FEATURES = 320, 500  # pixels of the longer side of what is compared, and local features at most
SMALL, ALIKE = 32, 0.95  # pixels, and the correlation from which small versions look the same; benchmarks/README.md
RATIO, PIXELS, INLIERS = 0.85, 3, 8  # distance to the best match over that to the next; of RANSAC; matches that agree
AGREES = 0.7  # correlation of a place with its counterpart
CERTAIN = (0.85, 0.9)  # share of the places that agree, and the median of the correlations
LIKELY = ((0.8, 0.85), (0.6, 0.97))  # the same; the second one is of pictures that are partly covered
BLURRED = (0.2, 0.5)  # the same, of pictures whose small versions look the same
GOES_ON, SEAM = 0.25, 2  # along the edge of a part: correlation across it, and how much more that differs than inside
WHOLE = 0.95  # share of the area from which on a part is the whole
INSIDE, OVERLAP = 0.02, 0.15  # sides that a part may reach beyond the whole, to be certain and to be likely
MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1, :, -np.arange(8) % 8].ravel()  # bins of SIFT of the mirror image


class Picture:
    """What is compared of a picture: its size, grey versions, colours, and local features."""

    def __init__(self, image: Image.Image, size: tuple[int, int] | None = None):
        self.size = size or image.size
        scale = min(1, SIDE / max(image.size))
        image = image.resize([max(1, round(scale * side)) for side in image.size], Image.BOX, reducing_gap=2)
        self.grey, colours = np.asarray(image.convert('L')), image.convert('RGB')
        small = np.asarray(image.convert('L').resize((SMALL, SMALL), Image.BOX), dtype=np.float32)
        self.small = small if small.std() > 2 else None  # nearly one colour proves nothing
        self.colours = np.asarray(colours.resize((8, 8), Image.BOX), dtype=np.float32)
        self.is_grey = bool(np.quantile(np.ptp(np.asarray(colours, dtype=np.int16), axis=2), 0.99) <= 8)

    @property
    def upright(self) -> np.ndarray:
        """(256,) float32, a smaller version, the same if the picture is mirrored or turned by quarters: brighter to the
        right and to the bottom, most so to the right; of mean 0 and norm 1, zeros where `small` is None."""
        if self.small is None:
            return np.zeros(SMALL ** 2 // 4, np.float32)
        half = SMALL // 2
        values = self.small.reshape(half, 2, half, 2).mean((1, 3))
        values = values - values.mean()
        down, right = ((values.sum(axis) * (np.arange(half) - (half - 1) / 2)).sum() for axis in (1, 0))
        values = values[::-1 if down < 0 else 1, ::-1 if right < 0 else 1]
        values = (values.T if abs(down) > abs(right) else values).ravel()
        return values / np.linalg.norm(values).clip(1e-6)

    @property
    def to_pixels(self) -> np.ndarray:
        return _to_pixels(*self.grey.shape[::-1])

    @cached_property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Places (n, 2) in pixels of `grey`, and descriptors (n, 128) uint8."""
        points, values = cv2.SIFT_create(FEATURES, contrastThreshold=0.02).detectAndCompute(self.grey, None)
        return cv2.KeyPoint_convert(points), (np.zeros((0, 128)) if values is None else values).astype(np.uint8)


@dataclass(frozen=True)
class Comparison:
    """A picture compared with the one it may have been made from.

    Attributes:
        alike: They look the same, in part at least.
        certain: So do nearly all details, and one picture lies within the other.
        edits: What was done to it, in words; empty if they do not look the same.
    """
    alike: bool = False
    certain: bool = False
    edits: tuple[str, ...] = ()


def compare(original: Picture, copy: Picture) -> Comparison:
    """Compare a copy with its original."""
    likely = Comparison()
    for matrix, by_small in ((_by_features(original, copy), False), (_by_small(original, copy), True)):
        if matrix is None or not 0.01 < abs(np.linalg.det(matrix[:2, :2])) < 100:
            continue
        alike, edits = by_small, [*_of_the_frame(original, copy, matrix), *_of_the_content(original, copy, matrix)]
        if cv2 is not None:
            area = abs(np.linalg.det(matrix[:2, :2]))
            whole, part, inside = (original, copy, np.linalg.inv(matrix)) if area > 1 else (copy, original, matrix)
            area, (agreeing, median) = min(area, 1 / area), _details(whole, part, inside)
            beyond = np.abs(inside[:2] @ [[-0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, -0.5, 0.5], [1] * 4]).max() - 0.5
            alike = beyond <= OVERLAP and any(
                agreeing >= share and median >= middle for share, middle in (*LIKELY, *[BLURRED] * by_small))
            # a part with more pixels than the whole has there is a photograph of its own, taken from nearer
            is_part = beyond <= INSIDE and (area > WHOLE or math.prod(part.size) <= 1.1 * area * math.prod(whole.size))
            if inset := area < WHOLE and _is_inset(whole, inside):
                edits += ['inset'] * (whole is copy)
            elif agreeing < CERTAIN[0]:
                edits.append('partly covered' if median >= CERTAIN[1] else 'blurred or compressed')
            if is_part and not inset and agreeing >= CERTAIN[0] and median >= CERTAIN[1]:
                return Comparison(True, True, tuple(edits))
        if alike and not likely.alike:
            likely = Comparison(True, False, tuple(edits))
    return likely


def _by_features(original: Picture, copy: Picture) -> np.ndarray | None:
    """(3, 3), from places in the original to those in the copy, in sides from -0.5 to 0.5; None if few features agree.
    """
    if cv2 is None or min(len(picture.features[0]) for picture in (original, copy)) < INLIERS:
        return None
    (places, values), (others, there) = original.features, copy.features
    values, there = (np.sqrt(v / v.sum(1, keepdims=True, dtype=np.float32).clip(1)) for v in (values, there))
    best, most = None, INLIERS - 1
    for descriptors in (there, there[:, MIRRORED]):
        scores, own = values @ descriptors.T, np.arange(len(values))
        closest = scores.argmax(1)
        best_score, mutual = scores[own, closest], scores.argmax(0)[closest] == own
        scores[own, closest] = -1  # |a - b|^2 = 2 - 2 ab
        good = mutual & (1 - best_score < RATIO ** 2 * (1 - scores.max(1)))
        if good.sum() > most:
            matrix, agree = cv2.estimateAffine2D(places[good], others[closest[good]], ransacReprojThreshold=PIXELS,
                                                 confidence=0.999)
            if matrix is not None and agree.sum() > most:
                best, most = np.vstack([matrix, [0, 0, 1]]), agree.sum()
    return None if best is None else np.linalg.inv(copy.to_pixels) @ best @ original.to_pixels


def _by_small(original: Picture, copy: Picture) -> np.ndarray | None:
    """The same if the small versions look the same, the copy mirrored or turned by quarters maybe."""
    if original.small is None or copy.small is None:
        return None
    ways = [(mirrored, turns, float(np.corrcoef(original.small.ravel(), np.rot90(small, turns).ravel())[0, 1]))
            for mirrored, small in enumerate((copy.small, copy.small[:, ::-1])) for turns in range(4)]
    mirrored, turns, score = max(ways, key=lambda way: way[2])
    matrix = np.eye(3)
    matrix[:2, :2] = np.diag([-1 if mirrored else 1, 1]) @ np.linalg.matrix_power([[0, -1], [1, 0]], turns)
    return matrix if score >= ALIKE else None


def _of_the_frame(original: Picture, copy: Picture, matrix: np.ndarray) -> Iterator[str]:
    linear = np.diag(copy.size) @ matrix[:2, :2] @ np.diag(1 / np.array(original.size))
    area = abs(np.linalg.det(matrix[:2, :2]))
    if np.linalg.det(linear) < 0:
        yield 'mirrored'
        linear = linear * (-1, 1)
    angle = abs(math.degrees(math.atan2(linear[1, 0] - linear[0, 1], linear[0, 0] + linear[1, 1])))
    if angle >= 1.5:
        yield f'turned by {angle:.0f} degrees'
    if min(area, 1 / area) < WHOLE:
        yield f'shows more, of which this is {100 * area:.0f} %' if area < 1 else f'cropped to {100 / area:.0f} %'
    scale = math.sqrt(abs(np.linalg.det(linear)))
    if not 0.97 < scale < 1.03:
        yield 'smaller' if scale < 1 else 'enlarged'


def _of_the_content(original: Picture, copy: Picture, matrix: np.ndarray) -> Iterator[str]:
    area, colours = abs(np.linalg.det(matrix[:2, :2])), (np.median(p.colours, (0, 1)) for p in (original, copy))
    if copy.is_grey and not original.is_grey:
        yield 'grey'
    elif WHOLE < area < 1 / WHOLE and np.abs(np.subtract(*colours)).max() > 8:
        yield 'other colours'


def _details(whole: Picture, part: Picture, matrix: np.ndarray) -> tuple[float, float]:
    """Share of the places whose details correlate, and median of their correlations; 0 where there are hardly any."""
    height, width = part.grey.shape
    scale = math.sqrt(abs(np.linalg.det(whole.to_pixels @ matrix @ np.linalg.inv(part.to_pixels))))
    size = [max(16, round(min(1, scale) * side)) for side in (width, height)]
    to_whole = (whole.to_pixels @ matrix @ np.linalg.inv(_to_pixels(*size)))[:2]
    grey = cv2.GaussianBlur(whole.grey, (0, 0), scale / 2) if scale > 1.2 else whole.grey  # against aliasing
    seen = cv2.warpAffine(grey, to_whole, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REPLICATE)
    there = cv2.warpAffine(np.ones_like(grey), to_whole, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    own = cv2.resize(part.grey, size, interpolation=cv2.INTER_AREA)
    shrunk = [max(12, round(min(1, 128 / max(size)) * side)) for side in size]
    seen, own, there = (cv2.resize(values, shrunk, interpolation=cv2.INTER_AREA).astype(np.float32)
                        for values in (seen, own, there))
    window = max(5, max(shrunk) // 8 | 1)
    seen, own = (values - cv2.GaussianBlur(values, (0, 0), window / 4) for values in (seen, own))
    mean = lambda values: cv2.boxFilter(values, -1, (window, window))  # noqa: E731
    variances = [(mean(values * values) - mean(values) ** 2).clip(0) for values in (seen, own)]
    correlation = (mean(seen * own) - mean(seen) * mean(own)) / np.sqrt(variances[0] * variances[1]).clip(1e-3)
    correlation = correlation[(there > 0) & (np.maximum(*variances) > 4)]
    if len(correlation) < 0.05 * seen.size:
        return 0., 0.
    return float(np.mean(correlation > AGREES)), float(np.median(correlation))


def _is_inset(whole: Picture, matrix: np.ndarray) -> bool:
    """Whether the whole does not go on around the part: along its edge, what is outside does not correlate with the
    inside, or differs from it more than the inside changes over the same distance."""
    edge, half = np.linspace(-0.5, 0.5, 64), np.full(64, 0.5)
    frame = np.hstack([[edge, half], [edge, -half], [half, edge], [-half, edge]])
    deep, inner, outer = (
        np.round((whole.to_pixels @ matrix)[:2] @ [*(factor * frame), np.ones(frame.shape[1])]).astype(int)
        for factor in (0.955, 0.985, 1.015))
    sides = np.array(whole.grey.shape[::-1])[:, None]
    there = ((outer >= 0) & (outer < sides)).all(0)
    if there.mean() < 0.1:
        return False
    deep, inner, outer = (whole.grey[y[there], x[there]].astype(np.float32)
                          for x, y in (points.clip(0, sides - 1) for points in (deep, inner, outer)))
    changes = np.abs(inner - deep).mean() + 2
    return (np.abs(outer - inner).mean() > SEAM * changes or min(inner.std(), outer.std()) < 1
            or np.corrcoef(inner, outer)[0, 1] < GOES_ON)


def _to_pixels(width: int, height: int) -> np.ndarray:
    """(3, 3), from places in sides, -0.5 to 0.5, to pixels."""
    return np.array([[width, 0, (width - 1) / 2], [0, height, (height - 1) / 2], [0, 0, 1]])
