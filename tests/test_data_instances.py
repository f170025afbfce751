"""InstanceDataset: decoding once gives what as many separate reads give, and the unreadable is skipped."""
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from timm.data import ImageDataset, IterableImageDataset
from timm.data import create_transform as timm_transform
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.transforms import Compose, PILToTensor, Resize

from timm_multigrain.data import InstanceDataset
from timm_multigrain.images.pixels import UnreadableImage

from .pictures import write_noise

INDICES = [2, 2, 2, 0, 0, 5, 2, 2, 7, 7, 7, 7]


def draw_from_all(image):
    """A transform that takes numbers from the generators of torch, Python and numpy."""
    array = np.asarray(image, dtype=np.float64)
    return torch.tensor(array * random.random() + np.random.rand() + torch.rand(1, dtype=torch.float64).item())


def spoil_in_place(image):
    """A transform that draws into the image it is given."""
    ImageDraw.Draw(image).rectangle((0, 0, random.randrange(30), 30), fill=(255, 0, 0))
    return PILToTensor()(image)


def noisy_class(target):
    return target if random.random() < 0.5 else random.randrange(100, 200)


class Joint:
    """A torchvision-style joint transform of image and target."""

    def __call__(self, image, target):
        return draw_from_all(image), target + random.randrange(100)


class Pairs(VisionDataset):
    """A torchvision dataset that uses `transforms` only, as OxfordIIITPet does."""

    def __init__(self, root, **kwargs):
        super().__init__(root, **kwargs)
        self.files = sorted(Path(root).rglob('*.jpg'))

    def __getitem__(self, index):
        image, target = Image.open(self.files[index]).convert('RGB'), index % 3
        return self.transforms(image, target) if self.transforms else (image, target)

    def __len__(self):
        return len(self.files)


class Plain(Dataset):
    """A dataset without an attribute `transform`."""

    def __init__(self, root):
        self.files = sorted(Path(root).rglob('*.jpg'))
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return draw_from_all(Image.open(self.files[index]).convert('RGB')), np.int64(index % 3)

    def __len__(self):
        return len(self.files)


@pytest.fixture
def root(tmp_path):
    return write_noise(tmp_path, [f'class{label}/{i}.jpg' for label in range(3) for i in range(4)], (50, 40))


def seed():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def states():
    return torch.rand(2).tolist(), random.random(), np.random.rand()


def assert_same_as_separate_reads(make, indices=INDICES):
    dataset = make()
    seed()
    expected = [dataset[i] for i in indices]
    after = states()
    seed()
    samples = InstanceDataset(make()).__getitems__(indices)
    assert states() == after
    for i, (image, target), (expected_image, expected_class) in zip(indices, samples, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(expected_image))
        assert target.dtype == torch.int64
        assert target.tolist() == [expected_class, i]


MAKERS = {
    'timm': lambda root: ImageDataset(str(root), transform=spoil_in_place, target_transform=noisy_class),
    'timm, any mode': lambda root: ImageDataset(str(root), input_img_mode=None, transform=draw_from_all),
    'timm, bytes': lambda root: ImageDataset(
        str(root), load_bytes=True, transform=lambda data: torch.rand(3) + len(data)),
    'timm, augmented': lambda root: ImageDataset(str(root), transform=timm_transform(
        32, is_training=True, auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.5)),
    'folder': lambda root: ImageFolder(
        root, transform=timm_transform(32, is_training=True), target_transform=noisy_class),
    'transforms, standard': lambda root: Pairs(root, transform=draw_from_all, target_transform=noisy_class),
    'transforms, joint': lambda root: Pairs(root, transforms=Joint()),
    'random split': lambda root: random_split(
        ImageDataset(str(root), transform=draw_from_all), [0.9, 0.1], torch.Generator().manual_seed(0))[0],
    'two data sets': lambda root: ConcatDataset([
        Subset(ImageFolder(root, transform=spoil_in_place), [4, 3, 9]),
        ImageDataset(str(root), transform=draw_from_all)]),
    'no transform attribute': Plain,
}


@pytest.mark.parametrize('name', MAKERS)
def test_same_as_separate_reads(root, name):
    assert_same_as_separate_reads(lambda: MAKERS[name](root))


@pytest.mark.parametrize('name', ['timm', 'folder', 'random split', 'two data sets'])
def test_decodes_once(root, name, monkeypatch):
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda file, *args, **kwargs: opened.append(file) or open_image(file))
    InstanceDataset(MAKERS[name](root)).__getitems__(INDICES)
    assert len(opened) == 5


def test_separate_reads_where_the_dataset_does_more(root):
    dataset = Plain(root)
    InstanceDataset(dataset).__getitems__(INDICES)
    assert dataset.reads == len(INDICES)


