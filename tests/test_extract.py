"""Embedding: equal to one by one, the averages of views recomputed, bad images, shapes, options."""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from timm_multigrain.embed import embedder as module
from timm_multigrain.embed.embedder import embed_images
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import MS_SCALES, Protocol
from timm_multigrain.images.pixels import UnreadableImage
from timm_multigrain.images.sources import ImageFiles, open_images
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.open import open_model

from .pictures import noise
from .tiny import tiny_model

SHAPES = [(50, 37), (37, 50), (50, 37), (64, 64), (50, 37), (80, 20), (37, 50), (64, 64), (1, 90), (50, 37), (37, 50)]
LONGER = dict(size=48, kind='longer-side')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    paths = [root / f'{i}.png' for i in range(len(SHAPES))]
    for path, (width, height) in zip(paths, SHAPES, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return ImageFiles(paths)


@pytest.fixture(scope='module')
def model():
    return tiny_model()


def one_by_one(model, source, protocol, dim=None):
    with torch.inference_mode():
        return torch.cat([model.embed(protocol.transform(source.load(i))[None], dim=dim) for i in range(len(source))])


def test_workers_and_order(source, model):
    protocol = Protocol(**LONGER)
    expected = one_by_one(model, source, protocol)
    for workers in (0, 2):
        found = extract(model, source, protocol, workers=workers, batch_size=2)
        torch.testing.assert_close(found.vectors, expected, atol=1e-5, rtol=0)
        assert found.names == tuple(source.names)
    batches = list(embed_images(model, source, protocol, workers=0, batch_size=3))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(SHAPES)))
    for batch in batches:
        torch.testing.assert_close(batch.vectors, expected[batch.indices], atol=1e-5, rtol=0)
        assert batch.logits is None and batch.sizes == [SHAPES[i] for i in batch.indices]


def test_waiting_images_are_bounded(source, model, monkeypatch):
    monkeypatch.setattr(module, '_PENDING', 2)
    sizes = [len(part.indices) for part in embed_images(
        model, source, Protocol(**LONGER), workers=0, batch_size=2)]
    assert sum(sizes) == len(SHAPES) and max(sizes) == 2 and 1 in sizes
    monkeypatch.undo()
    assert len(list(embed_images(model, source, Protocol(**LONGER), workers=0, batch_size=99))) == 5  # shapes


def slow_descriptor(model, x, scales, flip, whitened):
    """Mean of mirror images, then GeM's mean over the scales, in float64 with loops."""
    def unit(v):
        return v / np.sqrt((v ** 2).sum())

    per_scale = []
    for scale in scales:
        by = {'scale_factor': scale} if min(x.shape[2:]) * scale >= 1 else {
            'size': [max(1, int(side * scale)) for side in x.shape[2:]]}
        y = x if scale == 1 else F.interpolate(x, mode='bilinear', align_corners=False, **by)
        views = [y, torch.flip(y, [3])] if flip else [y]
        descriptors = [unit(model(view).double().numpy()[0]) for view in views]
        per_scale.append(unit(sum(descriptors) / len(descriptors)))
    p = model.gem_p
    if whitened or p == 1:
        return unit(sum(per_scale))
    if p == float('inf'):
        return unit(np.max(per_scale, axis=0))
    p = np.array(p)
    return unit((sum(v ** p for v in per_scale) / len(per_scale)) ** (1 / p))


@pytest.mark.parametrize('kwargs, scales, flip', [
    *[(kwargs, MS_SCALES, True) for kwargs in ({'gem_p': 1.}, {'gem_p': 'inf'}, {'per_channel_p': True},
                                               {'whitening': 12})],
    ({}, (1,), True), ({}, MS_SCALES, False)])
def test_views_are_averaged(source, kwargs, scales, flip):
    model = tiny_model(num_classes=0, **kwargs)
    protocol = Protocol(**LONGER, scales=scales, flip=flip)
    got = extract(model, source, protocol, workers=0).vectors
    for i in range(0, len(source), 2):
        with torch.inference_mode():
            x = protocol.transform(source.load(i))[None]
            expected = slow_descriptor(model, x, scales, flip, 'whitening' in kwargs)
        np.testing.assert_allclose(got[i], expected, atol=2e-6)


