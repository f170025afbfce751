"""Images to embed: files in folders and lists, data sets of timm, and one careful way of reading them."""
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from timm_multigrain.files import printable, read_json

from .pixels import decode, to_rgb, turn_of
from .walk import EXTENSIONS, scan_folders

__all__ = [
    'EXTENSIONS', 'FORMATS', 'Box', 'ImageFiles', 'ImageSource', 'UnreadableImage', 'decode', 'find_images',
    'holds_several', 'image_names', 'open_image', 'open_images', 'printable', 'read_image', 'read_list']

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image as read

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'JPEG2000', 'AVIF', 'HEIF')  # Pillow's names
_HEIC = ('.heic', '.heif', '.hif')
MAX_PIXELS = 178_956_970  # Pillow's own limit, twice its Image.MAX_IMAGE_PIXELS
_MAX_MEMORY = 1 << 31
# measured, with the conversion to RGB; of other formats at most 12, by a progressive JPEG file in CMYK
_BYTES_PER_PIXEL = {'AVIF': 16, 'HEIF': 16, 'JPEG2000': 24, 'WEBP': 16}


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


def open_image(
        file: str | os.PathLike | BinaryIO,
        max_pixels: int = MAX_PIXELS,
        size: int | None = None,
) -> Image.Image:
    """Open an image of one of `FORMATS` without decoding it.

    Args:
        file: A file, which has to be a regular one, or a binary file object.
        max_pixels: See `read_image`.
        size: See `read_image`.

    Raises:
        OSError: It is not such a file or image, or too large (or another of Pillow's errors).
    """
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


def read_image(
        file: str | os.PathLike | BinaryIO,
        exif: bool = True,
        max_pixels: int = MAX_PIXELS,
        size: int | None = None,
) -> Image.Image:
    """Read an image file of any mode as RGB, see `pixels`; of an animation, the first frame.

    Takes 8 bytes of memory per pixel, which Pillow's decoders of some formats exceed; at most 2 GiB in all.

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
                image.load()
                turn = turn_of(image) if exif else None
                rgb = to_rgb(image)
                # a copy: the file that the image was read from is closed
                rgb = rgb.copy() if rgb is image else rgb
        del image  # its pixels: turning takes memory again
        rgb = rgb if turn is None else rgb.transpose(turn)
        rgb.info = {}  # the orientation has been followed
        return rgb
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise whatever a broken file makes them raise
        raise UnreadableImage(f'{_name(file)}: {_reason(file, e)}') from e


def holds_several(path: str | os.PathLike) -> bool:
    """Whether an image file has pages or frames besides the one that `read_image` reads; False if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with open_image(path) as image:
                if image.format == 'MPO':  # most of them are a photograph with a preview or a gain map
                    return any('Multi-Frame' in entry['Attribute']['MPType'] for entry in image.mpinfo[0xB002])
                return bool(getattr(image, 'is_animated', False))
    except MemoryError:
        raise
    except Exception:  # as in read_image
        return False


def _name(file: str | os.PathLike | BinaryIO) -> str:
    name = getattr(file, 'name', None) if hasattr(file, 'read') else file
    return printable(name) if isinstance(name, (str, bytes, os.PathLike)) else 'image'


def _reason(file: str | os.PathLike | BinaryIO, error: Exception) -> str:
    path = None if hasattr(file, 'read') else os.fsdecode(file)
    if path is not None and os.path.isdir(path):
        return 'is a folder, not an image'
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, Image.UnidentifiedImageError):
        if path is not None and os.path.getsize(path) == 0:
            return 'is empty'
        if path is not None and path.lower().endswith(_HEIC) and 'HEIF' not in _formats():
            return 'HEIC takes a decoder: pip install pillow-heif'
        return f'is not an image in a format that is read here ({", ".join(_formats())})'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return ' '.join(str(error).split()) or type(error).__name__


