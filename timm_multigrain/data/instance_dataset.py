"""Dataset wrapper for joint class and instance training: image ids beside the classes, one decoding for m repeats.

Berman et al., "MultiGrain", arXiv 1902.05509, section 3: the instance label of a sample is the image it was augmented
from, so that the positives of the margin loss come without any annotation.
"""
import copy
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import VisionDataset
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import Compose, RandomResizedCrop

from .content import only_transforms_draw
from .tensor_transform import TensorTransform

_TRANSFORMS = ('transform', 'target_transform', 'transforms')


class _Unreadable(Exception):
    """Raised past timm's handler of broken images; its cause is the reason."""


_NEW_IMAGE = RandomResizedCropAndInterpolation, RandomResizedCrop  # the crop is a copy in any case
_READ_ERRORS = (_Unreadable, OSError, SyntaxError, EOFError, Image.DecompressionBombError)


class InstanceDataset(Dataset):
    """A map-style (image, class) dataset whose targets become [class, instance id].

    `dataset[i]` gives (image, int64 tensor [class, i]); default_collate and timm's fast_collate stack the targets to
    [B, 2]. A DataLoader fetches through `__getitems__`, which decodes an image once for consecutive equal indices (see
    `RepeatedAugSampler`) and applies the transforms once for each of them, every time to a pristine copy: bit-identical
    to as many separate reads. Where the dataset does more than to return what its `transform` (and `target_transform`,
    or torchvision's `transforms`) gave, draws random numbers elsewhere, or has no transform, each repeat is a separate
    read.

    All other attributes are those of the wrapped dataset, reading and writing.

    Args:
        dataset: timm's ImageDataset, torchvision's ImageFolder or any other map-style dataset of pairs.

    Raises:
        ValueError: Iterable dataset; while reading, a sample that is no pair or a target that is no class number.
        RuntimeError: While reading, an image that cannot be read. timm's ImageDataset on its own would give the next
            image instead, here under the wrong instance id.
    """

    def __init__(self, dataset: Dataset):
        map_style = hasattr(dataset, '__getitem__') and hasattr(dataset, '__len__')
        if isinstance(dataset, IterableDataset) or not map_style:
            raise ValueError(
                f'{type(dataset).__name__} is not read by index, which repeated augmentation needs: give a map-style '
                'dataset, such as an image folder, an image tar or the "hfds/" reader of timm')
        self.__dict__['dataset'] = dataset.dataset if isinstance(dataset, InstanceDataset) else dataset

    def __getattr__(self, name: str) -> Any:
        # protocols such as pickle probe for dunder methods, on half-made objects too
        if name.startswith('__') or 'dataset' not in self.__dict__:
            raise AttributeError(f'{type(self).__name__} has no attribute {name}')
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)
        # some of torchvision's datasets use `transform`, others only the `transforms` made of it by their constructor
        if name in ('transform', 'target_transform') and isinstance(self.dataset, VisionDataset):
            attributes = vars(self.dataset)
            if isinstance(attributes.get('transforms'), (StandardTransform, type(None))):
                self.dataset.transforms = StandardTransform(
                    attributes.get('transform'), attributes.get('target_transform'))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        return self._read(self._index(index), 1)[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, torch.Tensor]]:
        samples = []
        for index, group in groupby(map(self._index, indices)):
            samples += self._read(index, sum(1 for _ in group))
        return samples

    def _index(self, index: int) -> int:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} images')
        return index % len(self)

    def _read(self, index: int, repeats: int) -> list[tuple[Any, torch.Tensor]]:
        # the states of the generators are large, and not asked for where the answer is known
        states = _no_states if repeats == 1 or only_transforms_draw(self.dataset) else _random_states
        before = states()
        with _hooks(self.dataset, record=repeats > 1, states=states) as calls:
            first = self._load(index)
        samples = [first]
        replayable = bool(calls) and _replayable(calls, first, before, states())
        while len(samples) < repeats:
            if replayable:
                results = {call.name: call.function(*_copies(call.function, call.arguments)) for call in calls}
                samples.append(_pair(results, first[1]))
            else:
                with _hooks(self.dataset):
                    samples.append(self._load(index))
        return [(image, _target(target, index)) for image, target in samples]

    def _load(self, index: int) -> tuple[Any, Any]:
        try:
            sample = self.dataset[index]
        except _READ_ERRORS as error:
            cause = error.__cause__ if isinstance(error, _Unreadable) else error
            raise RuntimeError(
                f'image {index} ({_filename(self.dataset, index)}) cannot be read: {cause}; '
                'replace the file or take it out of the dataset') from cause
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise ValueError(
                f'sample {index} of {type(self.dataset).__name__} is no (image, class) pair: give a dataset of pairs, '
                'without additional features')
        return tuple(sample)


