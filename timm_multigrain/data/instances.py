"""Any map-style dataset, with its image files decoded as every command decodes them, the unreadable ones skipped, and
instance ids beside the classes.

Berman et al., "MultiGrain", arXiv 1902.05509, section 3: the instance label of a sample is the image it was augmented
from, so that the positives of the margin loss come without any annotation.
"""
import copy
import logging
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision.datasets import DatasetFolder, VisionDataset
from torchvision.datasets.folder import default_loader, pil_loader
from torchvision.datasets.vision import StandardTransform

from timm_multigrain.files import open_regular, printable
from timm_multigrain.images.pixels import UnreadableImage, open_image, read_image

from .fast import TensorTransform
from .fast import decode as decode_tensor

_logger = logging.getLogger(__name__)

WAYS = ('multigrain', 'timm')
MAX_UNREADABLE = 10  # in a row, as timm's ImageDataset
_READ_ERRORS = (UnreadableImage, OSError, SyntaxError, EOFError, Image.DecompressionBombError)


class DecodedDataset(Dataset):
    """A map-style dataset of (image, class) pairs, which itself is never changed.

    Image files of timm's ImageDataset, torchvision's ImageFolder, and torch's Subset and ConcatDataset of these are
    decoded here: upright by their EXIF orientation, transparent parts on a ground, 16 bits reduced to 8. Any other
    dataset gives what it decodes itself.

    Setting `transform` sets that of shallow copies of the dataset and of those it wraps. To images of Pillow from a
    dataset without an attribute `transform` it is applied here. All other attributes are read from the dataset.

    An image that cannot be read is skipped: logged once, and the next one stands in for it, as in timm's ImageDataset.

    Args:
        dataset: timm's ImageDataset, torchvision's ImageFolder or any other map-style dataset of pairs.
        decode: 'multigrain' (see above), or 'timm': Pillow's conversion to RGB (or the dataset's `input_img_mode`).
        strict: An image that cannot be read is an error.
        fast: Decode to tensors, and make a `TensorTransform` of the transform that is set.

    Raises:
        ValueError: Iterable dataset, unknown `decode`, or with `fast` a dataset whose files are not in reach or are not
            read as RGB; while reading, a sample that is not a pair.
        UnreadableImage: While reading, with `strict` or after 10 images in a row that cannot be read.
    """

    def __init__(self, dataset: Dataset, decode: str = 'multigrain', strict: bool = False, fast: bool = False):
        map_style = hasattr(dataset, '__getitem__') and hasattr(dataset, '__len__')
        if isinstance(dataset, IterableDataset) or not map_style:
            raise ValueError(
                f'{type(dataset).__name__} is not read by index, which repeated augmentation needs: give a map-style '
                'dataset, such as an image folder, an image tar or the "hfds/" reader of timm')
        if decode not in WAYS:
            raise ValueError(f'decode is {decode!r}: give one of {", ".join(WAYS)}')
        self.dataset = dataset.dataset if isinstance(dataset, DecodedDataset) else dataset
        if fast:
            _check_fast(self.dataset)
        self.decode = decode
        self.strict = strict
        self.fast = fast
        self._own_transform = None
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # one for all workers

    def __getattr__(self, name: str) -> Any:
        # protocols such as pickle probe for dunder methods, on half-made objects too
        if name.startswith('__') or 'dataset' not in self.__dict__:
            raise AttributeError(f'{type(self).__name__} has no attribute {name}')
        return getattr(self.dataset, name)

    @property
    def transform(self) -> Callable | None:
        """The transform that was set here, or the dataset's own."""
        return self.dataset.transform if self._own_transform is None else self._own_transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        if self.fast and transform is not None and not isinstance(transform, TensorTransform):
            transform = TensorTransform(transform)
        self._own_transform = transform
        self.dataset = _with_transform(self.dataset, transform)

    def with_transform(self, transform: Callable) -> 'DecodedDataset':
        """A shallow copy with another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    @property
    def skipped(self) -> list[int]:
        """Images found unreadable so far, in all worker processes of this one."""
        return self._unreadable.nonzero().flatten().tolist()

    def name(self, index: int) -> str:
        """File name of an image, as far as it is known."""
        dataset, index = _find(self.dataset, index)
        try:
            if hasattr(dataset, 'filename'):
                return printable(dataset.filename(index, absolute=True))
            return printable(dataset.samples[index][0])
        except Exception:
            return f'of {type(dataset).__name__}, file name unknown'

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return next(self.read(index, 1)[1])

    def read(self, index: int, repeats: int) -> tuple[int, Iterator[tuple[Any, Any]]]:
        """Augmented samples of one image, which is decoded once if it is decoded here.

        Returns:
            The image's index, another one where that image cannot be read, and `repeats` samples.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} images')
        index = operator.index(index) % len(self)
        for _ in range(MAX_UNREADABLE):
            dataset, inner = _find(self.dataset, index)
            try:
                if _reads_files(dataset):
                    return index, _augment(dataset, *self._decode(dataset, inner), repeats)
                samples = [_pair(dataset, inner) for _ in range(repeats)]
                return index, (self._finish(dataset, *sample) for sample in samples)
            except _READ_ERRORS as error:
                name = self.name(index)
                reason = str(error).removeprefix(f'{name}: ').removeprefix('image: ')  # of read_image
                if self.strict:
                    raise UnreadableImage(f'image {index} ({name}) cannot be read: {reason}; replace the file or take '
                                          'it out of the dataset') from error
                if not self._unreadable[index]:
                    self._unreadable[index] = True
                    _logger.warning(f'Skipped image {index} ({name}), the next one stands in for it: {reason}')
                index = (index + 1) % len(self)
        raise UnreadableImage(f'{MAX_UNREADABLE} images in a row cannot be read, the last of them {name}: {reason}')

    def _decode(self, dataset: ImageDataset | DatasetFolder, index: int) -> tuple[Image.Image | torch.Tensor, Any]:
        timms = isinstance(dataset, ImageDataset)
        if timms and type(dataset.reader) is not ReaderImageFolder:
            file, target = dataset.reader[index]
        else:  # a path: opened here, as regular files only
            file, target = (dataset.reader if timms else dataset).samples[index]
        if self.fast:
            with nullcontext(file) if hasattr(file, 'read') else open_regular(file, follow_links=True) as opened:
                return decode_tensor(opened.read(), self.decode), target
        mode = dataset.input_img_mode if timms else 'RGB'
        image = open_image(file).convert(mode) if self.decode == 'timm' else read_image(file)
        return image if image.mode == mode else image.convert(mode), target

    def _finish(self, dataset: Dataset, image: Any, target: Any) -> tuple[Any, Any]:
        if isinstance(image, Image.Image) and self._own_transform is not None and not hasattr(dataset, 'transform'):
            image = self._own_transform(image)
        return image, target


