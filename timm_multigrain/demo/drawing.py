"""Drawing tools of the demo's pictures: colours, patterns, a pen with a pose, backgrounds and camera effects.

Nothing here knows the class of a picture, so that none of it can give the class away.
"""
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ['Color', 'Palette', 'Pen', 'Rng', 'background', 'box', 'curve', 'ellipse', 'expose']

Color = tuple[int, int, int]
Rng = np.random.Generator


def oklch(lightness: float, chroma: float, hue: float) -> Color:
    """8-bit sRGB of an OKLCH colour (Ottosson 2020), hue in turns: equal lightness looks equally light in any hue."""
    a, b = chroma * math.cos(2 * math.pi * hue), chroma * math.sin(2 * math.pi * hue)
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3  # noqa: E741
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.clip([
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    ], 0, 1)
    srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return tuple(int(v) for v in (255 * srgb).round())


class Palette:
    """Colours of one picture: `main`, `second`, `accent`, `line` for the object and the list `back` for the rest."""

    def __init__(self, rng: Rng) -> None:
        dark_scene = rng.random() < 0.5
        hue = rng.random()
        spread = rng.choice([0.08, 0.33, 0.5]) * rng.choice([-1, 1])
        low, high = (0.64, 0.92) if dark_scene else (0.36, 0.64)
        self.main = oklch(rng.uniform(low, high), rng.uniform(0.08, 0.19), hue)
        self.second = oklch(rng.uniform(low, high), rng.uniform(0.05, 0.17), hue + spread)
        self.accent = oklch(rng.uniform(0.85, 0.97), rng.uniform(0.02, 0.13), hue + rng.uniform(-0.5, 0.5))
        self.line = oklch(rng.uniform(0.1, 0.22), rng.uniform(0, 0.05), hue + rng.uniform(-0.5, 0.5))
        scene_hue = rng.random()
        low, high = (0.3, 0.52) if dark_scene else (0.72, 0.95)
        self.back = [
            oklch(rng.uniform(low, high), rng.uniform(0.02, 0.11), scene_hue + rng.uniform(-0.2, 0.2)) for _ in range(5)
        ]


def pattern(side: int, palette: Palette, rng: Rng) -> Image.Image:
    """Cloth for the object's large parts, two-coloured: plain, stripes, waves, dots, checks or patches by chance."""
    kind = rng.integers(6)
    angle, period = rng.uniform(0, math.pi), side * rng.uniform(0.05, 0.12)
    y, x = np.mgrid[:side, :side].astype(np.float32) * np.float32(2 * math.pi / period)
    u = x * math.cos(angle) + y * math.sin(angle) + rng.uniform(0, 6)
    v = y * math.cos(angle) - x * math.sin(angle) + rng.uniform(0, 6)
    share = rng.uniform(0.1, 0.7)
    if kind == 0:
        mask = np.zeros_like(u, dtype=bool)
    elif kind == 1:
        mask = np.sin(u) > share
    elif kind == 2:
        mask = np.sin(u + 1.4 * np.sin(0.6 * v)) > share
    elif kind == 3:
        mask = np.cos(u) + np.cos(v) > 0.4 + share
    elif kind == 4:
        mask = np.sin(u / 1.5) * np.sin(v / 1.5) > 0
    else:
        mask = np.asarray(noise(side, rng.integers(5, 9), rng)) > 140
    cloth = Image.new('RGB', (side, side), palette.main)
    cloth.paste(palette.accent if rng.random() < 0.5 else palette.second, mask=Image.fromarray(mask))
    return cloth


def noise(side: int, cells: int, rng: Rng) -> Image.Image:
    """Smooth grey noise with about `cells` bumps along a side."""
    return Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8)).resize((side, side), Image.BICUBIC)


