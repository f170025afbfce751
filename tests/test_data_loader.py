"""create_loader: timm's own loader, with repeats and instance ids, on images of Pillow and (fast) on tensors."""
import pickle
import random

import numpy as np
import pytest
import timm.data
import timm.data.loader as timm_loader
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate
from torchvision.datasets import ImageFolder

from timm_multigrain.data import InstanceDataset, RepeatedAugSampler, create_loader, instances
from timm_multigrain.data.fast import TensorTransform

from .pictures import write_noise

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    names = [f'{label}/{i}.{"png" if i == 3 else "jpg"}' for label in range(4) for i in range(10)]
    return str(write_noise(tmp_path_factory.mktemp('images'), names, (60, 50), (7, 6)))


def loader_of(root, batch_size=12, **kwargs):
    kwargs = {'device': CPU, 'num_workers': 0, **kwargs}
    return create_loader(ImageDataset(root), (3, 32, 32), batch_size, **kwargs)


def seeded(function, *arguments):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return function(*arguments)


def assert_near(batches, others, levels=40):
    """Images of the fast and of the usual loader, in grey levels."""
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(targets, other_targets)
        assert images.dtype == other_images.dtype == torch.float32 and images.shape == other_images.shape
        off = (images - other_images).abs() * 255 * 0.23
        assert off.mean() < 0.5 and off.max() < levels


