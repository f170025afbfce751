"""The demo's picture collection: six kinds of object told apart by their shape, never by their colour.

Colours, cloth, pose, light and background come from one distribution whatever the class, so that a classifier has to
look at shape; number, size and place of the parts are drawn for each picture, so that each shows an object of its own.
Objects are drawn in their own coordinates: x to the right, y down, within about [-1, 1].
"""
import colorsys
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from timm_multigrain.files import write_text

Color = tuple[int, int, int]
Rng = np.random.Generator

MANIFEST = 'collection.json'


class Pen:
    """Colours, cloth and pose of one picture's object, and the transparent layer that it is drawn on."""

    def __init__(self, side: int, light: bool, rng: Rng):
        low, high = (0.6, 0.8) if light else (0.2, 0.4)
        self.main, self.second = _color(rng, low, high), _color(rng, low, high)
        self.accent, self.line = _color(rng, 0.85, 0.95), _color(rng, 0.05, 0.12)
        self.layer, self.cloth = Image.new('RGBA', (side, side)), _cloth(side, self.main, self.accent, rng)
        self.scale, self.centre = side * rng.uniform(0.3, 0.44), side * (0.5 + rng.uniform(-0.1, 0.1, 2))
        turn = rng.uniform(-0.4, 0.4)
        self.pose = self.scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        self.pose[:, 0] *= rng.choice([-1, 1]) * rng.uniform(0.85, 1)

    def shape(self, points, fill: Color | None = None) -> None:
        """Filled polygon; without a colour it is cut from the picture's cloth."""
        mask = Image.new('L', self.layer.size)
        ImageDraw.Draw(mask).polygon(self._place(points), fill=255)
        self.layer.paste(self.cloth if fill is None else fill, (0, 0), mask)

    def disc(self, x: float, y: float, rx: float, ry: float | None = None, fill: Color | None = None,
             turn: float = 0., arc: float = 1.) -> None:
        """Ellipse with its axes turned by `turn` radians, or the upper `arc` of it."""
        t = math.pi * (np.linspace(-arc, arc, 40) - 0.5)
        u, v = rx * np.cos(t), (ry or rx) * np.sin(t)
        self.shape(np.stack([x + u * math.cos(turn) - v * math.sin(turn),
                             y + u * math.sin(turn) + v * math.cos(turn)], 1), fill)

    def stroke(self, points, width: float, fill: Color) -> None:
        ImageDraw.Draw(self.layer).line(self._place(points), fill, max(2, round(width * self.scale)), joint='curve')

    def _place(self, points) -> list[tuple[float, float]]:
        return [tuple(point) for point in (np.asarray(points) @ self.pose.T + self.centre).tolist()]


def _color(rng: Rng, low: float, high: float) -> Color:
    """Any hue, a lightness between two limits."""
    rgb = colorsys.hls_to_rgb(rng.random(), rng.uniform(low, high), rng.uniform(0.2, 0.7))
    return tuple(round(255 * value) for value in rgb)


def _cloth(side: int, first: Color, second: Color, rng: Rng) -> Image.Image:
    """Two colours in stripes, waves, dots or checks by chance."""
    angle, period, share = rng.uniform(0, math.pi), side * rng.uniform(0.05, 0.12), rng.uniform(0.1, 0.7)
    y, x = np.mgrid[:side, :side] * (2 * math.pi / period)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    height = [np.sin(u), np.sin(u + 1.4 * np.sin(0.6 * v)), np.cos(u) + np.cos(v) - 0.4, 2 * np.sin(u) * np.sin(v)]
    image = Image.new('RGB', (side, side), first)
    image.paste(second, mask=Image.fromarray(height[rng.integers(4)] > share))
    return image


def fish(pen: Pen, rng: Rng) -> None:
    height, tail = rng.uniform(0.3, 0.6), rng.uniform(0.25, 0.5)
    pen.shape([(-0.6, 0), (-1.05, -tail), (-rng.uniform(0.75, 0.95), 0), (-1.05, tail)], pen.second)
    pen.shape([(-0.4, 0), (-0.2, -height - rng.uniform(0.15, 0.4)), (0.1, -height - 0.15), (0.5, 0)], pen.second)
    pen.disc(0.1, 0, 0.8, height)
    pen.stroke([(0.3, -0.5 * height), (0.42, 0), (0.3, 0.5 * height)], 0.05, pen.line)
    pen.disc(0.62, -0.12, 0.1, fill=pen.accent)
    pen.disc(0.64, -0.12, 0.055, fill=pen.line)


