"""Reading pictures, one way for training and every command: upright, RGB, 8 bits, of known formats only.

Transparent parts are laid on white; on black where the visible parts are themselves nearly white (lighter than 240 of
255 on average, weighted by their opacity) and would vanish on it. 16 bits are reduced to 8.
"""
import os
import stat
import warnings
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image

from timm_multigrain.files import printable

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'JPEG2000', 'AVIF', 'HEIF')  # Pillow's names
MAX_PIXELS = 178_956_970  # Pillow's own limit, twice its Image.MAX_IMAGE_PIXELS
NEARLY_WHITE = 240
_MAX_MEMORY = 1 << 31
_BYTES_PER_PIXEL = {'AVIF': 16, 'HEIF': 16, 'JPEG2000': 24, 'WEBP': 16}  # measured; of other formats at most 12
_STRIP = 1 << 20  # pixels that are converted at a time
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}

File = str | bytes | os.PathLike | BinaryIO


class UnreadableImage(ValueError):
    """An image that cannot be read. The message is 'PATH: reason'."""


@cache
def _formats() -> list[str]:
    try:
        from pillow_heif import register_heif_opener
        register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(file: File, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """Open an image of one of `FORMATS` without decoding it; arguments as of `read_image`."""
    if not hasattr(file, 'read') and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError('is not a regular file')  # opening a FIFO would wait for a writer, a device may never end
    image = Image.open(file, formats=_formats())
    if size is not None:
        image.draft(None, (size, size))
    max_pixels = min(max_pixels, _MAX_MEMORY // _BYTES_PER_PIXEL.get(image.format, 12))
    if image.width * image.height > max_pixels:
        image.close()
        raise OSError(f'{image.width} x {image.height} pixels are more than {max_pixels} in all')
    return image


def read_image(file: File, exif: bool = True, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """Read an image file of any mode as RGB; of an animation, the first frame. Takes at most 2 GiB of memory.

    Args:
        file: A file, which has to be a regular one, or a binary file object.
        exif: Turn the image upright as its EXIF orientation says.
        max_pixels: Larger images are refused, by the size that their header states, and in any case those above 179
            million pixels (WebP, AVIF and HEIC 134 million, JPEG 2000 89 million).
        size: For a small picture to be looked at: a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, its
            shorter side not below this many pixels, which is quicker and not the same to the last grey level.

    Raises:
        UnreadableImage: File not found, not an image, damaged, truncated or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a large image is not yet a bomb; damaged EXIF can be ignored
            with open_image(file, max_pixels, size) as image:
                rgb = decode(image, exif)
                if rgb is image:  # whose file is closed
                    rgb = image.copy()
                    rgb.info = {}
                return rgb
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise whatever a broken file makes them raise
        name = getattr(file, 'name', None) if hasattr(file, 'read') else file
        name = printable(name) if isinstance(name, (str, bytes, os.PathLike)) else 'image'
        raise UnreadableImage(f'{name}: {_reason(file, e)}') from e


def _reason(file: File, error: Exception) -> str:
    path = None if hasattr(file, 'read') else os.fsdecode(file)
    if path is not None and os.path.isdir(path):
        return 'is a folder, not an image'
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, Image.UnidentifiedImageError):
        if path is not None and os.path.getsize(path) == 0:
            return 'is empty'
        if path is not None and path.lower().endswith(('.heic', '.heif', '.hif')) and 'HEIF' not in _formats():
            return "HEIC takes pillow-heif: pip install 'timm_multigrain[photos]'"
        return f'is not an image in a format that is read here ({", ".join(_formats())})'
    return ' '.join(str(getattr(error, 'strerror', None) or error).split()) or type(error).__name__


def is_image(path: str | bytes | os.PathLike) -> bool:
    """Whether the first bytes of a file are those of an image of `FORMATS`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            open_image(path).close()
        return True
    except Exception:  # as in read_image
        return False


def holds_several(path: str | os.PathLike) -> bool:
    """Whether an image file has pages or frames besides the one that `read_image` reads; False if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with open_image(path) as image:
                if image.format == 'MPO':  # most of them are a photograph with a preview or a gain map
                    return any('Multi-Frame' in entry['Attribute']['MPType'] for entry in image.mpinfo[0xB002])
                return bool(getattr(image, 'is_animated', False))
    except Exception:  # as in read_image
        return False


def decode(image: Image.Image, exif: bool = True) -> Image.Image:
    """An image of Pillow of any mode, decoded or only opened, as upright RGB; of an animation, the present frame.

    Args:
        image: The image; returned itself if it is upright and RGB already.
        exif: Turn the image upright as its EXIF orientation says. TIFF is turned by Pillow in any case.
    """
    image.load()
    turn = turn_of(image) if exif else None
    rgb = _to_rgb(image)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    transparent = image.has_transparency_data
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


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
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


def _top(image: Image.Image, boxes: list[tuple[int, int, int, int]]) -> float:
    """The value of white. Where the mode has no fixed range, it is inferred from the values."""
    ranges = {'I': (255., 65535.), 'F': (1., 255., 65535.)}.get(image.mode, ())
    if not ranges:
        return 65535.
    largest = max(_finite(np.asarray(image.crop(box))).max() for box in boxes)
    return next((top for top in ranges if largest <= top), largest)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