class Pen:
    """Draws shapes given in object coordinates under the pose of the picture, on a transparent layer."""

    def __init__(self, side: int, palette: Palette, rng: Rng) -> None:
        self.layer = Image.new('RGBA', (side, side))
        self.draw = ImageDraw.Draw(self.layer)
        self.cloth = pattern(side, palette, rng)
        self.palette, self.rng = palette, rng
        angle, shear, size = rng.uniform(-0.4, 0.4), rng.uniform(-0.15, 0.15), side * rng.uniform(0.3, 0.44)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.matrix = rotation @ np.array([[rng.choice([-1, 1]) * rng.uniform(0.85, 1), shear], [0, 1]]) * size
        self.offset = side * (0.5 + rng.uniform(-0.1, 0.1, 2))
        self.scale = size
        self.outline = int(size * 0.035) if rng.random() < 0.5 else 0

    def place(self, points: Sequence) -> list[tuple[float, float]]:
        return [tuple(p) for p in (np.asarray(points) @ self.matrix.T + self.offset).tolist()]

    def shape(self, points: Sequence, fill: Color | None = None) -> None:
        """Filled polygon; without a colour it is cut from the picture's cloth."""
        points = self.place(points)
        if fill is None:
            mask = Image.new('L', self.layer.size)
            ImageDraw.Draw(mask).polygon(points, fill=255)
            self.layer.paste(self.cloth, mask=mask)
        else:
            self.draw.polygon(points, fill=fill)
        if self.outline:
            self.draw.line([*points, points[0], points[1]], self.palette.line, self.outline, joint='curve')

    def disc(
            self,
            x: float,
            y: float,
            rx: float,
            ry: float | None = None,
            fill: Color | None = None,
            turn: float = 0.,
    ) -> None:
        """Ellipse, its axes turned by `turn` radians."""
        self.shape(ellipse(x, y, rx, rx if ry is None else ry, turn), fill)

    def stroke(self, points: Sequence, width: float, fill: Color) -> None:
        """Line with round joints and ends."""
        points, width = self.place(points), max(width * self.scale, 2.)
        self.draw.line(points, fill, round(width), joint='curve')
        for x, y in (points[0], points[-1]):
            self.draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill)


def ellipse(
        x: float,
        y: float,
        rx: float,
        ry: float,
        turn: float = 0.,
        start: float = 0.,
        stop: float = 1.,
) -> np.ndarray:
    """Points of an ellipse from `start` to `stop` turns, clockwise from the right."""
    t = 2 * math.pi * np.linspace(start, stop, 37)
    u, v = rx * np.cos(t), ry * np.sin(t)
    return np.stack([x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)], 1)


def curve(*points: tuple[float, float]) -> np.ndarray:
    """Bezier curve of any degree through its first and last point."""
    points, t = np.asarray(points, dtype=float), np.linspace(0, 1, 21)[:, None, None]
    while points.shape[-2] > 1:
        points = (1 - t) * points[..., :-1, :] + t * points[..., 1:, :]
    return points[:, 0]


def box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def background(side: int, palette: Palette, rng: Rng) -> Image.Image:
    """Gradient, clouds, ground and blurred clutter: discs, triangles, squares and bars, as parts of every class."""
    ramp = Image.linear_gradient('L').rotate(rng.uniform(0, 360), Image.BILINEAR)
    ramp = ramp.crop((38, 38, 218, 218)).resize((side, side))
    scene = Image.composite(*(Image.new('RGB', (side, side), color) for color in palette.back[:2]), ramp)
    scene.paste(palette.back[2], mask=noise(side, rng.integers(3, 7), rng).point(lambda v: v // 2))
    draw = ImageDraw.Draw(scene, 'RGBA')
    if rng.random() < 0.6:
        x = np.linspace(0, side, 33)
        y = side * (rng.uniform(0.45, 0.85) + 0.05 * np.sin(x / side * rng.uniform(2, 9) + rng.uniform(0, 6)))
        draw.polygon([*zip(x.tolist(), y.tolist(), strict=True), (side, side), (0, side)], palette.back[3])
    for _ in range(rng.integers(4, 12)):
        (x, y), r, angle = rng.uniform(0, side, 2), side * rng.uniform(0.03, 0.16), rng.uniform(0, 2 * math.pi)
        color = (*palette.back[rng.integers(2, 5)], int(rng.integers(90, 220)))
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), color)
        elif kind == 1:
            draw.line((x - 3 * r * math.cos(angle), y - 3 * r * math.sin(angle), x + r, y + r), color, int(r / 4) + 1)
        else:
            draw.regular_polygon((x, y, r), int(kind) + 1, math.degrees(angle), color)
    return scene.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.002, 0.016)))


def expose(image: Image.Image, rng: Rng) -> Image.Image:
    """Light from one side, focus and sensor noise of a picture taken by hand."""
    size = image.width
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    axis = np.linspace(-1, 1, size)
    light = 1 + strength * (axis * math.cos(angle) + axis[:, None] * math.sin(angle)) / math.sqrt(2)
    values = np.asarray(image, dtype=np.float32) * light[..., None] * rng.uniform(0.85, 1.1)
    values += rng.normal(0, rng.uniform(1, 5), values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