def order(length, epoch=0, repeats=3, **kwargs):
    sampler = RepeatedAugSampler(length, repeats, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def ids(loader):
    return torch.cat([targets for _, targets in loader])[:, 1].tolist()


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize(('use_prefetcher', 'num_workers'), [(True, 0), (False, 2)])
def test_batches(root, use_prefetcher, num_workers, fast):
    options = dict(use_prefetcher=use_prefetcher, num_workers=num_workers)
    loader = loader_of(root, fast=fast, **options)
    assert isinstance(loader, timm_loader.PrefetchLoader) == use_prefetcher
    assert isinstance(loader.dataset.transform, TensorTransform) == fast
    assert len(loader) == 40 // 12
    batches = seeded(list, loader)
    for images, targets in batches:
        assert images.shape == (12, 3, 32, 32) and images.dtype == torch.float32
        assert targets.shape == (12, 2) and targets.dtype == torch.int64
        assert torch.equal(targets[:, 0], targets[:, 1] // 10)
        assert torch.equal(targets[::3], targets[1::3]) and torch.equal(targets[::3], targets[2::3])
        for i in range(0, 12, 3):
            assert not torch.equal(images[i], images[i + 1])
    assert torch.cat([t for _, t in batches])[:, 1].tolist() == order(40)[:36]
    if fast:
        assert_near(batches, seeded(list, loader_of(root, **options)))
    # nobody calls set_epoch: the next epoch all the same
    assert ids(loader) == order(40, epoch=1)[:36]
    loader.sampler.set_epoch(7)
    assert ids(loader) == order(40, epoch=7)[:36]


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_images_are_those_of_timm(root, use_prefetcher):
    options = {'auto_augment': 'rand-m7-mstd0.5', 'color_jitter': 0.2, 'use_prefetcher': use_prefetcher, 'device': CPU}
    loader = loader_of(root, **options)
    reference = ImageDataset(root)
    timm.data.create_loader(reference, (3, 32, 32), 12, is_training=True, num_workers=0, **options)
    images, targets = seeded(next, iter(loader.loader if use_prefetcher else loader))
    collate = timm_loader.fast_collate if use_prefetcher else default_collate
    expected_images, expected_classes = collate(seeded(lambda: [reference[i] for i in order(40)[:12]]))
    assert images.dtype == (torch.uint8 if use_prefetcher else torch.float32)
    assert torch.equal(images, expected_images)
    assert torch.equal(targets[:, 0], expected_classes)


def test_options_of_the_sampler(root):
    loader = loader_of(root, num_repeats=2, epoch_len_factor=2.5, shuffle=False, seed=4)
    assert ids(loader) == order(40, repeats=2, epoch_len_factor=2.5, shuffle=False)[:96]
    assert ids(loader_of(root, seed=4)) == order(40, seed=4)[:36]
    assert ids(loader_of(root, num_repeats=1)) == order(40, repeats=1)[:36]


@pytest.mark.parametrize('options', [{'use_multi_epochs_loader': True}, {'persistent_workers': True}])
def test_workers_that_stay(root, options):
    loader = loader_of(root, num_workers=1, **options)
    assert [ids(loader) for _ in range(3)] == [order(40, epoch=i)[:36] for i in range(3)]


def test_dataset_is_sent_to_workers_that_are_not_forked(root):
    dataset = loader_of(root, fast=True).dataset
    expected = seeded(dataset.__getitems__, [3, 3])  # leaves something behind that is not sent
    found = seeded(pickle.loads(pickle.dumps(dataset)).__getitems__, [3, 3])
    assert all(torch.equal(a, b) for one, other in zip(found, expected, strict=True)
               for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize('fast', [True, False])
def test_scheduled_sizes(root, fast, monkeypatch):
    """An image is decoded once for its copies, whose pixels are those of as many decodings."""
    count, decode = [], InstanceDataset._decode
    monkeypatch.setattr(InstanceDataset, '_decode', lambda *args: count.append(1) or decode(*args))
    options = dict(fast=fast, input_size_choices=[32, 48], batch_size_choices=[12, 6])
    batches = seeded(list, loader_of(root, **options))
    assert {(images.shape[-1], len(targets)) for images, targets in batches} <= {(32, 12), (48, 6)}
    for _, targets in batches:
        assert torch.equal(targets[:, 0], targets[:, 1] // 10) and torch.equal(targets[::3], targets[2::3])
    assert len(count) == sum(len(targets) for _, targets in batches) // 3
    other = loader_of(root, **options)
    monkeypatch.delattr(type(other.dataset), '__getitems__')
    monkeypatch.setattr(
        type(other.dataset), '__getitem__', lambda self, key: self.sizes[key[1]].__getitems__([key[0]])[0])
    for (images, targets), (same, same_targets) in zip(batches, seeded(list, other), strict=True):
        assert torch.equal(images, same) and torch.equal(targets, same_targets)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('make, chosen', [
    (lambda root: InstanceDataset(ImageFolder(root)), range(40)),
    (lambda root: ConcatDataset([Subset(ImageDataset(root), range(30, 10, -1)), ImageFolder(root)]),
     [*range(30, 10, -1), *range(40)])], ids=['instances', 'parts'])
def test_other_datasets(root, make, chosen, fast, monkeypatch):
    count, decode = [], instances.decode_tensor
    monkeypatch.setattr(instances, 'decode_tensor', lambda *args: count.append(1) or decode(*args))
    loader = create_loader(make(root), 32, 12, device=CPU, num_workers=0, fast=fast)
    targets = torch.cat([targets for _, targets in loader])
    assert targets[:, 1].tolist() == order(len(chosen))[:len(targets)]
    assert targets[:, 0].tolist() == [chosen[i] // 10 for i in targets[:, 1]]
    assert len(count) == (len(targets) // 3 if fast else 0)


def test_ranks(root, monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        seen.append(ids(loader_of(root, batch_size=6, distributed=True)))
        assert seen[-1] == order(40, num_replicas=2, rank=rank)[:18]
    assert not set(seen[0]) & set(seen[1])
    assert ids(loader_of(root, distributed=False)) == order(40, num_replicas=1, rank=0)[:36]


def test_timm_is_left_as_it_was(root):
    before = timm_loader.RepeatAugSampler
    loader_of(root)
    with pytest.raises(ValueError, match='no full batch'):
        loader_of(root, batch_size=41)
    with pytest.raises(TypeError):
        loader_of(root, no_such_option=1)
    assert timm_loader.RepeatAugSampler is before is timm.data.distributed_sampler.RepeatAugSampler


def test_seam_is_guarded(root, monkeypatch):
    message = f'timm {timm.__version__} does not take its sampler'

    def other_create_loader(dataset, input_size, batch_size, **kwargs):
        return torch.utils.data.DataLoader(dataset, batch_size)

    with monkeypatch.context() as patch:
        patch.delattr(timm_loader, 'RepeatAugSampler')
        with pytest.raises(RuntimeError, match=message):
            loader_of(root)
    with monkeypatch.context() as patch:
        patch.setattr(timm_loader, 'create_loader', other_create_loader)
        with pytest.raises(RuntimeError, match=message):
            loader_of(root)


class Ignoring(ImageFolder):
    def __getitem__(self, index):
        return self.loader(self.samples[index][0]), self.samples[index][1]


class Other(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return Image.new('RGB', (40, 40)), 0


class Own(ImageDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)


@pytest.mark.parametrize(('options', 'message'), [
    ({'batch_size': 41}, 'epoch of 40 samples on this rank has no full batch of 41: give more images'),
    ({'epoch_len_factor': 0.2}, 'epoch of 8 samples'),
    ({'batch_size': 2}, 'num_repeats is 3, and batch_size 2'),
    ({'decode': 'pillow'}, "decode is 'pillow'"),
    ({'num_aug_repeats': 3}, 'num_aug_repeats is 3: leave it out'),
    ({'num_aug_splits': 2}, 'num_aug_splits is 2'),
    ({'collate_fn': FastCollateMixup(0.2)}, 'leave mixup and cutmix out'),
])
def test_bad_arguments(root, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(root, **options)


def test_own_collate(root):
    def one_hot(batch):
        images, targets = default_collate(batch)
        return images, torch.nn.functional.one_hot(targets[:, 0], 4).float()

    expected = next(iter(loader_of(root, use_prefetcher=False)))[1]
    own = loader_of(root, use_prefetcher=False, collate_fn=lambda batch: default_collate(batch))
    assert torch.equal(next(iter(own))[1], expected)
    with pytest.raises(ValueError, match=r'float32 targets of shape \(12, 4\) for 12 images: give one that stacks'):
        next(iter(loader_of(root, use_prefetcher=False, collate_fn=one_hot)))


@pytest.mark.parametrize(('make', 'message'), [
    (lambda root: Own(root), 'cannot get at those of this Own'),
    (lambda root: Subset(Other(), range(20)), 'cannot get at those of this Other'),
    (lambda root: ConcatDataset([ImageDataset(root, input_img_mode='L')]), "input_img_mode is 'L'"),
    (lambda root: ImageFolder(root, loader=Image.open), 'cannot get at those of this ImageFolder')])
def test_datasets_that_the_fast_loader_refuses(root, make, message):
    with pytest.raises(ValueError, match=message):
        create_loader(make(root), 32, 12, device=CPU, fast=True)


def test_bad_datasets(root):
    with pytest.raises(ValueError, match='untransformed images'):
        next(iter(create_loader(Ignoring(root), 32, 12, device=CPU, num_workers=0)))
