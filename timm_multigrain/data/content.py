"""Datasets that hand the content of an image file to their transform, for `TensorTransform` to decode."""
import copy
from pathlib import Path

from timm.data import ImageDataset
from torch.utils.data import Dataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

_READS = ImageDataset.__getitem__, DatasetFolder.__getitem__


def innermost(dataset: Dataset) -> Dataset:
    """The dataset that torch's Subsets choose from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def applies_transform(dataset: Dataset) -> bool:
    """Whether the innermost dataset is timm's ImageDataset or a folder of torchvision and reads as these do."""
    return getattr(type(innermost(dataset)), '__getitem__', None) in _READS


def only_transforms_draw(dataset: Dataset) -> bool:
    """Whether reading is known to draw no random numbers but in `transform` and, after it, `target_transform`."""
    base = innermost(dataset)
    if not applies_transform(base):
        return False
    if isinstance(base, ImageDataset):
        return type(base.reader).__module__.startswith('timm.')
    return base.loader in _LOADERS


def with_content(dataset: Dataset) -> Dataset:
    """A shallow copy of a dataset whose transform gets the bytes of the image's file.

    Args:
        dataset: timm's ImageDataset (a folder, a tar or hfds), torchvision's ImageFolder, or a Subset of one.

    Raises:
        ValueError: Another dataset, or one that does more than to read RGB images.
    """
    dataset = copy.copy(dataset)
    if isinstance(dataset, Subset):
        dataset.dataset = with_content(dataset.dataset)
        return dataset
    if not applies_transform(dataset):
        raise ValueError(
            f'the fast loader cannot get at the files of {type(dataset).__name__}: give an ImageDataset of timm, an '
            'ImageFolder or a Subset of one, or leave fast out')
    if isinstance(dataset, ImageDataset):
        if dataset.input_img_mode != 'RGB':
            raise ValueError(
                f'the fast loader reads RGB, and input_img_mode is {dataset.input_img_mode!r}: leave fast out')
        dataset.load_bytes = True
    else:
        if dataset.loader not in _LOADERS:
            raise ValueError(
                "the fast loader decodes files itself, and this folder has a loader of its own: give torchvision's, or "
                'leave fast out')
        dataset.loader = read_bytes
    return dataset


def read_bytes(path: str) -> bytes:
    """Content of a file."""
    return Path(path).read_bytes()


_LOADERS = default_loader, pil_loader, read_bytes
