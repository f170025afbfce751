"""Images to embed: files in folders and lists, data sets of timm, and some of the images of another source; and lists
that say what is known of images."""
import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from timm_multigrain.files import check_json, counted, parse_json, printable, read_json, read_lines

from .pixels import UnreadableImage, decode, read_image
from .walk import EXTENSIONS, scan_folders

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image as read


class ImageSource:
    """Images by number.

    Attributes:
        names: Name of each image, str; bytes of file names that are not UTF-8 as os.fsdecode gives them.
        boxes: The part of each image that is meant, or None for the whole image.
        labels: Class of each image, or None.
        class_names: Names of the classes, or None.
        title: Name of a data set, whose images have names of no others.
    """
    names: Sequence[str] = ()
    boxes: Sequence[Box | None] | None = None
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    title: str = ''

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int, exif: bool = True) -> Image.Image:
        """Image i as RGB.

        Raises:
            UnreadableImage: It cannot be read.
        """
        raise NotImplementedError

    def load_part(self, i: int, exif: bool = True) -> tuple[Image.Image, tuple[int, int]]:
        """The part of image i that is meant, and (width, height) of the whole image.

        Raises:
            UnreadableImage: The image cannot be read, or the part lies outside of it.
        """
        image, box = self.load(i, exif=exif), self.boxes[i] if self.boxes else None
        if box is None:
            return image, image.size
        if box[0] >= image.width or box[1] >= image.height or box[2] <= 0 or box[3] <= 0:
            raise UnreadableImage(
                f'{printable(self.names[i])}: box {box} is outside the image of {image.width} x {image.height}')
        return image.crop(box), image.size

    def fingerprint(self) -> str:
        """SHA-256 of what makes the list of images: names and boxes, in their order."""
        content = [self.title, list(self.names), list(self.boxes) if any(self.boxes or ()) else None]
        return hashlib.sha256(json.dumps(content).encode('ascii')).hexdigest()


class ImageFiles(ImageSource):
    """Image files.

    Args:
        paths: Files; they are looked at when they are loaded.
        names: Name of each, the path by default.
        boxes: A part of each image for `load_part` to cut out, or None; fractions are rounded as PIL's crop does, what
            is outside the image is black.
        labels: Class of each.
        class_names: Names of the classes.
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
                raise ValueError(f'{len(values)} {what} for {counted(len(self.paths), "image")}: give one for each.')

    def load(self, i: int, exif: bool = True) -> Image.Image:
        return read_image(self.paths[i], exif=exif)


def _check_box(box: Box) -> Box:
    box = tuple(float(side) for side in box)
    if not (len(box) == 4 and np.isfinite(box).all()
            and all(round(a) < round(b) for a, b in zip(box[:2], box[2:], strict=True))):
        raise ValueError(f'box {box} is empty: give left, top, right, bottom in pixels.')
    return box


class Subset(ImageSource):
    """The images of these numbers, in this order.

    Args:
        indices: Numbers of those to take.
        labels: Class of each, those of the source by default.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], labels: Sequence[int] | None = None):
        def take(values):
            return None if values is None else [values[i] for i in self.indices]

        self.source, self.indices = source, list(indices)
        self.names, self.boxes = take(source.names), take(source.boxes)
        self.labels = take(source.labels) if labels is None else labels
        self.class_names, self.title = source.class_names, source.title

    def load(self, i: int, exif: bool = True) -> Image.Image:
        return self.source.load(self.indices[i], exif=exif)


class DatasetImages(ImageSource):
    """A map-style data set of (image, class) pairs, such as timm's and torchvision's."""

    def __init__(self, dataset, title: str):
        self.dataset, self.title = dataset, title
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
        return ImageFiles([text]) if os.path.splitext(text)[1].lower() in EXTENSIONS else read_list(text)
    if not text.startswith(('torch/', 'hfds/', 'tfds/', 'wds/')):
        raise FileNotFoundError(f'{printable(text)} is not a folder, a list of images or a data set of timm '
                                "such as 'torch/cifar10:DIR'.")
    from timm.data import create_dataset

    (name, _, root), split = text.partition(':'), split or 'validation'
    dataset = create_dataset(name, root=root or None, split=split)
    if not hasattr(dataset, '__len__') or not hasattr(dataset, '__getitem__'):
        raise ValueError(f'{name} can only be read from beginning to end: give a data set with images by number.')
    return DatasetImages(dataset, f'{name} {split}')


