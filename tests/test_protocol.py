"""The protocols against the transforms of the paper and the public evaluators, the views, and extreme shapes."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_multigrain.embed.protocol import MS_SCALES, Protocol
from timm_multigrain.images.transforms import create_eval_transform

from .tiny import tiny_model


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('kind', ['crop', 'longer-side'])
@pytest.mark.parametrize('size', [32, 65])
@pytest.mark.parametrize('shape', [(50, 37), (37, 50), (8, 8), (300, 20), (1, 1)])
def test_equals_the_transforms(kind, size, shape):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    protocol = Protocol(size, kind, mean=mean, std=std)
    image = noise(*shape)
    expected = create_eval_transform(size, kind, mean, std)(image)
    pixels = protocol.pixels(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(protocol.normalize(pixels), expected)
    assert torch.equal(protocol.normalize(pixels[None].repeat(3, 1, 1, 1))[2], expected)


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
    np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), np.asarray(wanted))


@pytest.mark.parametrize('shape', [(20_000, 1), (1, 20_000), (20_000, 30), (3, 5_000)])
def test_long_images(shape):
    image = noise(*shape)
    assert Protocol(64, 'crop').pixels(image).shape == (3, 64, 64)
    longer = Protocol(64, 'longer-side').pixels(image)
    assert max(longer.shape[1:]) == 64 and min(longer.shape[1:]) == 1


def test_centre_of_a_long_image():
    stripes = np.zeros((10, 2000, 3), dtype=np.uint8)
    stripes[:, 995:1005] = 255
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
    assert Protocol.for_model(model) == Protocol(
        cfg['input_size'][-1], 'longer-side', **{
            name: cfg[name] for name in ('mean', 'std', 'crop_pct', 'interpolation')})
    assert Protocol.for_model(model, 'crop').kind == 'crop'
    assert Protocol.for_model(model, size=96, kind='thumbnail', flip=None, interpolation='bicubic') == Protocol(
        96, 'thumbnail', mean=cfg['mean'], std=cfg['std'], crop_pct=cfg['crop_pct'], interpolation='lanczos')
    model.pretrained_cfg = dict(cfg, test_input_size=(3, 288, 288))
    assert Protocol.for_model(model).size == 288


@pytest.mark.parametrize('cfg', [
    dict(crop_pct=0.875, interpolation='bilinear'), dict(crop_pct=0.95, interpolation='bicubic'),
    dict(crop_pct=1.0, interpolation='bicubic', mean=(0.,) * 3, std=(1.,) * 3),
    dict(crop_pct=0.9, interpolation='bicubic', crop_mode='squash'),
    dict(crop_pct=0.9, interpolation='bilinear', crop_mode='border', mean=(0.1, 0.5, 0.9)),
    dict(crop_pct=0.8, test_crop_pct=1.0, test_input_size=(3, 72, 72), interpolation='lanczos')])
def test_a_model_is_tested_as_timm_tests_it(cfg):
    model = tiny_model()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 64, 64), **cfg)
    protocol = Protocol.for_model(model, 'crop')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    for image in (noise(50, 37), noise(37, 50), noise(64, 64), noise(300, 20), noise(171, 128)):
        got, expected = protocol.normalize(protocol.pixels(image)), transform(image)
        assert got.shape == expected.shape and torch.equal(got, expected), image.size


def test_shown_and_stored():
    protocol = Protocol(500, 'longer-side', MS_SCALES, flip=True, exif=False)
    assert str(protocol) == 'longer side 500, smaller images enlarged, scales 1 0.7071 0.5, flip, EXIF ignored'
    assert str(Protocol(500, 'thumbnail')) == 'longer side at most 500 (thumbnail), smaller images as they are, lanczos'
    assert Protocol(**protocol.to_dict()) == protocol
    assert str(Protocol()) == 'crop 224'
    assert str(Protocol(64, crop_pct=1, interpolation='bicubic')) == 'crop 64, crop_pct 1, bicubic'
    assert str(Protocol(64, crop_mode='squash')) == 'crop 64, squash'


@pytest.mark.parametrize('kwargs, message', [
    ({'size': 0}, 'size is 0'), ({'size': 10**23}, 'from 1 to 65535 pixels'),
    ({'size': 2.5}, r'size is 2\.5'), ({'kind': 'square'}, "protocol is 'square'"),
    ({'crop_pct': 0}, 'crop_pct is 0'), ({'interpolation': 'best'}, "interpolation is 'best'"),
    ({'crop_mode': 'left'}, "crop_mode is 'left'"), ({'scales': ()}, 'scales are'),
    ({'scales': (1, 0)}, 'scales are'), ({'scales': (float('nan'),)}, 'scales are')])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**kwargs)