class _OneShotReader:
    """A timm reader for a single sample: a second request means that timm skips a broken image."""

    def __init__(self, reader: Any):
        self.reader = reader
        self.asked = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def __getitem__(self, index: int) -> Any:
        if self.asked is not None:
            raise _Unreadable from self._reason()
        self.asked = index
        return self.reader[index]

    def _reason(self) -> Exception:
        # timm keeps only the message of the error, in its log
        try:
            with Image.open(self.reader[self.asked][0]) as image:
                image.load()
        except Exception as error:
            return error
        return OSError('the first attempt failed, another one succeeded')


class _Call(NamedTuple):
    """What a transform was called with and gave, and the states of the random generators then."""

    name: str
    function: Callable
    arguments: tuple
    result: Any
    before: tuple
    after: tuple


@contextmanager
def _hooks(dataset: Any, record: bool = False, states: Callable[[], tuple] | None = None) -> Iterator[list[_Call]]:
    """While open, `dataset` and those it wraps do not skip broken images and, with `record`, list the calls of their
    transforms, with the `states` of the random generators."""
    calls, saved = [], []
    try:
        while dataset is not None:
            attributes = getattr(dataset, '__dict__', {})
            hooks = {
                name: partial(_call, calls, states, name, attributes[name])
                for name in _TRANSFORMS if record and callable(attributes.get(name))
            }
            if isinstance(dataset, ImageDataset):
                hooks['reader'] = _OneShotReader(dataset.reader)
            for name, hook in hooks.items():
                saved.append((dataset, name, attributes[name]))
                setattr(dataset, name, hook)
            dataset = attributes.get('dataset')
        yield calls
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def _call(calls: list[_Call], states: Callable[[], tuple], name: str, function: Callable, *arguments: Any) -> Any:
    before = states()
    result = function(*_copies(function, arguments))
    calls.append(_Call(name, function, arguments, result, before, states()))
    return result


def _no_states() -> tuple:
    return ()


def _random_states() -> tuple:
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), keys.tobytes(), *rest


def _copies(function: Callable, arguments: tuple) -> Iterable[Any]:
    """Arguments for a call that may change them."""
    if isinstance(function, TensorTransform):
        return arguments
    if isinstance(function, Compose) and type(next(iter(function.transforms), None)) in _NEW_IMAGE:
        return arguments
    return map(_copy, arguments)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, Image.Image) else copy.deepcopy(value)


def _pair(results: dict[str, Any], target: Any) -> Any:
    """(image, target) out of the results of the transforms; `target` where no transform gave one."""
    if 'transforms' in results:
        return results['transforms']
    return results.get('transform'), results.get('target_transform', target)


def _replayable(calls: list[_Call], sample: tuple[Any, Any], before: tuple, after: tuple) -> bool:
    """Whether calling the transforms again gives all that another read of the sample would."""
    results = {call.name: call.result for call in calls}
    if len(results) < len(calls) or ('transforms' in results and len(results) > 1):
        return False
    pair = _pair(results, sample[1])
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and pair[0] is sample[0] and pair[1] is sample[1]):
        return False
    ends, starts = [before, *(call.after for call in calls)], [*(call.before for call in calls), after]
    return ends == starts  # no random number drawn between the calls


def _target(target: Any, index: int) -> torch.Tensor:
    try:
        if getattr(target, 'ndim', 0):
            raise TypeError
        return torch.tensor([operator.index(target), index])
    except TypeError:
        raise ValueError(
            f'the target of image {index} is {target!r}: give one integer class for each image (multi-label, soft and '
            'float targets do not go with repeated augmentation)') from None


def _filename(dataset: Any, index: int) -> str:
    if isinstance(dataset, Subset):
        return _filename(dataset.dataset, dataset.indices[index])
    try:
        if hasattr(dataset, 'filename'):
            return str(dataset.filename(index, absolute=True))
        return str(dataset.samples[index][0])
    except Exception:
        return f'of {type(dataset).__name__}, file name unknown'