def flower(pen: Pen, rng: Rng) -> None:
    petals, size, lean = rng.integers(5, 13), rng.uniform(0.5, 0.65), rng.uniform(-0.3, 0.3)
    pen.stroke([(0, -0.35), (0.6 * lean, 0.3), (lean, 1.05)], 0.09, pen.second)
    for side in (-1, 1)[:rng.integers(1, 3)]:
        pen.disc(0.6 * lean + 0.3 * side, rng.uniform(0.3, 0.7), 0.32, 0.12, pen.second, -0.5 * side)
    for angle in 2 * math.pi * (np.arange(petals) / petals + rng.random()):
        x, y = 0.6 * size * math.cos(angle), 0.6 * size * math.sin(angle) - 0.4
        pen.disc(x, y, 0.45 * size, 2.2 * size / petals, turn=angle)
    pen.disc(0, -0.4, size * rng.uniform(0.25, 0.4), fill=pen.accent)


def mushroom(pen: Pen, rng: Rng) -> None:
    width, height, rim = rng.uniform(0.65, 1), rng.uniform(0.5, 1), rng.uniform(-0.2, 0.05)
    stalk, foot = rng.uniform(0.12, 0.22), rng.uniform(0.2, 0.36)
    pen.shape([(-stalk, rim), (stalk, rim), (foot, 0.95), (-foot, 0.95)], pen.accent)
    pen.disc(0, rim, 0.94 * width, rng.uniform(0.1, 0.18), pen.second)
    pen.disc(0, rim, width, height, arc=0.5)
    for _ in range(rng.integers(2, 6)):
        angle, reach = rng.uniform(1.1, 1.9) * math.pi, rng.uniform(0.3, 0.75)
        x, y = reach * width * math.cos(angle), rim + reach * height * math.sin(angle)
        pen.disc(x, y, rng.uniform(0.07, 0.13), fill=pen.accent)


def sailboat(pen: Pen, rng: Rng) -> None:
    deck, mast, tip = rng.uniform(0.4, 0.55), rng.uniform(-0.15, 0.15), rng.uniform(-1.05, -0.85)
    boom, bow, depth = deck - rng.uniform(0.12, 0.25), rng.uniform(0.75, 1), rng.uniform(0.28, 0.42)
    left, right = mast - 0.06, mast + 0.06
    pen.stroke([(mast, tip), (mast, deck)], 0.06, pen.line)
    pen.shape([(right, tip), (right + rng.uniform(0.2, 0.5), -0.2), (rng.uniform(0.65, 0.95), boom), (right, boom)])
    pen.shape([(left, tip + rng.uniform(0.1, 0.6)), (left, boom), (-rng.uniform(0.6, 0.9), boom)], pen.accent)
    pen.shape([(-bow, deck), (bow, deck), (0.6 * bow, deck + depth), (-0.7 * bow, deck + depth)], pen.second)
    for x in np.linspace(-0.5, 0.5, rng.integers(2, 5)) * bow:
        pen.disc(x, deck + 0.4 * depth, 0.055, fill=pen.accent)


def tree(pen: Pen, rng: Rng) -> None:
    trunk = rng.uniform(0.08, 0.15)
    pen.shape([(-0.6 * trunk, -0.3), (0.6 * trunk, -0.3), (1.5 * trunk, 1), (-1.5 * trunk, 1)], pen.line)
    for x, y in rng.uniform([-0.6, -0.75], [0.6, 0], (rng.integers(4, 8), 2)).tolist():
        pen.stroke([(0, 0.4), (x, y)], 0.09, pen.line)
        pen.disc(x, y, rng.uniform(0.28, 0.44), rng.uniform(0.25, 0.38))
        pen.disc(x + 0.1, y + 0.1, 0.06, fill=pen.accent)


