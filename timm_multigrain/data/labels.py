"""Which images of a training set show the same instance: copies, a folder, a class, or what a CSV file says."""
import copy
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, Subset

from timm_multigrain.files import counted, printable, read_lines
from timm_multigrain.images.labels import class_names

INSTANCES = 'copy', 'folder', 'class'


def label_instances(
        dataset: Any,
        instances: str | os.PathLike | Sequence[int],
        classes: Mapping[str, int] | None = None,
        is_training: bool = True,
) -> tuple[Any, np.ndarray | None]:
    """The dataset and the instance of each of its images, (N,) int64; None where each image is its own.

    - 'copy': Each image is an instance, its augmented copies are its positives.
    - 'class': The images of a class are one.
    - 'folder': Those of a folder are, in the layout class/instance/image below the dataset's root. The class is then
      the first folder, and the dataset given back is a copy with these classes. Beside the training, class/image will
      do, too, where the class is the instance.
    - A CSV file with lines of path (relative to the root), class and instance, all images in it. Classes as for
      'folder'. Beside the training, where the file does not name the images, the same as 'folder'.
    - Integers, one for each image.

    Args:
        dataset: For 'folder' and a CSV file timm's ImageDataset of a folder or torchvision's ImageFolder; for 'class'
            one of these, of those with `targets`, or a Subset or ConcatDataset of them.
        instances: What makes an instance.
        classes: Numbers of the classes for 'folder' and a CSV file; by default in timm's order of their names.
        is_training: False for validation.

    Raises:
        FileNotFoundError: CSV file not found.
        ValueError: A dataset whose paths or classes are not in reach, or one that does not fit the layout or file.
    """
    if not isinstance(instances, (str, os.PathLike)):
        numbers = np.asarray(instances)
        if numbers.shape != (len(dataset),) or numbers.dtype.kind not in 'iu':
            raise ValueError(f'instances are {numbers.dtype} of shape {numbers.shape}, and the dataset has '
                             f'{len(dataset)} images: give one integer for each')
        return dataset, numbers.astype(np.int64)
    if instances == 'copy':
        return dataset, None
    if instances == 'class':
        return dataset, np.asarray(_classes(dataset), np.int64)
    names = _names(dataset)
    if is_training and instances != 'folder':
        rows = _read(instances, names)
        labels = [rows[name][0] for name in names]
        members = [rows[name] for name in names]  # two classes may use the same word for an instance
    else:
        labels = [name.split('/')[0] for name in names]
        members = [name.rpartition('/')[0] for name in names]
        loose = [name for name in names if name.count('/') < (2 if is_training else 1)]
        if loose:
            raise ValueError(
                f'{len(loose)} of {len(names)} images, such as {printable(loose[0])}, are not in folders '
                'class/instance/image: move them, or take "class" as instances, or a CSV file')
    numbers = {key: number for number, key in enumerate(dict.fromkeys(members))}
    return _with_classes(dataset, labels, classes), np.array([numbers[key] for key in members], np.int64)


def _folder(dataset: Any) -> Any:
    """What holds root and samples: timm's reader, or torchvision's dataset itself."""
    return dataset.reader if isinstance(dataset, ImageDataset) else dataset


def _classes(dataset: Any) -> Sequence[int]:
    if isinstance(dataset, Subset):
        labels = _classes(dataset.dataset)
        return [labels[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [label for inner in dataset.datasets for label in _classes(inner)]
    if hasattr(dataset, 'targets'):
        return dataset.targets
    samples = getattr(_folder(dataset), 'samples', None)
    if samples is None:
        raise ValueError(f'the classes of this {type(dataset).__name__} are not known before it is read: give one '
                         'integer for each image as instances, or a folder of images')
    return [label for _, label in samples]


def _names(dataset: Any) -> list[str]:
    """Paths of the images below the root, with slashes."""
    folder = _folder(dataset)
    samples = getattr(folder, 'samples', None)
    if not samples or not isinstance(samples[0][0], str) or not hasattr(folder, 'root'):
        raise ValueError(f'the files of this {type(dataset).__name__} are not in a folder of images: give '
                         'ImageDataset of timm or an ImageFolder, or "copy" or "class" as instances')
    return [PurePath(os.path.relpath(path, folder.root)).as_posix() for path, _ in samples]


def _with_classes(dataset: Any, labels: Sequence[str], numbers: Mapping[str, int] | None) -> Any:
    """A copy of the dataset with classes of these names."""
    numbers = numbers or {name: number for number, name in enumerate(class_names(labels))}
    unknown = class_names(set(labels) - set(numbers))
    if unknown:
        raise ValueError(f'the class {printable(unknown[0])} is not one of the {len(numbers)} classes '
                         f'{", ".join(map(printable, list(numbers)[:3]))}, ...: name the same classes everywhere')
    folder = copy.copy(_folder(dataset))
    folder.samples = [(path, numbers[label]) for (path, _), label in zip(folder.samples, labels, strict=True)]
    folder.class_to_idx = dict(numbers)
    if not isinstance(dataset, ImageDataset):
        folder.imgs, folder.targets = folder.samples, [label for _, label in folder.samples]
        folder.classes = list(numbers)
        return folder
    dataset = copy.copy(dataset)
    dataset.reader = folder
    return dataset


def _read(path: str | os.PathLike, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Class and instance of each image."""
    shown, rows = printable(path), {}
    for number, line in enumerate(read_lines(path, 'instances'), 1):
        try:
            row = [field.strip() for field in next(csv.reader([line.removeprefix('\ufeff')], strict=True))]
        except csv.Error as e:
            raise ValueError(f'{shown}, line {number}: {e}') from None
        if number == 1 and row == ['path', 'class', 'instance']:
            continue
        if len(row) != 3 or not all(row):
            raise ValueError(f'{shown}, line {number}: give path,class,instance, not {printable(line[:100])!r}')
        name = PurePath(row[0]).as_posix()
        if rows.setdefault(name, (row[1], row[2])) != (row[1], row[2]):
            raise ValueError(f'{shown}, line {number}: {printable(name)} has another class or instance above')
    known = set(names)
    for group, what in ((rows.keys() - known, 'are not in the training folder'),
                        (known - rows.keys(), 'of the training folder are not in it')):
        if group:
            raise ValueError(f'{shown}: {counted(len(group), "image")}, such as {printable(min(group))}, {what}')
    return rows