def test_raw_logits_dim_and_boxes(source, model):
    protocol, whitened = Protocol(**LONGER), tiny_model(whitening=12)
    parts = list(embed_images(model, source, protocol, workers=0, descriptor=False, logits=True))
    box = (3, 4, 40, 30)
    part = extract(model, ImageFiles(source.paths[:1], boxes=[box]), protocol, workers=0).vectors
    with torch.inference_mode():
        for i, vector, logits in (row for p in parts for row in zip(p.indices, p.vectors, p.logits, strict=True)):
            x = protocol.transform(source.load(i))[None]
            raw = model.forward_head(model.forward_features(x), pre_logits=True)
            torch.testing.assert_close(vector, raw[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits, model(x)[0], atol=1e-5, rtol=1e-5)
        x = protocol.transform(source.load(0).crop(box))
        torch.testing.assert_close(part, model.embed(x[None]), atol=1e-5, rtol=0)
    torch.testing.assert_close(extract(whitened, source, protocol, workers=0, dim=5).vectors,
                               one_by_one(whitened, source, protocol, dim=5), atol=1e-5, rtol=0)


def test_fast_and_half_precision(source):
    torch.manual_seed(0)
    model = open_model('test_resnet', pretrained=False)
    protocol = Protocol(64, 'longer-side')
    expected = extract(model, source, protocol, workers=0).vectors
    names = [type(m).__name__ for m in model.modules()]
    fast = extract(model, source, protocol, workers=0, fast=True).vectors
    torch.testing.assert_close(fast, expected, atol=5e-5, rtol=0)
    assert [type(m).__name__ for m in model.modules()] == names
    # without the image of one pixel's width, of which bfloat16 convolutions read beyond the end on processors with AMX
    wide = [i for i in range(len(source)) if i != 8]
    pictures = ImageFiles([source.paths[i] for i in wide])
    half = extract(model, pictures, protocol, workers=0, dtype=torch.bfloat16).vectors
    assert half.dtype == torch.float32 and not torch.equal(half, expected[wide])
    assert ((half * expected[wide]).sum(1) > 0.99).all()


def test_the_mode_of_the_model_comes_back(source):
    model = tiny_model().train()
    extract(model, source, Protocol(**LONGER), workers=0)
    assert model.training and model.trunk.training
    iterator = embed_images(model, source, Protocol(**LONGER), workers=0)
    next(iterator)
    assert not model.training
    iterator.close()
    assert model.training


def test_unreadable_images_are_listed(source, model, tmp_path):
    (tmp_path / 'empty.jpg').write_bytes(b'')
    bad = ImageFiles([source.paths[0], tmp_path / 'empty.jpg', source.paths[1], tmp_path / 'missing.jpg'], 'abcd')
    got = extract(model, bad, Protocol(**LONGER), workers=1)
    assert got.names == ('a', 'c') and list(got.skipped) == ['b', 'd']
    assert got.skipped['b'] == f'{tmp_path}/empty.jpg: is empty' and 'no such file' in got.skipped['d']
    torch.testing.assert_close(
        got.vectors, extract(model, source, Protocol(**LONGER), workers=0).vectors[:2], atol=1e-5, rtol=0)
    with pytest.raises(UnreadableImage, match='is empty'):
        extract(model, bad, Protocol(**LONGER), workers=1, strict=True)
    with pytest.raises(ValueError, match=r'None of 1 image could be read: .*no such file'):
        extract(model, ImageFiles([tmp_path / 'missing.jpg']), Protocol(), workers=1)
    with pytest.raises(ValueError, match='the list is empty'):
        extract(model, ImageFiles([]), Protocol(), workers=1)


def test_images_too_narrow_for_the_trunk_are_listed(source):
    model = MultiGrain('test_convnext', 0)
    got = extract(model, source, Protocol(64, 'longer-side'), workers=0)
    assert list(got.skipped) == [source.names[5], source.names[8]] and len(got) == len(SHAPES) - 2
    assert 'its 1 x 64 pixels are too narrow for the model' in got.skipped[source.names[8]]
    with pytest.raises(UnreadableImage, match='too narrow'):
        extract(model, source, Protocol(64, 'longer-side'), workers=0, strict=True)
    assert len(extract(model, source, Protocol(64), workers=0)) == len(SHAPES)


@pytest.mark.parametrize('model_kwargs, kwargs, message', [
    ({}, {'batch_size': 0}, 'batch_size=0'), ({}, {'workers': -1}, 'workers=-1'), ({}, {'dim': 4}, 'dim=4 needs'),
    ({'in_chans': 1}, {}, 'takes 1 channels'), ({'num_classes': 0}, {'logits': True}, 'num_classes=0')])
def test_what_cannot_be_embedded(source, model_kwargs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        next(embed_images(tiny_model(**model_kwargs), source, Protocol(), **kwargs))
    broken = tiny_model()
    next(broken.trunk.parameters()).data.fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite: the weights are damaged'):
        extract(broken, source, Protocol(48), workers=0)


class Fixed(torch.nn.Module):
    """A trunk of one size, 24 x 32 pixels, that gives the image as its map."""
    num_features = in_chans = 3
    default_cfg = pretrained_cfg = {'input_size': (3, 24, 32)}

    def forward(self, x):
        assert x.shape[-2:] == (24, 32)
        return x


@pytest.mark.parametrize('trunk, step', [('test_vit', 16), ('test_resnet', 1), (None, None)])
@pytest.mark.parametrize('protocol, height, width', [
    (Protocol(50, 'longer-side'), 33, 50), (Protocol(50, 'thumbnail'), 33, 50), (Protocol(50), 50, 50),
    (Protocol(70, 'longer-side', scales=(1, 0.7)), 46, 70)])
def test_the_nearest_size_that_the_trunk_can_take(tmp_path, trunk, step, protocol, height, width):
    torch.manual_seed(0)
    model = MultiGrain(trunk or 'test_resnet', 0).eval()
    if trunk is None:
        model.trunk = Fixed()
    image = noise((90, 60), (9, 6))
    image.save(tmp_path / 'a.png')

    def nearest(*sides):
        return (24, 32) if step is None else tuple(max(1, round(side / step)) * step for side in sides)

    found, wanted = protocol.pixels(image, sizes=model.input_sizes), nearest(height, width)
    assert found.shape == (3, *wanted)
    if protocol.kind == 'longer-side' and wanted != (height, width):  # from the picture itself, not from a smaller one
        resized = np.asarray(image.resize(wanted[::-1], Image.Resampling.BILINEAR))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), resized)
    views = [view[0] for view in protocol.views(protocol.normalize(found)[None], model.input_sizes)]
    for view, scale in zip(views, protocol.scales, strict=True):
        assert tuple(view.shape[-2:]) == nearest(*(int(side * scale) for side in wanted))
    if trunk is not None:
        descriptor = extract(model, open_images(tmp_path / 'a.png'), protocol, workers=0).vectors
        assert descriptor.shape == (1, model.embed_dim) and torch.isfinite(descriptor).all()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='processes are looked up in /proc')
def test_workers_end_with_a_killed_process(tmp_path):
    for i in range(200):
        Image.new('RGB', (300, 300)).save(tmp_path / f'{i}.png')
    script = (
        'import multiprocessing, sys, time\n'
        'from timm_multigrain.embed.embedder import Embedder\n'
        'from timm_multigrain.models import MultiGrain\n'
        'from timm_multigrain.images.sources import find_images\n'
        'from timm_multigrain.embed.protocol import Protocol\n'
        'embedder = Embedder(MultiGrain("test_resnet", 0), Protocol(size=512), workers=2)\n'
        'images = embedder.decode(find_images(sys.argv[1]), range(200))\n'
        'next(images)\n'
        'print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n'
        'time.sleep(60)\n')
    process = subprocess.Popen([sys.executable, '-c', script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    workers = process.stdout.readline().split()
    assert len(workers) == 2
    process.kill()
    process.wait()

    def running(pid):
        try:
            return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 60
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(running, workers))
