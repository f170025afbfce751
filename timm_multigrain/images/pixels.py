"""Pixels of an opened picture as every network sees them, in training and in every command: upright, RGB, 8 bits.

Transparent parts are laid on white; on black where the visible parts are themselves nearly white (lighter than 240 of
255 on average, weighted by their opacity) and would vanish on it. 16 bits are reduced to 8.
"""
from collections.abc import Iterator

import numpy as np
from PIL import Image

__all__ = ['decode', 'to_rgb', 'turn_of']

Box = tuple[int, int, int, int]

NEARLY_WHITE = 240
_STRIP = 1 << 20  # pixels that are converted at a time
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


def decode(image: Image.Image, exif: bool = True) -> Image.Image:
    """An image of Pillow of any mode, decoded or only opened, as upright RGB; of an animation, the present frame.

    Args:
        image: The image; returned itself if it is upright and RGB already.
        exif: Turn the image upright as its EXIF orientation says. TIFF is turned by Pillow in any case.

    Raises:
        OSError: Its file is damaged (or another of Pillow's errors).
    """
    image.load()
    turn = turn_of(image) if exif else None
    rgb = to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {}  # the orientation has been followed
    return rgb


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns a decoded image upright by its EXIF orientation."""
    try:
        return _TURNS.get(image.getexif().get(0x112))
    except Exception:  # damaged EXIF: the picture itself was read
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a decoded image, which is returned itself if it is that already; takes 4 bytes a pixel."""
    transparent = image.mode in ('RGBA', 'LA', 'PA', 'RGBa') or 'transparency' in image.info
    if not transparent and not _is_wide(image):
        return image if image.mode == 'RGB' else image.convert('RGB')
    ground = _ground(image) if transparent else None
    rgb = Image.new('RGB', image.size)
    for box, strip in _strips(image):
        if transparent:
            strip = strip.convert('RGBA')
            strip = Image.alpha_composite(Image.new('RGBA', strip.size, ground), strip)
        rgb.paste(strip.convert('RGB'), box)
    return rgb


def _ground(image: Image.Image) -> str:
    light = opacity = 0
    for _, strip in _strips(image):
        strip = strip.convert('RGBA')
        alpha = np.asarray(strip.getchannel('A'), dtype=np.int64)
        light += int((np.asarray(strip.convert('L')) * alpha).sum())
        opacity += int(alpha.sum())
    return 'black' if light > NEARLY_WHITE * opacity else 'white'


def _strips(image: Image.Image) -> Iterator[tuple[Box, Image.Image]]:
    """The image in horizontal strips of 8 bits, so that the conversions on the way take little memory."""
    rows = max(1, _STRIP // image.width)
    boxes = [(0, y, image.width, min(y + rows, image.height)) for y in range(0, image.height, rows)]
    if not _is_wide(image):
        yield from ((box, image.crop(box)) for box in boxes)
        return
    top, clear = _top(image, boxes), image.info.get('transparency')
    for box in boxes:
        values = np.asarray(image.crop(box))
        strip = Image.fromarray((_finite(values).clip(0, top) * (255 / top)).round().astype(np.uint8))
        if clear is not None:
            strip = Image.merge('LA', [strip, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))])
        yield box, strip


def _is_wide(image: Image.Image) -> bool:
    """Whether it has grey values of more than 8 bits."""
    return image.mode in ('I', 'F') or image.mode.startswith('I;')


def _top(image: Image.Image, boxes: list[Box]) -> float:
    """The value of white. Where the mode has no fixed range, it is inferred from the values."""
    ranges = {'I': (255., 65535.), 'F': (1., 255., 65535.)}.get(image.mode)
    if ranges is None:
        return 65535.
    largest = max(_finite(np.asarray(image.crop(box))).max() for box in boxes)
    return next((top for top in ranges if largest <= top), largest)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