def find_images(folder: str | os.PathLike) -> ImageFiles:
    """All image files below a folder, sorted, named by their path in it; see `image_names`."""
    root = os.fsdecode(folder)
    names = image_names(root)
    if not names:
        raise ValueError(f'{printable(root)} holds no image files ({", ".join(sorted(EXTENSIONS))}).')
    return ImageFiles([os.path.join(root, name) for name in names], names)


def image_names(folder: str | os.PathLike) -> list[str]:
    """Paths of the image files below a folder as `scan_folders` finds them, relative, with '/', sorted.

    A link that leads nowhere is among them, for the reader to name.
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
    """Images of a list file: one path per line (.txt) or a list of paths (.json), relative to the file's folder."""
    path = Path(path)
    if path.suffix == '.json':
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{printable(path)} is not a JSON list of paths.')
    else:
        content = path.read_bytes()  # names need not be UTF-8
        if b'\0' in content:
            raise ValueError(f'{printable(path)} is not a list of images: give a text file with one path per line.')
        lines = content.removeprefix(b'\xef\xbb\xbf').split(b'\n')
        names = [os.fsdecode(line.rstrip(b'\r')) for line in lines if line.strip()]
    if not names:
        raise ValueError(f'{printable(path)} lists no images: give one path per line.')
    return ImageFiles([os.path.join(path.parent, name) for name in names], names)


class Entry(NamedTuple):
    """An image of a list: a CSV file with these names in its first line, or JSON lines with objects.

    Attributes:
        path: Of the image, below the folder; all else may be missing or empty.
        label: Class, for k-NN.
        instance: What a query has to find; by default its label.
        category: Kind of thing, which figures are given for and a search can be kept to.
        split: query, gallery or train.
        box: Left, top, right, bottom in pixels: the part of the image that is meant.
        relevant: As a query: paths in the gallery that it has to find; None for those of its instance or label.
        junk: Paths that are taken out of its ranking.
        easy: Those of `relevant` that are easy, of Revisited Oxford and Paris.
    """
    path: str
    label: str = ''
    instance: str = ''
    category: str = ''
    split: str = ''
    box: Box | None = None
    relevant: Collection[str] | None = None
    junk: Collection[str] = ()
    easy: Collection[str] = ()

    @property
    def wanted(self) -> str:
        """What a query of this image has to find."""
        return self.instance or self.label


COLUMNS = Entry._fields[:-3]  # of a list of one's own


def read_entries(path: str | os.PathLike) -> list[Entry]:
    """The images of a list.

    Raises:
        FileNotFoundError: List not found.
        ValueError: A line that cannot be read, without a path, or with a path that leads out of the folder.
    """
    path, entries = Path(path), []
    lines = [line.removeprefix('\ufeff') for line in read_lines(path, 'list of images')]
    rows = map(parse_json, lines) if path.suffix == '.jsonl' else csv.DictReader(lines, strict=True)
    try:
        for row in rows:
            entries.append(_entry(row))
    except (ValueError, csv.Error) as e:
        number = len(entries) + (1 if path.suffix == '.jsonl' else 2)
        raise ValueError(f'{printable(path)}, line {number}: {e}') from e
    if not entries:
        raise ValueError(f'{printable(path)} lists no images.')
    return entries


def _entry(row: dict) -> Entry:
    if isinstance(row, dict) and isinstance(row.get('box'), str):  # of a CSV file
        row = {**row, 'box': [float(side) for side in row['box'].split()] or None}
    check_json(row, {}, 'it')
    if unknown := sorted(map(str, set(row) - set(COLUMNS))):
        raise ValueError(f'{unknown[0]!r} is not a column of a list: {", ".join(COLUMNS)}.')
    check_json(row, {'path': object}, 'it')
    for name, value in row.items():
        check_json(value, {'path': str, 'box': ([float], None)}.get(name, (str, int, None)), name)
    texts = {name: '' if row.get(name) is None else str(row[name]).strip() for name in COLUMNS[:-1]}
    name = PurePosixPath(texts['path'])
    if not texts['path'] or name.is_absolute() or '..' in name.parts:
        raise ValueError(f'the path {texts["path"]!r} is not one of a file below the folder.')
    if texts['split'] not in ('', 'query', 'gallery', 'train', 'test'):
        raise ValueError(f'split is {texts["split"]!r}: give query, gallery, train or nothing.')
    box = row.get('box')
    if box and len(box) != 4:
        raise ValueError(f'box is {box}: give left, top, right and bottom.')
    return Entry(**{**texts, 'path': name.as_posix()}, box=tuple(box) if box else None)