class InstanceDataset(DecodedDataset):
    """A map-style (image, class) dataset whose targets become [class, instance id].

    `dataset[i]` gives (image, int64 tensor [class, instance]). A DataLoader fetches through `__getitems__`, which
    decodes an image once for consecutive equal indices (see `RepeatedAugSampler`) and applies the transforms once for
    each of them: for timm's ImageDataset and torchvision's ImageFolder, whose transforms are all that draws random
    numbers, that equals as many separate reads; other datasets are read as often as an index is asked for.

    Where an image cannot be read, all its copies are copies of the next image, under the id of that one.

    Args:
        dataset: As of `DecodedDataset`, also `decode`, `strict`, `fast` and the errors.
        instances: Instance ids of the images, (N,) integers; by default each image has its index.

    Raises:
        ValueError: While reading, a target that is not a class number.
    """

    def __init__(self, dataset: Dataset, decode: str = 'multigrain', strict: bool = False, fast: bool = False,
                 instances: Sequence[int] | None = None):
        super().__init__(dataset, decode, strict, fast)
        self.instances = instances

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, torch.Tensor]]:
        samples = []
        for index, group in groupby(indices):
            index, pairs = self.read(index, sum(1 for _ in group))
            instance = index if self.instances is None else int(self.instances[index])
            samples += [(image, torch.tensor([_class_number(target, index), instance])) for image, target in pairs]
        return samples


