"""Images to embed: files in folders and lists, data sets of timm, and one careful way of reading them."""
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from timm_multigrain.data.transforms import to_rgb

__all__ = [
    'Box', 'ImageFiles', 'ImageSource', 'UnreadableImage', 'find_images', 'open_images', 'printable', 'read_image',
    'read_list']

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image as read

EXTENSIONS = frozenset({
    '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pnm', '.jp2',
    '.avif'})
MAX_PIXELS = 178_956_970  # Pillow's own limit, twice its Image.MAX_IMAGE_PIXELS


class UnreadableImage(ValueError):
    """An image that cannot be read. The message is 'PATH: reason'."""


def read_image(path: str | os.PathLike, exif: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file of any mode as RGB; of an animation, the first frame.

    Transparent parts become white, 16 bits are reduced to 8.

    Args:
        path: File.
        exif: Turn the image upright as its EXIF orientation says.
        max_pixels: Larger images are refused, by the size that their header states. Pillow refuses what is larger than
            twice its ``Image.MAX_IMAGE_PIXELS`` in any case.

    Raises:
        UnreadableImage: No such file, no image, a damaged or truncated one, or one that is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a large image is not yet a bomb; damaged EXIF is no reason to stop
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(f'{image.width} x {image.height} pixels are more than {max_pixels} in all')
                image.load()
                return _to_rgb(_upright(image) if exif else image)
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise whatever a broken file makes them raise
        raise UnreadableImage(f'{printable(path)}: {_reason(path, e)}') from e


def _reason(path: str | os.PathLike, error: Exception) -> str:
    if os.path.isdir(path):
        return 'is a folder, not an image'
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, Image.UnidentifiedImageError):
        return 'is empty' if os.path.getsize(path) == 0 else 'is no image in a format that Pillow reads'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return ' '.join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: the picture itself was read
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ('I', 'F') or image.mode.startswith('I;'):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert('RGB')
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    # a copy: the file that the image was read from is closed
    return image.copy() if image.mode == 'RGB' else to_rgb(image)


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits to uint8. Of modes that do not say their range, the values tell it."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    ranges = {'I': (255., 65535.), 'F': (1., 255., 65535.)}.get(mode, (65535.,))
    top = next((top for top in ranges if values.max() <= top), values.max())
    return (values.clip(0, top) * (255 / top)).round().astype(np.uint8)


def printable(name: str | os.PathLike) -> str:
    """A file name on one line in characters that every terminal and UTF-8 file can hold."""
    text = os.fsdecode(name).encode('utf-8', 'backslashreplace').decode('utf-8')
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text)


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
        """The part of image i that is meant; None for all of it."""
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


def find_images(folder: str | os.PathLike, classes: bool = False) -> ImageFiles:
    """All image files below a folder, sorted, named by their path in it. Hidden files and folders are left out.

    Args:
        folder: Folder; links are followed.
        classes: Take the folder's own subfolders as classes, in sorted order, and the images in them only.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no images.
    """
    root = os.fsdecode(folder)
    if not os.path.isdir(root):
        raise FileNotFoundError(f'{printable(root)} is no folder: name one that holds images.')
    names = sorted(os.path.relpath(path, root).replace(os.sep, '/') for path in _walk(root, set()))
    labels = class_names = None
    if classes:
        names = [name for name in names if '/' in name]
        class_names = sorted({name.partition('/')[0] for name in names})
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = [numbers[name.partition('/')[0]] for name in names]
    if not names:
        where = 'a folder for each class with images in it' if classes else 'image files'
        raise ValueError(f'{printable(root)} holds no {where} ({", ".join(sorted(EXTENSIONS))}).')
    return ImageFiles([os.path.join(root, name) for name in names], names, labels=labels, class_names=class_names)


def _walk(folder: str, above: set[str]) -> Iterable[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith('.'):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, above | {real})
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield entry.path


def read_list(path: str | os.PathLike) -> ImageFiles:
    """Images of a list file: a path a line (.txt) or a list of paths (.json), relative to the file's folder.

    Raises:
        ValueError: The list is empty or not readable as one.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == '.json':
        try:
            names = json.loads(content)
        except ValueError as e:
            raise ValueError(f'{printable(path)} is not JSON ({e}).') from e
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{printable(path)} is not a JSON list of paths.')
    else:
        if b'\0' in content:
            raise ValueError(f'{printable(path)} is not a list of images: give a text file with a path a line.')
        names = [os.fsdecode(line.rstrip(b'\r')) for line in content.removeprefix(b'\xef\xbb\xbf').split(b'\n')]
        names = [name for name in names if name.strip()]
    if not names:
        raise ValueError(f'{printable(path)} lists no images: give a path a line.')
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
            image = self.dataset[i][0]
            return _to_rgb(_upright(image) if exif else image)
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
        split: Part of a data set of timm ('validation' by default), or a subfolder of the folder.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: There are no images in it.
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
    raise FileNotFoundError(f'{printable(text)} is no folder of images, no list of images, and no data set of timm '
                            "such as 'torch/cifar10:DIR'.")


def _open_dataset(text: str, split: str) -> DatasetImages:
    from timm.data import create_dataset

    name, _, root = text.partition(':')
    dataset = create_dataset(name, root=root or None, split=split)
    if not hasattr(dataset, '__len__') or not hasattr(dataset, '__getitem__'):
        raise ValueError(f'{name} can only be read from beginning to end: give a data set with images by number.')
    return DatasetImages(dataset, f'{name} {split}')
