"""Edited copies: each edit does what its name says, on every mode and shape, without chance."""
import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from timm_multigrain.demo.pictures import draw_picture
from timm_multigrain.images.copies import COPY_TRANSFORMS, EDITS, make_copies

NAMES = ['crop', 'jpeg', 'rotate', 'blur', 'colour', 'mirror', 'text', 'strong']


@pytest.fixture(scope='module')
def picture():
    return draw_picture('fish', 112, np.random.default_rng(0))


def pixels(image):
    return np.asarray(image, dtype=np.float64)


def test_names_and_determinism(picture):
    before = pixels(picture)
    copies = make_copies(picture)
    assert list(COPY_TRANSFORMS) == list(copies) == NAMES
    again = make_copies(picture.copy())
    for name, copy in copies.items():
        assert copy.mode == 'RGB'
        assert np.array_equal(pixels(copy), pixels(again[name]))
        assert copy.size != picture.size or not np.array_equal(pixels(copy), before)
    assert np.array_equal(pixels(picture), before)
    assert list(make_copies(picture, ['text', 'crop'])) == ['text', 'crop']


@pytest.mark.parametrize('size', [(640, 401), (97, 300)])
def test_crop_keeps_half_of_the_area(size):
    x, y = np.meshgrid(np.arange(size[0]) % 256, np.arange(size[1]) % 256)
    image = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    copy = make_copies(image, ['crop'])['crop']
    assert 0.48 < copy.width * copy.height / (image.width * image.height) <= 0.5
    left, top = copy.getpixel((0, 0))[:2]
    expected = image.crop((left, top, left + copy.width, top + copy.height))
    assert left and top and np.array_equal(pixels(copy), pixels(expected))


@pytest.mark.parametrize('size', [(97, 131), (400, 30), (30, 400), (500, 375)])
def test_rotate_has_no_empty_corner(size):
    copy = make_copies(Image.new('RGB', size, 'white'))['rotate']
    assert pixels(copy).min() == 255
    turned = pixels(Image.new('L', size, 'white').rotate(15, Image.BICUBIC, expand=True)) > 254
    width, height = copy.width + 6, copy.height + 6
    left, top = (turned.shape[1] - width) // 2, (turned.shape[0] - height) // 2
    assert not turned[top:top + height, left:left + width].all()  # nothing much larger would do


def test_each_by_hand(picture):
    copies, buffer = make_copies(picture), io.BytesIO()
    picture.save(buffer, 'JPEG', quality=8)
    assert np.array_equal(pixels(copies['jpeg']), pixels(Image.open(buffer)))
    assert np.array_equal(pixels(copies['blur']), pixels(picture.filter(ImageFilter.GaussianBlur(2.24))))
    assert np.array_equal(pixels(copies['mirror']), pixels(picture)[:, ::-1])
    assert pixels(copies['colour']).mean() < 0.85 * pixels(picture).mean()
    assert np.ptp(pixels(copies['colour']), axis=2).mean() < 0.6 * np.ptp(pixels(picture), axis=2).mean()
    assert np.array_equal(pixels(copies['text'])[:84], pixels(picture)[:84])
    band = pixels(copies['text'])[84:]
    assert (band == 20).mean() > 0.5 and (band > 200).mean() > 0.03
    line = Image.new('L', (201, 201))
    line.paste(255, (100, 0, 101, 201))
    y, x = np.nonzero(pixels(make_copies(line)['rotate'])[..., 0] > 120)
    assert abs(np.degrees(np.arctan(np.polyfit(y, x, 1)[0]))) == pytest.approx(15, abs=0.5)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'F', 'I;16'])
def test_any_mode_and_size(mode):
    for size in ((1, 1), (1, 3000), (3000, 1), (2, 3), (800, 20)):
        picture = Image.new(mode, size)
        for copy in (*make_copies(picture).values(), *(edit(picture.convert('RGB')) for edit in EDITS.values())):
            assert copy.mode == 'RGB' and min(copy.size) >= 1
