"""The protocols against the original's numbers, timm's transform and the public evaluators; views; extreme shapes."""
import json
from functools import cache

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms as T

from timm_multigrain.embed.protocol import MS_SCALES, Protocol

from .tiny import tiny_model


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def blank(width, height):
    return Image.new('RGB', (width, height))


def array(pixels):
    return pixels.permute(1, 2, 0).numpy()


def test_sizes_equal_original(golden):
    content = json.loads((golden / 'resize.json').read_text())
    rows = content['resize']['rows']
    assert len(rows) == 21 * 7 * 2
    for width, height, size, largest, target_height, target_width in rows:
        expected = max(1, target_height), max(1, target_width)  # the original fails where a side becomes 0
        if largest:
            resized = Protocol(size, 'longer-side', interpolation='nearest').pixels(blank(width, height)).shape[1:]
        else:  # before the crop, as torchvision does it
            resized = T.Resize(size)(torch.empty(3, height, width, device='meta')).shape[1:]
        assert tuple(resized) == expected
    for size, side in content['validation_shorter_side_for_crop'].items():
        assert int(int(size) / Protocol(int(size)).crop_pct) == side


@pytest.mark.parametrize('width, height', [(500, 375), (333, 500), (224, 224), (97, 131), (1000, 32), (8, 8)])
def test_pixels_by_hand(width, height):
    image = noise(width, height)
    short, long = min(width, height), max(width, height)
    w, h = 109 * width // short, 109 * height // short  # 96 / 0.875
    top, left = round((h - 96) / 2), round((w - 96) / 2)
    expected = np.asarray(image.resize((w, h), Image.BILINEAR).crop((left, top, left + 96, top + 96)))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    protocol = Protocol(96, mean=mean, std=std)
    pixels = protocol.pixels(image)
    assert pixels.dtype == torch.uint8 and np.array_equal(array(pixels), expected)
    got = protocol.transform(image)
    np.testing.assert_allclose(array(got), (expected / 255 - mean) / std, atol=1e-5)
    assert torch.equal(protocol.normalize(pixels[None].repeat(3, 1, 1, 1))[2], got)
    w, h = max(1, 96 * width // long), max(1, 96 * height // long)
    assert np.array_equal(array(Protocol(96, 'longer-side').pixels(image)), image.resize((w, h), Image.BILINEAR))
    assert np.array_equal(array(Protocol(96, 'shorter-side').pixels(image)), T.Resize(96)(image))


@pytest.mark.parametrize('shape, box, expected', [
    ((400, 300), None, (100, 75)), ((300, 401), None, (75, 100)), ((100, 40), None, (100, 40)), ((9, 2), None, (9, 2)),
    ((400, 300), (0, 0, 100, 60), (25, 15)),  # a quarter, as the whole image
    ((400, 300), (10, 10, 211, 20), (50, 3)),  # at most 50.25; 201 : 10 is nearer to 50 : 3 than to 50 : 2
    ((80, 60), (0, 0, 10, 20), (10, 20)), ((2000, 10), (5, 0, 9, 9), (1, 1))])
def test_thumbnail(shape, box, expected):
    """As the public evaluators do it: Pillow's thumbnail, nothing enlarged, a part reduced as the whole."""
    image = noise(*shape)
    part = image if box is None else image.crop(box)
    got = Protocol(100, 'thumbnail').pixels(part, image.size)
    factor = min(1, 100 / max(shape))
    wanted = part.copy()
    wanted.thumbnail([max(1, int(factor * max(part.size)))] * 2, Image.Resampling.LANCZOS)
    assert wanted.size == expected and part.size == (image if box is None else image.crop(box)).size
    np.testing.assert_array_equal(array(got), np.asarray(wanted))


@pytest.mark.parametrize('shape', [(20_000, 1), (1, 20_000), (20_000, 30)])
def test_long_images(shape):
    image = noise(*shape)
    assert Protocol(64, 'crop').pixels(image).shape == (3, 64, 64)
    assert sorted(Protocol(64, 'longer-side').pixels(image).shape[1:]) == [1, 64]
    stripes = np.zeros((10, 2000, 3), dtype=np.uint8)
    stripes[:, 995:1005] = 255  # in the centre, and there in the crop
    got = Protocol(224, 'crop').pixels(Image.fromarray(stripes))[0].float()
    np.testing.assert_allclose((got * torch.arange(224)).sum() / got.sum(), 111.5, atol=1)


def test_views():
    x = torch.randn(2, 3, 10, 15)
    assert [[tuple(v.shape[-2:]) for v in views] for views in Protocol(scales=MS_SCALES).views(x)] == [
        [(10, 15)], [(7, 10)], [(5, 7)]]
    (same, mirrored), = Protocol(flip=True).views(x)
    assert same is x and torch.equal(mirrored, x[..., range(14, -1, -1)])
    assert [v.shape[-2:] for v, in Protocol(scales=(0.5,)).views(torch.zeros(1, 3, 1, 9))] == [(1, 4)]
    ramp = torch.arange(15.).expand(1, 3, 4, 15)
    (view,), = Protocol(scales=(0.7,)).views(ramp)  # 10 columns, of which each stands for 1 / 0.7 of the ramp's
    np.testing.assert_allclose(view[0, 0, 0], [(i + 0.5) / 0.7 - 0.5 for i in range(10)], rtol=1e-5)


def test_for_model():
    model = tiny_model()
    cfg = model.pretrained_cfg
    own = {name: cfg[name] for name in ('mean', 'std', 'crop_pct', 'interpolation')}
    assert Protocol.for_model(model) == Protocol(cfg['input_size'][-1], 'longer-side', **own)
    assert Protocol.for_model(model, size=96, kind='thumbnail', flip=None, interpolation='bicubic') == Protocol(
        96, 'thumbnail', **{**own, 'interpolation': 'lanczos'})
    protocol = Protocol(500, 'longer-side', (1, 0.7071, 0.5), flip=True, exif=False)
    assert str(protocol) == (
        'longer side 500, smaller images enlarged, scales 1 0.7071 0.5, flip, EXIF ignored')
    assert Protocol(**json.loads(json.dumps(protocol.to_dict()))) == protocol


@pytest.mark.parametrize('cfg', [
    dict(crop_pct=0.95, interpolation='bicubic'),
    dict(crop_pct=1.0, interpolation='bicubic', mean=(0.,) * 3, std=(1.,) * 3),
    dict(crop_pct=0.9, interpolation='bicubic', crop_mode='squash'),
    dict(crop_pct=0.9, interpolation='bilinear', crop_mode='border', mean=(0.1, 0.5, 0.9)),
    dict(crop_pct=0.8, test_crop_pct=1.0, test_input_size=(3, 72, 72), interpolation='lanczos')])
def test_a_model_is_tested_as_timm_tests_it(cfg):
    model = tiny_model()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 64, 64), **cfg)
    protocol = Protocol.for_model(model, 'crop')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    for image in (noise(50, 37), noise(37, 50), noise(300, 20)):
        got, expected = protocol.transform(image), transform(image)
        assert got.shape == expected.shape and torch.equal(got, expected), image.size


@pytest.mark.parametrize('kwargs, message', [
    ({'size': 0}, 'size is 0'), ({'size': 10**23}, 'from 1 to 65535 pixels'),
    ({'size': 2.5}, r'size is 2\.5'), ({'kind': 'square'}, "kind is 'square'"),
    ({'crop_pct': 0}, 'crop_pct is 0'), ({'interpolation': 'best'}, "interpolation is 'best'"),
    ({'crop_mode': 'left'}, "crop_mode is 'left'"), ({'scales': ()}, 'scales are'),
    ({'scales': (1, 0)}, 'scales are'), ({'scales': (float('nan'),)}, 'scales are')])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**kwargs)