class ImageSource:
    """Images by number.

    Attributes:
        names: Name of each image, str; bytes of file names that are not UTF-8 as os.fsdecode gives them.
        labels: Class of each image, or None.
        class_names: Names of the classes, or None.
    """
    names: Sequence[str] = ()
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int, exif: bool = True) -> Image.Image:
        """Image i as RGB.

        Raises:
            UnreadableImage: It cannot be read.
        """
        raise TypeError(f'{type(self).__name__} has to define load().')

    def box(self, i: int) -> Box | None:
        """Crop box of image i; None for the whole image."""
        return None

    def load_part(self, i: int, exif: bool = True) -> tuple[Image.Image, tuple[int, int]]:
        """The part of image i that is meant, and (width, height) of the whole image.

        Raises:
            UnreadableImage: The image cannot be read, or the part lies outside of it.
        """
        image, box = self.load(i, exif=exif), self.box(i)
        if box is None:
            return image, image.size
        if box[0] >= image.width or box[1] >= image.height or box[2] <= 0 or box[3] <= 0:
            raise UnreadableImage(
                f'{printable(self.names[i])}: box {box} is outside the image of {image.width} x {image.height}')
        return image.crop(box), image.size

    def fingerprint(self) -> str:
        """SHA-256 of what makes the list of images: names, in their order."""
        return hashlib.sha256(json.dumps(list(self.names)).encode('ascii')).hexdigest()


class ImageFiles(ImageSource):
    """Image files.

    Args:
        paths: Files; they are looked at when they are loaded.
        names: Name of each, the path by default.
        boxes: A part of each image for `load_part` to cut out, or None; fractions are rounded as PIL's crop does, what
            is outside the image is black.
        labels: Class of each.
        class_names: Names of the classes.

    Raises:
        ValueError: The lists are not of one length, or a box is empty.
    """

    def __init__(
            self,
            paths: Iterable[str | os.PathLike],
            names: Sequence[str] | None = None,
            boxes: Sequence[Box | None] | None = None,
            labels: Sequence[int] | None = None,
            class_names: Sequence[str] | None = None,
    ):
        self.paths = [os.fsdecode(path) for path in paths]
        self.names = self.paths if names is None else list(names)
        self.boxes = None if boxes is None else [None if box is None else _check_box(box) for box in boxes]
        self.labels = None if labels is None else list(labels)
        self.class_names = None if class_names is None else list(class_names)
        for what, values in (('names', self.names), ('boxes', self.boxes), ('labels', self.labels)):
            if values is not None and len(values) != len(self.paths):
                raise ValueError(f'{len(values)} {what} for {len(self.paths)} images: give one for each.')

    def load(self, i: int, exif: bool = True) -> Image.Image:
        return read_image(self.paths[i], exif=exif)

    def box(self, i: int) -> Box | None:
        return self.boxes[i] if self.boxes else None

    def fingerprint(self) -> str:
        if not any(self.boxes or ()):
            return super().fingerprint()
        return hashlib.sha256(json.dumps([self.names, self.boxes]).encode('ascii')).hexdigest()


def _check_box(box: Box) -> Box:
    left, top, right, bottom = box = tuple(float(side) for side in box)
    if not (np.isfinite(box).all() and round(right) > round(left) and round(bottom) > round(top)):
        raise ValueError(f'box {box} is empty: give left, top, right, bottom in pixels.')
    return box


def find_images(folder: str | os.PathLike) -> ImageFiles:
    """All image files below a folder, sorted, named by their path in it; see `image_names`.

    Raises:
        FileNotFoundError: Folder not found.
        ValueError: The folder has no images.
    """
    root = os.fsdecode(folder)
    names = image_names(root)
    if not names:
        raise ValueError(f'{printable(root)} holds no image files ({", ".join(sorted(EXTENSIONS))}).')
    return ImageFiles([os.path.join(root, name) for name in names], names)


