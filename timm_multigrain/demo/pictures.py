"""Drawn pictures for the demo: ten kinds of object told apart by their structure, never by their colour.

Colours, pattern, pose, light and background come from one distribution whatever the class, so that a classifier has
to look at shape; number, size and place of the parts are drawn for each picture, so that each shows an object of its
own. Objects are drawn in their own coordinates: x to the right, y down, within about [-1, 1].
"""
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from .drawing import Palette, Pen, Rng, background, box, curve, ellipse, expose

__all__ = ['CLASSES', 'draw_picture']

OVERSAMPLING = 2


def fish(pen: Pen, c: Palette, rng: Rng) -> None:
    height, tail, length = rng.uniform(0.3, 0.6), rng.uniform(0.25, 0.5), rng.uniform(0.6, 0.75)
    pen.shape([(-length + 0.1, 0), (-1.05, -tail), (-rng.uniform(0.75, 0.95), 0), (-1.05, tail)], c.second)
    fin, root = rng.uniform(0.15, 0.4), 0.6 * height
    pen.shape(curve((-0.4, -root), (-0.3, -height - 2 * fin), (0.1, -height - fin), (0.35, -root)), c.second)
    if rng.random() < 0.7:
        pen.shape([(-0.2, root), (-0.35, height + fin), (0.1, root + 0.2 * height)], c.second)
    pen.shape(np.concatenate([
        curve((-length, 0), (-0.4, -1.4 * height), (0.5, -1.4 * height), (0.95, 0.05)),
        curve((0.95, 0.05), (0.5, 1.4 * height), (-0.4, 1.4 * height), (-length, 0)),
    ]))
    pen.stroke(ellipse(0.3, 0, 0.12, height * 0.6, 0, -0.2, 0.2), 0.04, c.line)
    pen.shape([(0, 0.05), (-0.25, -0.08), (-0.3, 0.25)], c.second)
    eye = rng.uniform(0.07, 0.12)
    pen.disc(0.62, -0.12, eye, fill=(245, 245, 240))
    pen.disc(0.64, -0.12, eye * 0.55, fill=c.line)


def flower(pen: Pen, c: Palette, rng: Rng) -> None:
    petals, head, lean = rng.integers(5, 13), rng.uniform(0.5, 0.65), rng.uniform(-0.3, 0.3)
    pen.stroke(curve((0, -0.35), (lean, 0.4), (lean * 0.6, 1.05)), rng.uniform(0.06, 0.1), c.second)
    for side in (-1, 1)[: rng.integers(1, 3)]:
        y = rng.uniform(0.4, 0.8)
        pen.shape(np.concatenate([
            curve((lean * 0.7, y + 0.1), (side * 0.3, y - 0.35), (side * 0.7, y - 0.25)),
            curve((side * 0.7, y - 0.25), (side * 0.5, y + 0.15), (lean * 0.7, y + 0.1)),
        ]), c.second)
    turn, width = rng.uniform(0, 1), head * math.pi / petals * rng.uniform(0.6, 0.8)
    for angle in 2 * math.pi * (np.arange(petals) / petals + turn):
        x, y = 0.6 * head * math.cos(angle), 0.6 * head * math.sin(angle) - 0.4
        pen.disc(x, y, head * 0.45, width, None, angle)
    core = head * rng.uniform(0.25, 0.4)
    pen.disc(0, -0.4, core, fill=c.accent)
    for radius in (0.35, 0.75):
        for angle in np.linspace(0, 2 * math.pi, 9)[:-1] + radius:
            pen.disc(radius * core * math.cos(angle), radius * core * math.sin(angle) - 0.4, 0.03, fill=c.line)


