"""Images in a folder for each class, labelled with the classes of a model."""
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .sources import ImageFiles, find_images, printable
from .subset import Subset

__all__ = ['first_of_each', 'match_classes', 'open_classes']

_IMAGENET = {1000: 'imagenet-1k', 12000: 'imagenet-12k', 21841: 'imagenet-22k', 11221: 'imagenet-21k-miil'}
_SPLITS = {'train': ('train', 'training'), 'validation': ('val', 'validation', 'test')}


def open_classes(
        data: str | os.PathLike,
        model: torch.nn.Module,
        split: str | None = None,
        class_map: str | os.PathLike | None = None,
) -> Subset:
    """Images of a folder with a subfolder for each class.

    Args:
        data: The folder, or one that holds it as its 'train', 'val', 'validation' or 'test'.
        model: Model, whose classes the folders are matched with, see `match_classes`.
        split: 'train' or 'validation', whichever name it has in the folder, or the name of a subfolder. None: the
            folder itself.
        class_map: File as for `match_classes`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A class folder without images, or folders that do not match the model's classes.
    """
    root = _find_split(Path(os.fsdecode(data)), split)
    source = find_images(root, classes=True)
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.')}
    empty = sorted(folders - set(source.class_names))
    if empty:
        raise ValueError(f'{printable(root)}: {len(empty)} of {len(folders)} class folders hold no images, such as '
                         f'{printable(empty[0])}. Fill or remove them.')
    rows = match_classes(model, source.class_names, class_map)
    return Subset(source, range(len(source)), [rows[label] for label in source.labels])


def _find_split(root: Path, split: str | None) -> Path:
    if split is None or not root.is_dir():
        return root
    names = _SPLITS.get(split, (split,))
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None and split not in _SPLITS:
        raise FileNotFoundError(f'{printable(root)} has no subfolder {split}.')
    return found or root


def match_classes(
        model: torch.nn.Module,
        class_names: Sequence[str],
        class_map: str | os.PathLike | None = None,
) -> list[int]:
    """The row of the model's classifier for each class folder.

    The first of these that applies: the class map; the model's own label_names; WordNet ids ('n01440764') for a model
    of one of timm's ImageNets, of which the folders may be some; as many folders as classes, in sorted order, as timm's
    train.py counts them.

    Args:
        model: Model with a classifier.
        class_names: Names of the folders.
        class_map: Text file that names the folder of each row of the classifier, a line each.

    Raises:
        ValueError: A folder that is no class of the model, or nothing that says which class it is.
    """
    if not model.num_classes:
        raise ValueError('The model has no classifier (num_classes=0): classes cannot be told with it.')
    if class_map is not None:
        known, origin = _read_class_map(class_map, model.num_classes), f'class map {printable(class_map)}'
    else:
        known, origin = _known_names(model, class_names)
    if known is None:
        if len(class_names) == model.num_classes:
            return list(range(len(class_names)))
        raise ValueError(
            f'{len(class_names)} class folders ({_some(class_names)}) for a model of {model.num_classes} classes, and '
            'nothing says which they are: give a class map, a text file with the folder of each class, a line each.')
    unknown = [name for name in class_names if name not in known]
    if unknown:
        raise ValueError(f'{len(unknown)} of {len(class_names)} class folders, such as {printable(unknown[0])}, are no '
                         f'classes of the {origin} ({_some(list(known))}): give a class map, a text file with the '
                         'folder of each class, a line each.')
    return [known[name] for name in class_names]


def _known_names(model: torch.nn.Module, class_names: Sequence[str]) -> tuple[dict[str, int] | None, str]:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    names = cfg.get('label_names')
    if names:
        rows = {str(name): int(row) for row, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        if set(class_names) <= set(rows) or model.num_classes not in _IMAGENET:
            return rows, 'model'
    if model.num_classes in _IMAGENET and all(re.fullmatch(r'n\d{8}', name) for name in class_names):
        from timm.data import ImageNetInfo

        subset = _IMAGENET[model.num_classes]
        return {name: row for row, name in enumerate(ImageNetInfo(subset).label_names())}, subset
    return None, ''


def _read_class_map(path: str | os.PathLike, num_classes: int) -> dict[str, int]:
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f'{printable(path)} is no text file: give the folder of each class, a line each.') from e
    known = {line.strip(): row for row, line in enumerate(lines) if line.strip()}
    if max(known.values(), default=-1) + 1 != num_classes or len(known) != num_classes:
        raise ValueError(f'{printable(path)} names {len(known)} classes in {len(lines)} lines for a model of '
                         f'{num_classes}: give each its line.')
    return known


def _some(names: Sequence[str]) -> str:
    return ', '.join(printable(name) for name in names[:3]) + ', ...' * (len(names) > 3)


def first_of_each(source: ImageFiles | Subset, number: int) -> Subset:
    """The first ``number`` images of each class, by name."""
    if number < 1:
        raise ValueError(f'{number} images of each class: give at least 1.')
    taken, count = [], {}
    for i in sorted(range(len(source)), key=lambda i: source.names[i]):
        label = source.labels[i]
        count[label] = count.get(label, 0) + 1
        if count[label] <= number:
            taken.append(i)
    return Subset(source, sorted(taken))