def balloon(pen: Pen, rng: Rng) -> None:
    width, basket, drop = rng.uniform(0.6, 0.8), rng.uniform(0.14, 0.22), rng.uniform(0.7, 0.8)
    for x in (-1, -0.35, 0.35, 1):
        pen.stroke([(0.7 * width * x, 0.1), (basket * x, drop)], 0.03, pen.line)
    pen.disc(0, -0.3, width, 0.7)
    for i, share in enumerate(np.linspace(0.7, 0.25, rng.integers(2, 4))):
        pen.disc(0, -0.3, share * width, 0.7, None if i % 2 else pen.second)
    pen.shape([(-basket, drop), (basket, drop), (0.8 * basket, 1.05), (-0.8 * basket, 1.05)], pen.line)


CLASSES = {draw.__name__: draw for draw in (fish, flower, mushroom, sailboat, tree, balloon)}


def _background(side: int, light: bool, rng: Rng) -> Image.Image:
    """A gradient with blurred clutter: discs, bars, triangles and squares, as parts of every class."""
    colors = [_color(rng, *((0.7, 0.9) if light else (0.15, 0.4))) for _ in range(5)]
    ramp = Image.linear_gradient('L').rotate(rng.uniform(0, 360), Image.BILINEAR).crop((38, 38, 218, 218))
    scene = Image.composite(*(Image.new('RGB', (side, side), c) for c in colors[:2]), ramp.resize((side, side)))
    draw = ImageDraw.Draw(scene, 'RGBA')
    for _ in range(rng.integers(6, 16)):
        (x, y), r, (dx, dy) = rng.uniform(0, side, 2), side * rng.uniform(0.03, 0.16), rng.uniform(-side, side, 2) / 2
        fill, corners = (*colors[rng.integers(2, 5)], int(rng.integers(90, 220))), int(rng.integers(1, 5))
        if corners > 2:
            draw.regular_polygon((x, y, r), corners, rng.uniform(0, 360), fill)
        else:
            draw.line((x, y, x + dx, y + dy), fill, int(r / 4) + 1)
            draw.ellipse((x - r, y - r, x + r, y + r), fill)
    return scene.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.002, 0.016)))


def draw_picture(name: str, size: int, rng: Rng) -> Image.Image:
    """Picture of `size` x `size` pixels of a class of `CLASSES`; an equal state of `rng` gives an equal picture."""
    side, light = 2 * size, rng.random() < 0.5  # drawn larger, for smooth edges
    scene, pen = _background(side, not light, rng), Pen(side, light, rng)
    CLASSES[name](pen, rng)
    shadow = pen.layer.getchannel('A').filter(ImageFilter.GaussianBlur(0.02 * side)).point(lambda v: v * 0.45)
    scene.paste((0, 0, 0), tuple((side * rng.uniform(-0.04, 0.04, 2)).astype(int).tolist()), shadow)
    scene.paste(pen.layer, mask=pen.layer)
    values = np.asarray(scene.resize((size, size), Image.LANCZOS)) * rng.uniform(0.8, 1.1)
    values = values + rng.normal(0, rng.uniform(1, 5), values.shape)  # as of a sensor
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def make_collection(
        root: str | os.PathLike, train_per_class: int = 260, val_per_class: int = 34, size: int = 112, seed: int = 0,
) -> Path:
    """Draw {train,val}/<class>/<name>.jpg, or reuse them; the folder appears when it is complete."""
    root, counts = Path(root).absolute(), {'train': train_per_class, 'val': val_per_class}
    settings = {'classes': list(CLASSES), **counts, 'size': size, 'seed': seed}
    if root.exists():
        manifest = root / MANIFEST
        if manifest.is_file() and json.loads(manifest.read_bytes()) == settings:
            return root
        raise ValueError(f'{root} holds other things than the pictures to draw: delete it, or name another folder.')
    todo = [(split, name, i) for split in counts for name in CLASSES for i in range(counts[split])]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as folder:
        unfinished = Path(folder, root.name)
        for split, name, i in tqdm(todo, desc='Drawing pictures', unit='picture', disable=None):
            (unfinished / split / name).mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, split == 'val', list(CLASSES).index(name), i])
            draw_picture(name, size, rng).save(unfinished / split / name / f'{name}_{i:04d}.jpg', quality=90)
        write_text(unfinished / MANIFEST, json.dumps(settings))
        os.rename(unfinished, root)
    return root