def _class_number(target: Any, index: int) -> int:
    try:
        if getattr(target, 'ndim', 0):
            raise TypeError
        return operator.index(target)
    except TypeError:
        raise ValueError(
            f'the target of image {index} is {target!r}: give one integer class for each image (multi-label, soft and '
            'float targets do not go with repeated augmentation)') from None


def _augment(dataset: ImageDataset | DatasetFolder, image: Image.Image | torch.Tensor, target: Any,
             repeats: int) -> Iterator[tuple[Any, Any]]:
    missing = target is None and isinstance(dataset, ImageDataset)  # timm's way: no class is -1
    for _ in range(repeats):
        sample, label = image, -1 if missing else target
        if dataset.transform is not None:
            # a transform may draw into its image
            sample = dataset.transform(image.copy() if isinstance(image, Image.Image) else image)
        if dataset.target_transform is not None and not missing:
            label = dataset.target_transform(target)
        yield sample, label


def _pair(dataset: Dataset, index: int) -> tuple[Any, Any]:
    sample = dataset[index]
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise ValueError(f'sample {index} of {type(dataset).__name__} is not an (image, class) pair: give a dataset of '
                         'pairs, without additional features')
    return tuple(sample)


def _reads_files(dataset: Any) -> bool:
    """Whether a dataset is known to decode an image file, to apply its transforms to that, and to do nothing else."""
    read = getattr(type(dataset), '__getitem__', None)
    if read is ImageDataset.__getitem__:
        return bool(dataset.input_img_mode) and not dataset.load_bytes and dataset.additional_features is None
    return read is DatasetFolder.__getitem__ and dataset.loader in (default_loader, pil_loader)


def _check_fast(dataset: Any) -> None:
    if _wraps(dataset, Subset):
        _check_fast(dataset.dataset)
    elif _wraps(dataset, ConcatDataset):
        for inner in dataset.datasets:
            _check_fast(inner)
    elif not _reads_files(dataset):
        raise ValueError('the fast loader decodes files, and cannot get at those of this '
                         f'{type(dataset).__name__}: give an ImageDataset of timm, an ImageFolder or a Subset of one, '
                         'or leave fast out')
    elif getattr(dataset, 'input_img_mode', 'RGB') != 'RGB':
        raise ValueError(f'the fast loader reads RGB, and input_img_mode is {dataset.input_img_mode!r}: leave fast out')


def _wraps(dataset: Any, kind: type[Subset] | type[ConcatDataset]) -> bool:
    return isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__


def _find(dataset: Any, index: int) -> tuple[Any, int]:
    """The dataset that torch's Subset and ConcatDataset take an image from, and its index there."""
    while True:
        if _wraps(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif _wraps(dataset, ConcatDataset):
            number = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[number - 1] if number else 0
            dataset = dataset.datasets[number]
        else:
            return dataset, index


def _with_transform(dataset: Any, transform: Callable | None) -> Any:
    """A shallow copy of a dataset and of those it wraps, with a transform set where the outermost one is."""
    dataset = copy.copy(dataset)
    wrapped = getattr(dataset, '__dict__', {}).get('dataset')
    if isinstance(dataset, ConcatDataset):
        dataset.datasets = [_with_transform(inner, transform) for inner in dataset.datasets]
    elif hasattr(dataset, 'transform'):
        if isinstance(wrapped, Dataset):  # whose transform it may be
            dataset.dataset = copy.copy(wrapped)
        dataset.transform = transform
        # some of torchvision's datasets use `transform`, others only the `transforms` made of it by their constructor
        if isinstance(dataset, VisionDataset) and isinstance(
                vars(dataset).get('transforms'), (StandardTransform, type(None))):
            dataset.transforms = StandardTransform(transform, vars(dataset).get('target_transform'))
    elif isinstance(wrapped, Dataset):
        dataset.dataset = _with_transform(wrapped, transform)
    return dataset