def house(pen: Pen, c: Palette, rng: Rng) -> None:
    width, top, roof = rng.uniform(0.5, 0.85), rng.uniform(-0.35, 0.0), rng.uniform(0.35, 0.7)
    if rng.random() < 0.7:
        x = rng.uniform(0.15, 0.5) * width
        pen.shape(box(x, top - roof * 0.9, x + 0.18, top), c.line)
    pen.shape(box(-width, top, width, 0.85))
    ridge = rng.uniform(0, 0.5) * width
    eave = width + 0.14
    pen.shape([(-eave, top + 0.02), (-ridge, top - roof), (ridge, top - roof), (eave, top + 0.02)], c.second)
    columns, rows = rng.integers(2, 4), rng.integers(1, 3)
    door = rng.integers(columns)
    step, height = 2 * width / columns, (0.85 - top) / (rows + 0.2)
    for row in range(rows):
        for column in range(columns):
            x, y = -width + (column + 0.5) * step, top + 0.2 * height + row * height
            if row == rows - 1 and column == door:
                pen.shape(box(x - 0.3 * step, y, x + 0.3 * step, 0.85), c.line)
                pen.disc(x + 0.18 * step, 0.5 * (y + 0.85), 0.03, fill=c.accent)
            else:
                pen.shape(box(x - 0.28 * step, y, x + 0.28 * step, y + 0.55 * height), c.accent)
                pen.stroke([(x, y), (x, y + 0.55 * height)], 0.03, c.line)
                pen.stroke([(x - 0.28 * step, y + 0.27 * height), (x + 0.28 * step, y + 0.27 * height)], 0.03, c.line)


def car(pen: Pen, c: Palette, rng: Rng) -> None:
    roof, front, rear = rng.uniform(-0.6, -0.35), rng.uniform(0.25, 0.6), rng.uniform(0.35, 0.85)
    belt, wheel = rng.uniform(-0.1, 0.02), rng.uniform(0.2, 0.27)
    pen.shape([(-rear, belt), (-rear + 0.2, roof), (front - 0.25, roof), (front + 0.1, belt)], c.second)
    middle, pane = rng.uniform(-0.25, 0.05), roof + 0.08
    pen.shape([(-rear + 0.1, belt), (-rear + 0.25, pane), (middle - 0.04, pane), (middle - 0.04, belt)], c.accent)
    pen.shape([(middle + 0.04, belt), (middle + 0.04, pane), (front - 0.28, pane), (front, belt)], c.accent)
    nose = rng.uniform(0.02, 0.2)
    pen.shape([(-1, belt + 0.05), (-0.9, belt), (front + 0.1, belt), (0.95, belt + nose), (1.02, 0.42), (-1.02, 0.42)])
    pen.disc(0.92, belt + nose + 0.1, 0.07, fill=c.accent)
    pen.shape(box(-1.0, belt + 0.1, -0.9, belt + 0.22), c.accent)
    pen.stroke([(middle + 0.1, belt + 0.1), (middle + 0.22, belt + 0.1)], 0.04, c.line)
    for x in (-rng.uniform(0.5, 0.65), rng.uniform(0.5, 0.65)):
        pen.disc(x, 0.42, wheel, fill=c.line)
        pen.disc(x, 0.42, wheel * 0.55, fill=c.accent)
        pen.disc(x, 0.42, wheel * 0.2, fill=c.line)


def butterfly(pen: Pen, c: Palette, rng: Rng) -> None:
    top, low, reach = rng.uniform(0.6, 1.0), rng.uniform(0.5, 0.9), rng.uniform(0.8, 1.05)
    spots = rng.uniform([0.3, -0.45], [0.75, 0.0], (rng.integers(1, 4), 2))
    radii = rng.uniform(0.06, 0.14, len(spots))
    hind = curve((0.02, 0), (0.5, 0.2), (1.3 * reach, 0.3 * low), (0.6, 1.9 * low), (0.1, 0.6), (0.02, 0.1))
    root = (0.02, 0.15)
    fore = curve(root, (0.1, -0.7 * top), (0.8 * reach, -1.8 * top), (1.6 * reach, -0.6), (0.9, 0.4), root)
    for side in (-1, 1):
        def flip(points: np.ndarray, side: int = side) -> np.ndarray:
            return points * (side, 1)
        pen.shape(flip(hind), c.second)
        pen.shape(flip(fore))
        for (x, y), radius in zip(spots, radii, strict=True):
            pen.disc(side * x * reach, y, radius, fill=c.accent)
        pen.disc(side * 0.42, 0.42 * low, 0.1, fill=c.accent)
        pen.stroke(flip(curve((0.02, -0.35), (0.1, -0.7), (0.35, -0.85))), 0.035, c.line)
    pen.disc(0, 0.1, 0.08, 0.5, fill=c.line)
    pen.disc(0, -0.4, 0.1, fill=c.line)


