"""The demo's picture collection: drawn JPEG files in the ImageFolder layout `{train,val}/<class>/<name>.jpg`."""
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .pictures import CLASSES, draw_picture

__all__ = ['make_collection']

MANIFEST = 'collection.json'
DRAWING_VERSION = 1  # raise it when the same settings draw other pictures


def make_collection(
        root: str | os.PathLike,
        num_classes: int = 8,
        train_per_class: int = 100,
        val_per_class: int = 25,
        size: int = 112,
        seed: int = 0,
) -> Path:
    """Draw the collection, or reuse the one that is there.

    The pictures depend on the settings alone. The folder appears under its name only when it is complete; a complete
    one made with the same settings is returned as it is.

    Args:
        root: Folder to make; must not exist, be empty, or hold this very collection.
        num_classes: Kinds of object, 2 to 10.
        train_per_class: Training pictures of each class.
        val_per_class: Held-out pictures of each class.
        size: Side of the pictures in pixels, at least 16.
        seed: Another seed gives other pictures of the same classes.

    Returns:
        The folder, with `train` and `val` in it.

    Raises:
        ValueError: If a setting is out of range, or the folder holds anything else than this collection, complete.
    """
    settings = {
        'drawing_version': DRAWING_VERSION, 'num_classes': num_classes, 'train_per_class': train_per_class,
        'val_per_class': val_per_class, 'size': size, 'seed': seed,
    }
    lowest = {'num_classes': 2, 'train_per_class': 1, 'val_per_class': 1, 'size': 16, 'seed': 0}
    for name, least in lowest.items():
        if settings[name] < least:
            raise ValueError(f'{name} must be at least {least}, got {settings[name]}.')
    if num_classes > len(CLASSES):
        raise ValueError(f'num_classes must be at most {len(CLASSES)}, got {num_classes}.')
    root = Path(root).resolve()
    if _check_existing(root, settings):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.parent / f'.{root.name}-{uuid.uuid4().hex[:8]}'
    try:
        _draw_all(unfinished, settings)
        _publish(unfinished, root, settings)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _pictures(settings: dict) -> Iterator[tuple[Path, str, list[int]]]:
    """Path below the root, class and seed of every picture."""
    for split, name in enumerate(('train', 'val')):
        for label, kind in enumerate(list(CLASSES)[:settings['num_classes']]):
            for i in range(settings[f'{name}_per_class']):
                yield Path(name, kind, f'{kind}_{i:04d}.jpg'), kind, [settings['seed'], split, label, i]


def _draw_all(root: Path, settings: dict) -> None:
    for path, kind, seed in tqdm(list(_pictures(settings)), desc='Drawing pictures', unit='picture', disable=None):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        picture = draw_picture(kind, settings['size'], rng)
        picture.save(root / path, quality=int(rng.integers(80, 96)))
    with open(root / MANIFEST, 'w', encoding='utf-8') as file:
        json.dump(settings, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _publish(unfinished: Path, root: Path, settings: dict) -> None:
    try:
        if root.is_dir():
            root.rmdir()  # refuses a folder that is not empty; os.rename cannot replace one everywhere
        os.rename(unfinished, root)
    except OSError:
        if not _check_existing(root, settings):  # another process may have finished the same collection first
            raise


def _check_existing(root: Path, settings: dict) -> bool:
    """True if the collection is there, False if the place is free, ValueError if something else is there."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = 'Delete it, or name another folder.'
    try:
        found = json.loads((root / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise ValueError(f'{root} exists and is not a collection made by this demo. {remedy}') from None
    if found != settings:
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if settings.get(name) != value}
        raise ValueError(f'{root} holds a collection made with other settings ({found}). {remedy}')
    for path, _, _ in _pictures(settings):
        if not (root / path).is_file() or not (root / path).stat().st_size:
            raise ValueError(f'{root} holds a damaged collection: {path} is missing or empty. {remedy}')
    return True
