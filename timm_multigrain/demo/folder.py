"""The picture folder a demo runs on, looked through before anything is trained."""
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageDataset
from tqdm import tqdm

from timm_multigrain.images.labels import class_names
from timm_multigrain.images.sources import EXTENSIONS, UnreadableImage, image_names, read_image

__all__ = ['PictureFolder', 'open_folder']

_LAYOUT = 'The demo takes a folder with train/<class>/<picture> and val/<class>/<picture>.'


@dataclass(frozen=True)
class PictureFolder:
    """Training and held-out pictures.

    Attributes:
        root: Folder with train/ and val/.
        train: Training pictures, timm's dataset without a transform.
        val: Held-out pictures of the same classes.
        class_names: Name of each class number.
    """
    root: Path
    train: ImageDataset
    val: ImageDataset
    class_names: tuple[str, ...]

    def path(self, index: int) -> Path:
        """File of a held-out picture."""
        return Path(self.val.filename(index, absolute=True))


def open_folder(root: str | Path) -> PictureFolder:
    """Open an image folder and decode every picture once, so that training cannot stumble over one.

    Raises:
        FileNotFoundError: The folder, train/ or val/ is missing.
        ValueError: No pictures, fewer than two classes, classes that differ between the splits, or a broken picture.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f'There is no folder {root}. {_LAYOUT}')
    for split in ('train', 'val'):
        if not (root / split).is_dir():
            raise FileNotFoundError(f'{root} has no folder {split}/. {_LAYOUT}')
    classes = _classes(root / 'train')
    if len(classes) < 2:
        raise ValueError(f'{root / "train"} holds {len(classes)} class folders with pictures in them '
                         f'({", ".join(classes) or "none"}), at least 2 are needed. {_LAYOUT}')
    other = set(_classes(root / 'val')) ^ set(classes)
    if other:
        names = ', '.join(class_names(other))
        raise ValueError(f'The class folders with pictures differ between train/ and val/: {names} is in one of them '
                         f'only. {_LAYOUT}')
    class_map = {name: i for i, name in enumerate(classes)}
    options = {'class_map': class_map, 'input_key': ';'.join(sorted(EXTENSIONS))}  # of itself it reads three of them
    train, val = (ImageDataset(str(root / split), **options) for split in ('train', 'val'))
    for dataset in (train, val):
        _check_pictures(dataset)
    return PictureFolder(root, train, val, tuple(classes))


def _classes(split: Path) -> list[str]:
    return class_names(name.split('/')[-2] for name in image_names(split) if '/' in name)


def _check_pictures(dataset: ImageDataset) -> None:
    for index in tqdm(range(len(dataset)), desc='Checking pictures', unit='picture', leave=False, disable=None):
        path = dataset.filename(index, absolute=True)
        try:
            read_image(path)
        except UnreadableImage as e:
            raise ValueError(f'{e}: replace this picture or take it out.') from e