def mushroom(pen: Pen, c: Palette, rng: Rng) -> None:
    width, height, rim = rng.uniform(0.65, 1.0), rng.uniform(0.5, 1.0), rng.uniform(-0.2, 0.05)
    stalk, foot = rng.uniform(0.12, 0.22), rng.uniform(0.2, 0.36)
    pen.shape(np.concatenate([
        curve((-stalk, rim), (-stalk, 0.5), (-foot, 0.95)), curve((-foot, 0.95), (0, 1.1), (foot, 0.95)),
        curve((foot, 0.95), (stalk, 0.5), (stalk, rim)),
    ]), c.accent)
    pen.disc(0, rim, width * 0.94, rng.uniform(0.1, 0.18), fill=c.second)
    for x in np.linspace(-0.7, 0.7, 9) * width:
        pen.stroke([(x * 0.3, rim), (x, rim + 0.08)], 0.02, c.line)
    pen.shape(np.concatenate([
        ellipse(0, rim, width, height, 0, 0.5, 1.0), curve((width, rim), (0, rim + 0.1), (-width, rim)),
    ]))
    for _ in range(rng.integers(2, 6)):
        angle, reach = rng.uniform(1.1, 1.9) * math.pi, rng.uniform(0.3, 0.75)
        x, y = reach * width * math.cos(angle), rim + reach * height * math.sin(angle)
        pen.disc(x, y, rng.uniform(0.07, 0.13), fill=c.accent)
    if rng.random() < 0.5:
        ring, hang = rim + 0.3, foot + 0.1
        pen.shape(curve((-stalk, ring), (-hang, ring + 0.15), (hang, ring + 0.15), (stalk, ring)), c.second)


def sailboat(pen: Pen, c: Palette, rng: Rng) -> None:
    deck, mast, tip = rng.uniform(0.4, 0.55), rng.uniform(-0.15, 0.15), rng.uniform(-1.05, -0.85)
    pen.stroke([(mast, tip), (mast, deck)], 0.06, c.line)
    boom = deck - rng.uniform(0.12, 0.25)
    belly = rng.uniform(0, 0.25)
    pen.shape(np.concatenate([
        curve((mast + 0.06, tip + 0.05), (mast + 0.4 + belly, -0.2), (rng.uniform(0.65, 0.95), boom)),
        [(mast + 0.06, boom)],
    ]))
    if rng.random() < 0.8:
        start = tip + rng.uniform(0.1, 0.6)
        pen.shape([(mast - 0.06, start), (mast - 0.06, boom), (-rng.uniform(0.6, 0.9), boom + 0.05)], c.accent)
    flag = rng.uniform(0.12, 0.22)
    pen.shape([(mast, tip - 0.02), (mast - 2 * flag, tip + 0.06), (mast, tip + flag)], c.second)
    bow, depth = rng.uniform(0.75, 1.0), rng.uniform(0.28, 0.42)
    pen.shape(np.concatenate([
        [(-bow, deck)],
        curve((bow + 0.1, deck - 0.06), (0.7 * bow, deck + depth), (0.3, deck + depth)),
        [(-0.7 * bow, deck + depth)],
    ]), c.second)
    for x in np.linspace(-0.5, 0.5, rng.integers(2, 5)) * bow:
        pen.disc(x, deck + 0.4 * depth, 0.055, fill=c.accent)


def tree(pen: Pen, c: Palette, rng: Rng) -> None:
    trunk, fork = rng.uniform(0.08, 0.15), rng.uniform(0.1, 0.4)
    pen.shape([(-trunk * 0.6, fork - 0.4), (trunk * 0.6, fork - 0.4), (trunk * 1.5, 1), (-trunk * 1.5, 1)], c.line)
    crowns = rng.uniform([-0.6, -0.75], [0.6, 0.0], (rng.integers(4, 8), 2))
    crowns[:2] = [(-0.45, -0.15), (0.45, -0.2)]
    for x, y in crowns:
        pen.stroke(curve((0, fork + 0.15), (x * 0.2, fork - 0.2), (x, y)), 0.09, c.line)
    for i, (x, y) in enumerate(sorted(crowns.tolist(), key=lambda point: point[1])):
        pen.disc(x, y, rng.uniform(0.28, 0.44), rng.uniform(0.25, 0.38), c.second if i == 0 else None)
    for _ in range(rng.integers(0, 7)):
        x, y = crowns[rng.integers(len(crowns))] + rng.uniform(-0.2, 0.2, 2)
        pen.disc(x, y, 0.06, fill=c.accent)


