"""create_loader(fast=True): timm's loader on tensors, with repeats and instance ids."""
import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, Subset
from torchvision.datasets import FakeData, ImageFolder

from timm_multigrain.data import InstanceDataset, Lighting, RepeatedAugSampler, create_loader, decoded
from timm_multigrain.data.decoded import DecodedDataset
from timm_multigrain.data.lighting import insert_lighting
from timm_multigrain.data.tensor_transform import TensorTransform

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for label in range(4):
        (root / str(label)).mkdir()
        for i in range(10):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
            name = f'{i}.png' if i == 3 else f'{i}.jpg'
            coarse.resize((60, 50)).save(root / str(label) / name)
    return str(root)


def loader_of(dataset, fast=True, **kwargs):
    kwargs = {'device': CPU, 'num_workers': 0, 'batch_size': 12, **kwargs}
    return create_loader(dataset, (3, 32, 32), fast=fast, **kwargs)


def order(length, epoch=0, **kwargs):
    sampler = RepeatedAugSampler(length, 3, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def batches_of(loader):
    """All batches after seeding."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return list(loader)


def assert_near(batches, others, levels=40):
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(targets, other_targets)
        assert images.dtype == other_images.dtype == torch.float32 and images.shape == other_images.shape
        off = (images - other_images).abs() * 255 * 0.23
        assert off.mean() < 0.5 and off.max() < levels


@pytest.mark.parametrize('use_prefetcher', [True, False])
@pytest.mark.parametrize('num_workers', [0, 1, 2])
def test_batches(root, use_prefetcher, num_workers):
    options = dict(use_prefetcher=use_prefetcher, num_workers=num_workers)
    loader, plain = (loader_of(ImageDataset(root), fast, **options) for fast in (True, False))
    batches = batches_of(loader)
    assert torch.cat([targets for _, targets in batches])[:, 1].tolist() == order(40)[:36]
    assert_near(batches, batches_of(plain))
    for images, targets in batches:
        assert torch.equal(targets[:, 0], targets[:, 1] // 10)
        for i in range(0, 12, 3):
            assert not torch.equal(images[i], images[i + 1])
    again = loader_of(ImageDataset(root), **options)
    for (images, _), (same, _) in zip(batches, batches_of(again), strict=True):
        assert torch.equal(images, same)


@pytest.mark.slow
def test_workers_of_a_forkserver(root):
    expected = batches_of(loader_of(ImageDataset(root), num_workers=1))
    loader = loader_of(ImageDataset(root), num_workers=1)
    loader.loader.multiprocessing_context = 'forkserver'
    next(iter(loader.dataset))  # something to leave out when the dataset is sent
    for (images, targets), (same, same_targets) in zip(batches_of(loader), expected, strict=True):
        assert torch.equal(images, same) and torch.equal(targets, same_targets)


def tar_of(root, tmp_path):
    with tarfile.open(tmp_path / 'images.tar', 'w') as file:
        file.add(root, '.')
    return ImageDataset(str(tmp_path / 'images.tar'), reader='tar')


DATASETS = {
    'timm': lambda root, _: ImageDataset(root),
    'folder': lambda root, _: ImageFolder(root),
    'subset': lambda root, _: Subset(ImageFolder(root), range(39, -1, -1)),
    'subset of a subset': lambda root, _: Subset(Subset(ImageDataset(root), range(40)), range(40)),
    'instances': lambda root, _: InstanceDataset(ImageFolder(root)),
    'tar': tar_of,
}


@pytest.mark.parametrize('kind', DATASETS)
def test_datasets(root, tmp_path, kind, monkeypatch):
    count, decode = [], decoded.decode_tensor
    monkeypatch.setattr(decoded, 'decode_tensor', lambda *args: count.append(1) or decode(*args))
    dataset = DATASETS[kind](root, tmp_path)
    innermost = dataset
    while hasattr(innermost, 'dataset'):
        innermost = innermost.dataset
    before = dict(vars(innermost))
    loader = loader_of(dataset)
    batches = batches_of(loader)
    assert vars(innermost) == before
    assert len(count) == 12  # 36 samples
    reversed_order = kind == 'subset'
    for images, targets in batches:
        assert images.shape == (12, 3, 32, 32)
        index = 39 - targets[:, 1] if reversed_order else targets[:, 1]
        assert torch.equal(targets[:, 0], index // 10)
    if kind not in ('subset', 'subset of a subset'):
        assert_near(batches, batches_of(loader_of(DATASETS[kind](root, tmp_path), fast=False)))


class Records:
    """What timm's reader of Hugging Face datasets gives: the content in a stream."""

    def __init__(self, root):
        self.files = [path for path, _ in ImageDataset(root).reader.samples]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return io.BytesIO(Path(self.files[index]).read_bytes()), index // 10


def test_reader_of_streams(root):
    loader = loader_of(ImageDataset('', reader=Records(root)))
    assert_near(batches_of(loader), batches_of(loader_of(ImageDataset(root))), levels=0.01)


def test_target_transform(root):
    dataset = ImageFolder(root, target_transform=lambda label: label + random.randrange(100, 105))
    for _, targets in batches_of(loader_of(dataset)):
        assert len(set(targets[:, 0].tolist())) > 4 and targets[:, 0].min() >= 100


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('kind', ['timm', 'folder', 'subset', 'target'])
def test_scheduled_sizes(root, tmp_path, kind, fast, monkeypatch):
    count, decode_image = [], DecodedDataset._decode
    monkeypatch.setattr(DecodedDataset, '_decode', lambda *args: count.append(1) or decode_image(*args))

    def dataset():
        if kind == 'target':
            return ImageFolder(root, target_transform=lambda label: label)
        return DATASETS[kind](root, tmp_path)

    options = dict(input_size_choices=[32, 48], batch_size_choices=[12, 6])
    loader = loader_of(dataset(), fast, **options)
    batches = batches_of(loader)
    number = sum(len(targets) for _, targets in batches)
    assert {images.shape[-1] for images, _ in batches} <= {32, 48}
    assert len(count) == number // 3
    other = loader_of(dataset(), fast, **options)
    monkeypatch.delattr(type(other.dataset), '__getitems__')
    monkeypatch.setattr(
        type(other.dataset), '__getitem__', lambda self, key: self.sizes[key[1]].__getitems__([key[0]])[0])
    for (images, targets), (same, same_targets) in zip(batches, batches_of(other), strict=True):
        assert torch.equal(images, same) and torch.equal(targets, same_targets)


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_lighting(root, use_prefetcher):
    loaders = [loader_of(ImageDataset(root), fast, use_prefetcher=use_prefetcher) for fast in (True, False)]
    for loader in loaders:
        insert_lighting(loader.dataset, Lighting(0.5))
    assert_near(*map(batches_of, loaders))
    assert any(isinstance(step, Lighting) for step in loaders[0].dataset.transform.transforms)


def test_random_erasing(root):
    loader = loader_of(ImageDataset(root), re_prob=1.0)
    assert loader.random_erasing is not None
    assert_near(batches_of(loader), batches_of(loader_of(ImageDataset(root), fast=False, re_prob=1.0)))


def test_ranks(root, monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        batches = batches_of(loader_of(ImageDataset(root), batch_size=6, distributed=True))
        seen = torch.cat([targets for _, targets in batches])[:, 1].tolist()
        assert seen == order(40, num_replicas=2, rank=rank)[:18]


class Other(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return Image.new('RGB', (40, 40)), 0


class Own(ImageDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)


@pytest.mark.parametrize(('make', 'message'), [
    (lambda root: Other(), 'cannot get at those of this Other'),
    (lambda root: FakeData(40), 'cannot get at those of this FakeData'),
    (lambda root: Own(root), 'cannot get at those of this Own'),
    (lambda root: Subset(Other(), range(20)), 'cannot get at those of this Other'),
    (lambda root: ImageDataset(root, input_img_mode='L'), "input_img_mode is 'L'"),
    (lambda root: ImageFolder(root, loader=Image.open), 'cannot get at those of this ImageFolder')])
def test_datasets_that_are_refused(root, make, message):
    with pytest.raises(ValueError, match=message):
        loader_of(make(root))


def test_transforms_that_are_refused(root):
    class OfTensorflow:
        pass

    with pytest.raises(ValueError, match='cannot take OfTensorflow apart: leave tf_preprocessing out'):
        TensorTransform(OfTensorflow())


def test_default_is_unchanged(root):
    loader = loader_of(ImageDataset(root), fast=False)
    assert not isinstance(loader.dataset.transform, TensorTransform)
