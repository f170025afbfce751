"""Classes of images: their order, their names, images in a folder for each of them, the rows of a classifier."""
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from timm_multigrain.files import check_json, counted, printable, read_json, read_lines, write_text

from .sources import ImageFiles, Subset, find_images

NAMES_FILE = 'class_names.json'
_IMAGENET = {1000: 'imagenet-1k', 12000: 'imagenet-12k', 21841: 'imagenet-22k', 11221: 'imagenet-21k-miil'}
_SPLITS = {'train': ('train', 'training'), 'validation': ('val', 'validation', 'test')}
_GIVE_MAP = 'give a class map, a text file with the folder of each class, one per line.'


def class_names(folders: Iterable[str]) -> list[str]:
    """Names of the classes, each once, in the order in which timm counts them: 1, 2, 10, and A beside a.

    Names that are equal in timm's order (A and a, 1 and 01) have no fixed order there; here they are sorted.
    """
    return sorted(set(folders), key=lambda name: (_timm_order(name), name))


def _timm_order(name: str) -> list[str | int]:
    return [int(text) if i % 2 else text for i, text in enumerate(re.split(r'(\d+)', name.lower()))]


def write_class_names(folder: str | os.PathLike, names: Sequence[str]) -> Path:
    """Write the names of the classes of the checkpoints in a folder, in the order of the classifier's rows."""
    return write_text(Path(folder) / NAMES_FILE, json.dumps(list(names), indent=1) + '\n')


def read_class_names(checkpoint_path: str | os.PathLike) -> list[str] | None:
    """What `write_class_names` has written beside a checkpoint, or in a folder; None if not found."""
    path = Path(checkpoint_path)
    path = (path if path.is_dir() else path.parent) / NAMES_FILE
    if not path.is_file():
        return None
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{printable(path)} is not a JSON list of names: remove it or name the classes in it.')
    return names


def find_classes(folder: str | os.PathLike) -> ImageFiles:
    """All image files below a folder, labelled as timm labels them: with the name of the folder that each is in.

    Images right in `folder` and not in one of a class are left out. ValueError if no others are there.
    """
    names = [name for name in find_images(folder).names if '/' in name]
    if not names:
        raise ValueError(f'{printable(folder)} has no folders of classes with images in them.')
    return _labelled(folder, names, -2)


def _labelled(folder: str | os.PathLike, names: Sequence[str], part: int) -> ImageFiles:
    """Files of these names below a folder, each of the class that this part of its name says."""
    of_each = [name.split('/')[part] for name in names]
    classes = class_names(of_each)
    numbers = {name: number for number, name in enumerate(classes)}
    paths = [os.path.join(os.fsdecode(folder), name) for name in names]
    return ImageFiles(paths, names, labels=[numbers[name] for name in of_each], class_names=classes)


def open_classes(
        data: str | os.PathLike,
        model: torch.nn.Module,
        split: str | None = None,
        class_map: str | os.PathLike | None = None,
) -> Subset:
    """Images of a folder with a subfolder for each class, labelled with the rows of a model's classifier.

    The folders that images are in are the classes; or the first folders, if only these match the model.

    Args:
        data: The folder, or one that holds it as its 'train', 'val', 'validation' or 'test'.
        model: Model, whose classes the folders are matched with, see `match_classes`.
        split: 'train' or 'validation', whichever name it has in the folder, or the name of a subfolder. None: the
            folder itself.
        class_map: File as for `match_classes`.

    Raises:
        FileNotFoundError: Folder not found.
        ValueError: A class folder without images, or folders that do not match the model's classes.
    """
    root = Path(os.fsdecode(data))
    if split is not None and root.is_dir():
        found = [root / name for name in _SPLITS.get(split, (split,)) if (root / name).is_dir()]
        if not found and split not in _SPLITS:
            raise FileNotFoundError(f'{printable(root)} has no subfolder {split}.')
        root = found[0] if found else root
    source = find_classes(root)
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.')}
    empty = class_names(folders - {name.partition('/')[0] for name in source.names})
    if empty:
        raise ValueError(f'{printable(root)}: {len(empty)} of {len(folders)} class folders hold no images, such as '
                         f'{printable(empty[0])}. Fill or remove them.')
    try:
        rows = match_classes(model, source.class_names, class_map)
    except ValueError:
        source, rows = _labelled(root, source.names, 0), None
        with suppress(ValueError):
            rows = match_classes(model, source.class_names, class_map)
        if rows is None:
            raise
    return Subset(source, range(len(source)), [rows[label] for label in source.labels])