def image_names(folder: str | os.PathLike) -> list[str]:
    """Paths of the image files below a folder as `scan_folders` finds them, relative, with '/', sorted.

    A link that leads nowhere is among them, for the reader to name.

    Raises:
        FileNotFoundError, NotADirectoryError: Not a folder.
        OSError: A subfolder cannot be opened.
    """
    root = os.fsencode(folder)
    scan = scan_folders([root])
    names = [file.path for file in scan.files]
    for path, reason in scan.unreadable.items():
        if not os.path.islink(path):
            raise OSError(f'{printable(path)}: {reason}.')
        if os.path.splitext(os.fsdecode(path))[1].lower() in EXTENSIONS:
            names.append(os.path.relpath(path, root))
    return sorted(os.fsdecode(name).replace(os.sep, '/') for name in names)


def read_list(path: str | os.PathLike) -> ImageFiles:
    """Images of a list file: one path per line (.txt) or a list of paths (.json), relative to the file's folder.

    Raises:
        ValueError: The list is empty, or not a list of paths.
    """
    path = Path(path)
    if path.suffix == '.json':
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{printable(path)} is not a JSON list of paths.')
    else:
        content = path.read_bytes()
        if b'\0' in content:
            raise ValueError(f'{printable(path)} is not a list of images: give a text file with one path per line.')
        names = [os.fsdecode(line.rstrip(b'\r')) for line in content.removeprefix(b'\xef\xbb\xbf').split(b'\n')]
        names = [name for name in names if name.strip()]
    if not names:
        raise ValueError(f'{printable(path)} lists no images: give one path per line.')
    return ImageFiles([os.path.join(path.parent, name) for name in names], names)


class DatasetImages(ImageSource):
    """A map-style data set of (image, class) pairs, such as timm's and torchvision's."""

    def __init__(self, dataset, name: str):
        self.dataset = dataset
        self.title = name
        try:
            self.names = list(dataset.filenames(basename=False))
        except (AttributeError, NotImplementedError):
            self.names = [f'{i:08d}' for i in range(len(dataset))]

    def load(self, i: int, exif: bool = True) -> Image.Image:
        try:
            # timm's own decoding knows no transparency
            reader = getattr(self.dataset, 'reader', None)
            return decode(self.dataset[i][0], exif) if reader is None else read_image(reader[i][0], exif)
        except Exception as e:  # whatever the data set's reader raises
            reason = ' '.join(str(e).split()) or type(e).__name__
            raise UnreadableImage(f'{self.title}, {printable(self.names[i])}: {reason}') from e

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.title, list(self.names)]).encode('ascii')).hexdigest()


def open_images(source: str | os.PathLike, split: str | None = None) -> ImageSource:
    """Images that a command line names.

    Args:
        source: A folder, a list file (.txt, .json; see `read_list`), an image file, or a data set of timm, 'NAME:DIR'
            such as 'torch/cifar10:DIR' or 'hfds/NAME'.
        split: Split of a data set of timm ('validation' by default), or a subfolder of the folder.

    Raises:
        FileNotFoundError: File or folder not found.
        ValueError: No images found.
    """
    text = os.fsdecode(source)
    if os.path.isdir(text):
        return find_images(os.path.join(text, split) if split else text)
    if os.path.isfile(text):
        if os.path.splitext(text)[1].lower() in EXTENSIONS:
            return ImageFiles([text])
        return read_list(text)
    if text.startswith(('torch/', 'hfds/', 'tfds/', 'wds/')):
        return _open_dataset(text, split or 'validation')
    raise FileNotFoundError(f'{printable(text)} is not a folder, a list of images or a data set of timm '
                            "such as 'torch/cifar10:DIR'.")


def _open_dataset(text: str, split: str) -> DatasetImages:
    from timm.data import create_dataset

    name, _, root = text.partition(':')
    dataset = create_dataset(name, root=root or None, split=split)
    if not hasattr(dataset, '__len__') or not hasattr(dataset, '__getitem__'):
        raise ValueError(f'{name} can only be read from beginning to end: give a data set with images by number.')
    return DatasetImages(dataset, f'{name} {split}')