@pytest.mark.parametrize('name', ['timm', 'transforms, standard', 'random split', 'two data sets'])
def test_dataset_is_never_changed(root, name):
    """Neither by reading it from several threads nor by setting another transform."""
    def state(dataset):
        inner = [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', ())]
        return {k: id(v) for k, v in vars(dataset).items()}, [state(d) for d in inner if d is not None]

    dataset = MAKERS[name](root)
    before = state(dataset)
    instances = InstanceDataset(dataset)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(instances.__getitems__, [[i, i, i] for i in range(len(dataset))] * 3))
    assert state(dataset) == before
    instances.transform = PILToTensor()
    assert instances[3][0].dtype == torch.uint8 and instances.transform is not dataset
    other = instances.with_transform(draw_from_all)
    assert other[3][0].dtype == torch.float64 and instances[3][0].dtype == torch.uint8
    assert state(dataset) == before


class Mirrored(Dataset):
    """A user's own wrapper, with a transform after that of the dataset it wraps."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.transform = None

    def __getitem__(self, index):
        image, target = self.dataset[index]
        return self.transform(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), target

    def __len__(self):
        return len(self.dataset)


class Forwarding(Mirrored):
    """One whose transform is that of the dataset it wraps."""

    transform = property(
        lambda self: self.dataset.transform, lambda self, value: setattr(self.dataset, 'transform', value))

    def __getitem__(self, index):
        return self.dataset[index]


def test_wrappers_of_ones_own(root):
    folder = ImageFolder(root)
    expected = PILToTensor()(folder[4][0])
    for make, image in ((Mirrored, expected.flip(-1)), (Forwarding, expected)):
        dataset = make(folder)
        instances = InstanceDataset(dataset)
        instances.transform = PILToTensor()
        assert torch.equal(instances[4][0], image)
        assert folder.transform is None and dataset.transform is None


def test_images_of_a_dataset_without_transform(root):
    """They are transformed here, unless they are no images of Pillow any more."""
    pairs = [(Image.new('RGB', (4, 3), (i, 0, 0)), i) for i in range(3)]
    instances = InstanceDataset(pairs)
    assert instances[1][0] is pairs[1][0]
    instances.transform = PILToTensor()
    image, target = instances[1]
    assert image.tolist() == [[[1] * 4] * 3, [[0] * 4] * 3, [[0] * 4] * 3] and target.tolist() == [1, 1]
    tensors = InstanceDataset([(torch.ones(2), 0)])
    tensors.transform = PILToTensor()
    assert tensors[0][0].tolist() == [1, 1]


def test_forms_of_targets_and_samples():
    for label in (3, True, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3).byte()):
        assert InstanceDataset([(torch.zeros(1), label)])[0][1].tolist() == [int(label), 0]
    for label in (3.0, np.float32(3), torch.tensor(3.0), [0, 1], np.ones(1, int), torch.ones(1).long(), None, 'cat'):
        with pytest.raises(ValueError, match=r'target of image 0 .* one integer class'):
            InstanceDataset([(torch.zeros(1), label)]).__getitems__([0, 0])
    for sample in (torch.zeros(3), (1, 2, 3), {'image': 1, 'label': 2}):
        with pytest.raises(ValueError, match=r'not an \(image, class\) pair'):
            InstanceDataset([sample])[0]
    pairs = InstanceDataset(TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([4, 5, 6])))
    image, target = pairs.__getitems__([1, 1])[1]
    assert image.tolist() == [2, 3] and target.tolist() == [5, 1]


def test_iterable_datasets_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    for dataset in (Stream(), IterableImageDataset('', reader=[]), iter([])):
        with pytest.raises(ValueError, match='give a map-style dataset'):
            InstanceDataset(dataset)


def test_attributes_forward(root):
    folder = ImageFolder(root, transform=spoil_in_place)
    dataset = InstanceDataset(folder)
    assert dataset.transform is spoil_in_place
    dataset.transform = draw_from_all
    assert dataset.transform is draw_from_all and folder.transform is spoil_in_place
    assert dataset.class_to_idx == folder.class_to_idx and not hasattr(dataset, 'set_epoch')
    assert len(dataset) == 12 and InstanceDataset(InstanceDataset(folder)).dataset is folder


def test_transform_set_later_reaches_transforms(root):
    def set_transform(dataset):
        dataset.transform = draw_from_all
        return dataset

    seed()
    expected = [draw_from_all(Pairs(root)[i][0]) for i in INDICES]
    for pairs in (Pairs(root), Pairs(root, transform=spoil_in_place)):
        seed()
        images = [image for image, _ in set_transform(InstanceDataset(pairs)).__getitems__(INDICES)]
        assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
    joint = set_transform(InstanceDataset(Pairs(root, transforms=Joint())))
    assert isinstance(joint.transforms, Joint)


def damage(file, kind):
    content = file.read_bytes()
    file.write_bytes({'truncated': content[:len(content) // 2], 'text': b'hello'}.get(kind, b''))
    if kind in ('missing', 'fifo'):
        file.unlink()
    if kind == 'fifo':
        os.mkfifo(file)


@pytest.mark.parametrize('make', [
    lambda root: ImageDataset(str(root)), ImageFolder, lambda root: Pairs(root, transform=PILToTensor())],
    ids=['timm', 'folder', 'other'])
@pytest.mark.parametrize('kind', ['truncated', 'text', 'empty', 'missing', 'fifo'])
def test_unreadable_image_is_skipped(root, make, kind, caplog):
    """The next one stands in for all its copies, as one more copy of that one; with `strict` it is an error."""
    dataset = make(root)
    opens_itself = isinstance(dataset, Pairs)  # not by the fast loader, and a FIFO hangs it
    damage(root / 'class1' / '1.jpg', 'text' if opens_itself and kind == 'fifo' else kind)
    damage(root / 'class2' / '3.jpg', 'text')  # the last one, which the first follows
    ways = [('multigrain', False), ('timm', False)] + [('multigrain', True), ('timm', True)] * (not opens_itself)
    for decode, fast in ways:
        caplog.clear()
        instances = InstanceDataset(dataset, decode, fast=fast)
        instances.transform = Compose([PILToTensor()])
        samples = instances.__getitems__([5, 5, 5, 6, 6, 6, 11, 11, 0, 5])
        label = (lambda i: i % 3) if opens_itself else (lambda i: i // 4)
        assert [target.tolist() for _, target in samples] == [[label(i), i] for i in [6] * 6 + [0] * 3 + [6]]
        for (image, _), i in zip(samples, [6] * 6 + [0] * 3 + [6], strict=True):
            assert torch.equal(image, instances[i][0])
        assert instances.skipped == [5, 11]
        lines = [record.getMessage() for record in caplog.records]
        names = ['file name unknown'] * 2 if opens_itself else ['class1/1.jpg', 'class2/3.jpg']
        for line, number, name in zip(lines, (5, 11), names, strict=True):
            assert line.startswith(f'Skipped image {number} (') and name in line and 'stands in for it' in line
        strict = InstanceDataset(dataset, decode, strict=True, fast=fast)
        for indices in ([5], [5, 5]):
            with pytest.raises(UnreadableImage, match=rf'^image 5 \(.*{names[0]}\) cannot be read: .*; replace'):
                strict.__getitems__(indices)


def test_split_skips_within_itself(root):
    """An image of the training half does not come from the other one."""
    damage(root / 'class0' / '2.jpg', 'empty')
    instances = InstanceDataset(Subset(ImageFolder(root, transform=PILToTensor()), [9, 2, 7]))
    assert [target.tolist() for _, target in instances.__getitems__([1, 1, 0])] == [[1, 2], [1, 2], [2, 0]]
    both = InstanceDataset(ConcatDataset([ImageFolder(root, transform=PILToTensor()), Subset(ImageFolder(root), [4])]))
    damage(root / 'class2' / '3.jpg', 'text')
    image, target = both[11]
    assert isinstance(image, Image.Image) and target.tolist() == [1, 12]


def test_too_many_unreadable_images(tmp_path):
    (tmp_path / 'a').mkdir()
    for i in range(12):
        (tmp_path / 'a' / f'{i}.jpg').write_bytes(b'no image')
    with pytest.raises(UnreadableImage, match=r'10 images in a row cannot be read, the last of them .*a/9.jpg: is not'):
        InstanceDataset(ImageDataset(str(tmp_path)))[0]


def test_errors_of_a_transform_are_not_skipped(root):
    def fails(image):
        raise OSError('no space left')

    with pytest.raises(OSError, match='no space left'):
        InstanceDataset(ImageFolder(root, transform=fails))[0]


def test_workers_share_what_was_skipped(root):
    damage(root / 'class0' / '0.jpg', 'text')
    damage(root / 'class2' / '1.jpg', 'empty')
    instances = InstanceDataset(ImageDataset(str(root), transform=Compose([Resize((8, 8)), PILToTensor()])))
    ids = torch.cat([targets[:, 1] for _, targets in DataLoader(instances, num_workers=2)])
    assert ids.tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 11] and instances.skipped == [0, 9]