def match_classes(
        model: torch.nn.Module,
        folders: Sequence[str],
        class_map: str | os.PathLike | None = None,
) -> list[int]:
    """The row of the model's classifier for each class folder.

    The first of these that applies: the class map; the model's own label_names; WordNet ids ('n01440764') for a model
    of one of timm's ImageNets, of which the folders may be some; as many folders as classes, in the order of
    `class_names`, as timm's train.py counts them.

    Args:
        model: Model with a classifier.
        folders: Names of the folders.
        class_map: Text file that names the folder of each row of the classifier, one per line.
    """
    if not model.num_classes:
        raise ValueError('The model has no classifier (num_classes=0): it cannot predict classes.')
    if class_map is not None:
        known, origin = _read_class_map(class_map, model.num_classes), f'class map {printable(class_map)}'
    else:
        known, origin = _known_names(model, folders)
    if known is None and len(folders) != model.num_classes:
        raise ValueError(f'{counted(len(folders), "class folder")} ({_some(folders)}) for a model of '
                         f'{model.num_classes} classes, and nothing says which they are: {_GIVE_MAP}')
    if known is None:
        known = _by_order(folders)
    unknown = [name for name in folders if name not in known]
    if unknown:
        raise ValueError(f'{len(unknown)} of {len(folders)} class folders, such as {printable(unknown[0])}, are not '
                         f'classes of the {origin} ({_some(list(known))}): {_GIVE_MAP}')
    return [known[name] for name in folders]


def _by_order(names: Sequence[str]) -> dict[str, int]:
    first = {}
    for name in names:
        same = first.setdefault(tuple(_timm_order(name)), name)
        if same != name:
            raise ValueError(f'timm has no fixed order of the classes {printable(same)} and {printable(name)}: rename '
                             f'one before training, or {_GIVE_MAP}')
    return {name: row for row, name in enumerate(class_names(names))}


def _known_names(model: torch.nn.Module, folders: Sequence[str]) -> tuple[dict[str, int] | None, str]:
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if names:
        check_json(list(names) if isinstance(names, tuple) else names, ([object], {}), 'label_names of the model')
        names = {str(row): name for row, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        check_json(names, {str: str}, 'label_names of the model')
        rows = {name: int(row) for row, name in names.items()}
        if set(folders) <= set(rows) or model.num_classes not in _IMAGENET:
            return rows, 'model'
    if model.num_classes in _IMAGENET and all(re.fullmatch(r'n\d{8}', name) for name in folders):
        from timm.data import ImageNetInfo

        subset = _IMAGENET[model.num_classes]
        return {name: row for row, name in enumerate(ImageNetInfo(subset).label_names())}, subset
    return None, ''


def _read_class_map(path: str | os.PathLike, num_classes: int) -> dict[str, int]:
    lines = read_lines(path, 'class map')
    known = {line: row for row, line in enumerate(lines)}
    if not len(known) == len(lines) == num_classes:
        raise ValueError(f'{printable(path)} names {len(known)} classes in {len(lines)} lines for a model of '
                         f'{num_classes}: give each its line.')
    return known


def _some(names: Sequence[str]) -> str:
    return ', '.join(map(printable, names[:3])) + ', ...' * (len(names) > 3)


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
