"""TensorTransform: the augmentations of timm's transform, with the same random numbers, on tensors."""
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as T

from timm_multigrain.data import fast
from timm_multigrain.data.fast import TensorTransform, decode, on_tensors
from timm_multigrain.images.pixels import UnreadableImage, read_image


def picture(width=90, height=70, seed=0):
    """Smooth, as photographs are, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image, format='JPEG', **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pillow(content):
    return Image.open(io.BytesIO(content)).convert('RGB')


def seeded(function, *arguments, seed=0):
    """What a function gives, and what the generators give after it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return function(*arguments), (random.random(), np.random.rand(), torch.rand(1).item())


EXACT = {
    'one size': dict(scale=(1, 1), ratio=(9 / 7, 9 / 7), color_jitter=(0.4, 0.5, 0.6)),
    'nearest': dict(interpolation='nearest', auto_augment='original'),
    'lanczos': dict(interpolation='lanczos'),
    'box': dict(interpolation='box', hflip=0, vflip=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1)),
}


@pytest.mark.parametrize('name', EXACT)
@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_without_another_kernel_nothing_differs(name, use_prefetcher):
    transform = create_transform((3, 70, 90), True, use_prefetcher=use_prefetcher, **EXACT[name])
    tensors = TensorTransform(transform)
    for i in range(10):
        content = encoded(picture(seed=i))
        expected, after = seeded(transform, pillow(content), seed=i)
        found, drawn = seeded(tensors, decode(content), seed=i)
        assert torch.equal(found, expected) and drawn == after


NEAR = {
    'default': {},
    'bicubic': dict(interpolation='bicubic', color_jitter=None),
    'random': dict(interpolation='random', scale=(0.3, 1), ratio=(1, 1), hflip=0, vflip=0.5),
    'no augmentation': dict(no_aug=True),
    'RandAugment': dict(auto_augment='rand-m9-mstd0.5-inc1'),
    'AugMix': dict(auto_augment='augmix-m5-w4-d2'),
    'SimCLR': dict(color_jitter_prob=0.5, grayscale_prob=0.3, gaussian_blur_prob=0.5),
    'keep ratio': dict(train_crop_mode='rkrc'),
    'erasing': dict(re_prob=0.7, re_mode='pixel'),
}


@pytest.mark.parametrize('name', NEAR)
@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_same_augmentations_as_timm(name, use_prefetcher):
    scale = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    transform = create_transform(48, True, use_prefetcher=use_prefetcher, **scale, **NEAR[name])
    tensors = TensorTransform(transform)
    grey_levels = 1 if use_prefetcher else 255 * 0.25
    for i in range(8):
        content = encoded(picture(seed=i))
        expected, after = seeded(transform, pillow(content), seed=i)
        found, drawn = seeded(tensors, decode(content), seed=i)
        assert drawn == after
        assert found.shape == expected.shape == (3, 48, 48) and found.dtype == expected.dtype
        off = (found.double() - expected.double()).abs() * grey_levels
        assert off.mean() < 0.5 and off.median() <= 1.01
        if 'ug' not in name:  # policies that equalize or solarize can turn one level into many
            assert off.max() < 16


@pytest.mark.parametrize('factors', [(0.4, 0.4, 0.4), (0.9, 0, 0), (0, 0.9, 0), (0, 0, 0.9), (1, 1, 1)])
def test_jitter_equals_pillow(factors):
    step = T.ColorJitter(*factors)
    pictures = [picture(61, 53, seed=i) for i in range(20)] + [Image.new('RGB', (300, 300), (255, 0, 255))]
    for i, image in enumerate(pictures):
        pixels = T.functional.pil_to_tensor(image)
        before = pixels.clone()
        expected, after = seeded(step, image, seed=i)
        found, drawn = seeded(on_tensors(step), pixels, seed=i)
        assert torch.equal(found, T.functional.pil_to_tensor(expected)) and drawn == after
        assert torch.equal(pixels, before)


CONTENTS = {
    'grey': lambda: encoded(picture().convert('L')),
    'CMYK': lambda: encoded(picture().convert('CMYK')),
    'progressive': lambda: encoded(picture(), progressive=True),
    'turned by EXIF': lambda: encoded(picture(), exif=_turned()),
    'png': lambda: encoded(picture(), 'PNG'),
    'two pictures': lambda: encoded(picture(), 'MPO', save_all=True, append_images=[picture(seed=1)]),
}


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize('kind', CONTENTS)
@pytest.mark.parametrize('by', ['torchvision', 'Pillow alone'])
def test_decoding(monkeypatch, kind, by):
    content = CONTENTS[kind]()
    if by != 'torchvision':
        monkeypatch.setattr(fast, 'decode_jpeg', None)
    assert torch.equal(decode(content), T.functional.pil_to_tensor(read_image(io.BytesIO(content))))
    assert torch.equal(decode(content, 'timm'), T.functional.pil_to_tensor(pillow(content)))


@pytest.mark.parametrize('content', [b'', b'no image', encoded(picture(400, 300))[:-3000]], ids=len)
def test_broken_content(content):
    with pytest.raises(UnreadableImage, match=r'truncated|is not an image'):
        decode(content)
    with pytest.raises(OSError, match=r'truncated|cannot identify'):
        decode(content, 'timm')


def test_photographs(shared_data):
    transform = create_transform(224, True, use_prefetcher=True)
    tensors = TensorTransform(transform)
    for i, path in enumerate(sorted((shared_data / 'photos').iterdir())[::20]):
        content = path.read_bytes()
        assert torch.equal(decode(content), T.functional.pil_to_tensor(pillow(content)))
        expected, _ = seeded(transform, pillow(content), seed=i)
        found, _ = seeded(tensors, decode(content), seed=i)
        off = (found.int() - expected.int()).abs()
        assert off.max() <= 8 and (off > 0).double().mean() < 0.12


def test_results_share_no_memory():
    image = decode(encoded(picture(64, 64)))
    before = image.clone()
    tensors = TensorTransform(create_transform(64, True, no_aug=True, use_prefetcher=True))
    first, second = tensors(image), tensors(image)
    first.zero_()
    assert torch.equal(second, before) and torch.equal(image, before)


def test_steps_of_other_kinds():
    class Own:
        def __call__(self, image):
            assert isinstance(image, Image.Image)
            return image.rotate(90)

    own = on_tensors(Own())
    assert 'Own' in repr(own)
    pixels = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    assert torch.equal(own(pixels), pixels.rot90(dims=(1, 2)))
    with pytest.raises(ValueError, match='cannot take function apart'):
        TensorTransform(lambda image: image)