def balloon(pen: Pen, c: Palette, rng: Rng) -> None:
    width, neck = rng.uniform(0.6, 0.8), rng.uniform(0.35, 0.5)
    basket, drop = rng.uniform(0.14, 0.22), rng.uniform(0.7, 0.8)
    for x in (-1, -0.35, 0.35, 1):
        pen.stroke([(x * 0.25, neck), (x * basket, drop)], 0.03, c.line)
    def gore(share: float) -> np.ndarray:
        return np.concatenate([
            curve((0, -1), (share * width * 1.3, -1), (share * width * 1.5, 0), (share * 0.22, neck)),
            curve((-share * 0.22, neck), (-share * width * 1.5, 0), (-share * width * 1.3, -1), (0, -1)),
        ])
    pen.shape(gore(1))
    for i, share in enumerate(np.linspace(0.7, 0.25, rng.integers(2, 4))):
        pen.shape(gore(share), None if i % 2 else c.second)
    pen.shape([(-basket, drop), (basket, drop), (basket * 0.8, 1.05), (-basket * 0.8, 1.05)], c.line)
    pen.stroke([(-basket, drop), (basket, drop)], 0.06, c.accent)


def bicycle(pen: Pen, c: Palette, rng: Rng) -> None:
    radius, width = rng.uniform(0.36, 0.46), rng.uniform(0.06, 0.09)
    spokes = rng.integers(4, 9)
    hubs = [(-0.58, 0.4), (0.58, 0.4)]
    for x, y in hubs:
        for angle in np.linspace(0, math.pi, spokes + 1)[:-1]:
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            pen.stroke([(x - dx, y - dy), (x + dx, y + dy)], 0.02, c.accent)
        pen.stroke(ellipse(x, y, radius, radius), width, c.line)
        pen.disc(x, y, 0.07, fill=c.accent)
    saddle, head, pedal = (-0.3, rng.uniform(-0.4, -0.25)), (0.4, rng.uniform(-0.45, -0.25)), (-0.08, 0.42)
    for frame in ([hubs[0], saddle, head, pedal, hubs[0]], [saddle, pedal], [hubs[1], head]):
        pen.stroke(frame, width, c.main)
    grip = head[0] + rng.uniform(-0.3, 0.2)
    pen.stroke([head, (head[0] - 0.06, head[1] - 0.22), (grip, head[1] - 0.25)], width, c.second)
    pen.stroke([saddle, (saddle[0] - 0.03, saddle[1] - 0.12)], width, c.main)
    pen.disc(saddle[0] - 0.03, saddle[1] - 0.15, 0.2, 0.07, c.second)
    pen.disc(*pedal, 0.1, fill=c.second)
    if rng.random() < 0.5:
        pen.shape(box(head[0] + 0.02, head[1] - 0.1, head[0] + 0.36, head[1] + 0.15))


CLASSES: dict[str, Callable[[Pen, Palette, Rng], None]] = {
    f.__name__: f for f in (fish, flower, house, car, butterfly, mushroom, sailboat, tree, balloon, bicycle)
}


def draw_picture(name: str, size: int, rng: Rng) -> Image.Image:
    """Draw one picture.

    Args:
        name: Class, a key of `CLASSES`.
        size: Side in pixels.
        rng: The only source of chance: an equal state gives an equal picture.

    Returns:
        RGB image of `size` x `size`.
    """
    side = OVERSAMPLING * size
    palette = Palette(rng)
    scene, pen = background(side, palette, rng), Pen(side, palette, rng)
    CLASSES[name](pen, palette, rng)
    alpha = pen.layer.getchannel('A')
    shadow = alpha.filter(ImageFilter.GaussianBlur(0.02 * side)).point(lambda v: v * 0.45)
    scene.paste((0, 0, 0), tuple((side * rng.uniform(-0.04, 0.04, 2)).astype(int).tolist()), shadow)
    scene.paste(pen.layer, mask=alpha)
    scene = scene.resize((size, size), Image.LANCZOS)
    return expose(scene, rng)
