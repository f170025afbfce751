"""Reading pictures: every kind of file by hand, the same in training as in commands, and nothing that harms."""
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from timm.data import ImageDataset, add_img_extensions, create_transform, get_img_extensions, set_img_extensions
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor

import timm_multigrain
from timm_multigrain.data import DecodedDataset, InstanceDataset, create_loader
from timm_multigrain.files import printable
from timm_multigrain.images.pixels import UnreadableImage, decode, open_image, read_image
from timm_multigrain.images.sources import find_images, open_images

from .pictures import noise, png_header

BLACK, GREY, WHITE, RED = (0, 0, 0), (127, 127, 127), (255, 255, 255), (255, 0, 0)


def test_modes(tmp_path, photo):
    for mode, kind in (('1', 'png'), ('P', 'png'), ('CMYK', 'jpg'), ('YCbCr', 'jpg'), ('CMYK', 'tif')):
        path = tmp_path / f'{mode}.{kind}'
        photo.convert(mode).save(path)
        with Image.open(path) as expected:
            assert read_image(path).mode == 'RGB' and read_image(path).tobytes() == expected.convert('RGB').tobytes()
        assert read_image(io.BytesIO(path.read_bytes())).tobytes() == read_image(path).tobytes()
    with pytest.raises(UnreadableImage, match=r'^image: is not an image'):
        read_image(io.BytesIO(b'text'))
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue', 'lime')]  # the first of an animation
    for name, options in (('x.gif', {}), ('x.webp', {'lossless': True}), ('x.png', {})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read_image(tmp_path / name).getpixel((3, 3)) == RED
    Image.new('RGB', (3200, 1600), 'red').save(tmp_path / 'x.jpg')
    assert read_image(tmp_path / 'x.jpg', size=400, max_pixels=400_000).size == (800, 400)


def test_ranges_of_wide_modes(tmp_path):
    grey = np.linspace(0, 1, 600).reshape(20, 30)
    for dtype, top in ((np.int32, 255), (np.int32, 65535), (np.float32, 1), (np.float32, 255)):
        Image.fromarray((grey * top).astype(dtype)).save(tmp_path / 'x.tif')
        got = np.asarray(read_image(tmp_path / 'x.tif')).astype(int)
        assert np.abs(got[..., 0] - grey * 255).max() <= 1.01
    # not a number is black
    Image.fromarray(np.array([[np.nan, 1, 0.5]], dtype=np.float32)).save(tmp_path / 'x.tif')
    assert np.asarray(read_image(tmp_path / 'x.tif'))[0, :, 0].tolist() == [0, 255, 128]


def palette(colours, transparency):
    image = Image.new('P', (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    return image, {'transparency': transparency}


def of_pixels(mode, pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image, {}


def key(mode, pixels, transparency):
    return of_pixels(mode, pixels)[0], {'transparency': transparency}


@pytest.mark.parametrize('picture, expected', [
    # black and red on nothing: on white; half of black on white is 255 * 127 / 255
    (of_pixels('RGBA', [(*BLACK, 255), (*WHITE, 0), (*BLACK, 0)]), [BLACK, WHITE, WHITE]),
    (of_pixels('RGBA', [(*RED, 255), (*RED, 0), (*BLACK, 128)]), [RED, WHITE, GREY]),
    # white on nothing: on black; half of white on black is 128
    (of_pixels('RGBA', [(*WHITE, 255), (*WHITE, 0), (*BLACK, 0)]), [WHITE, BLACK, BLACK]),
    (of_pixels('RGBA', [(*WHITE, 255), (*WHITE, 128), (*WHITE, 0)]), [WHITE, (128, 128, 128), BLACK]),
    # (3 * 255 + 195) / 4 = 240 is not nearly white, 241 is; what is seen little counts little
    (of_pixels('LA', [(255, 255), (255, 255), (255, 255), (195, 255), (9, 0)]), [WHITE] * 3 + [(195,) * 3, WHITE]),
    (of_pixels('LA', [(255, 255), (255, 255), (255, 255), (199, 255), (9, 0)]), [WHITE] * 3 + [(199,) * 3, BLACK]),
    (of_pixels('LA', [(255, 255), (0, 1), (0, 0)]), [WHITE, BLACK, BLACK]),
    # nothing to be seen
    (of_pixels('LA', [(7, 0), (255, 0)]), [WHITE, WHITE]),
    # palettes: one transparent colour, and an opacity for each
    (palette([BLACK, RED], 1), [BLACK, WHITE]),
    (palette([WHITE, RED], 1), [WHITE, BLACK]),
    (palette([RED, BLACK, WHITE], bytes([255, 128, 0])), [RED, GREY, WHITE]),
    # a transparent colour: grey, RGB, and 16 bits, in which 514 / 257 is 2
    (key('L', [0, 10, 11], 10), [BLACK, WHITE, (11, 11, 11)]),
    (key('RGB', [RED, WHITE, WHITE], RED), [BLACK, WHITE, WHITE]),
    (key('I;16', [514, 10, 65535 - 257], 10), [(2, 2, 2), WHITE, (254, 254, 254)]),
])
def test_transparent_parts(tmp_path, picture, expected):
    image, kwargs = picture
    image.save(tmp_path / 'x.png', **kwargs)
    assert [read_image(tmp_path / 'x.png').getpixel((x, 0)) for x in range(len(expected))] == expected
    with Image.open(tmp_path / 'x.png') as opened:
        assert decode(opened).tobytes() == read_image(tmp_path / 'x.png').tobytes()


def test_large_images_are_put_together_of_strips(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (700, 3000, 4))  # two strips
    pixels = values.astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'x.png', compress_level=1)
    alpha = values[..., 3:]
    expected = (values[..., :3] * alpha + 255 * (255 - alpha)) / 255
    assert np.abs(np.asarray(read_image(tmp_path / 'x.png')) - expected).max() <= 0.51


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(tmp_path, photo, orientation):
    upright = photo
    for turn in {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}.get(orientation, []):  # Pillow's Transpose
        upright = upright.transpose(turn)
    for name, expected in (('x.png', upright), ('grey.png', upright.convert('L').convert('RGB'))):
        (photo if name == 'x.png' else photo.convert('L')).save(tmp_path / name, **turned(orientation))
        assert read_image(tmp_path / name).tobytes() == expected.tobytes()
        assert decode(read_image(tmp_path / name)).tobytes() == expected.tobytes()  # once only
        with Image.open(tmp_path / name) as image:
            twice = decode(decode(image))
            assert twice.size == expected.size and twice.tobytes() == expected.tobytes()
    assert read_image(tmp_path / 'x.png', exif=False).tobytes() == photo.tobytes()
    with Image.open(tmp_path / 'x.png') as image:
        assert decode(image, exif=False).tobytes() == photo.tobytes()


def test_unreadable(tmp_path, photo):
    data = io.BytesIO()
    photo.save(data, 'JPEG')
    data = data.getvalue()
    (tmp_path / 'empty.jpg').write_bytes(b'')
    (tmp_path / 'text.jpg').write_bytes(b'not an image')
    (tmp_path / 'cut.jpg').write_bytes(data[:len(data) // 2])
    (tmp_path / 'bomb.png').write_bytes(png_header(60_000, 60_000))
    (tmp_path / 'large.png').write_bytes(png_header(12_000, 12_000))
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'loop.jpg').symlink_to('loop.jpg')
    for name, reason in {
            'empty.jpg': 'is empty', 'text.jpg': 'is not an image', 'cut.jpg': 'truncated', 'bomb.png': 'pixels',
            'large.png': '', 'folder.jpg': 'is a folder', 'missing.jpg': 'no such file', 'loop.jpg': '',
            'nul\0.jpg': 'null'}.items():
        with pytest.raises(UnreadableImage) as e:
            read_image(f'{tmp_path}/{name}')
        assert str(e.value).startswith(f'{tmp_path}/{printable(name)}: ') and reason in str(e.value).lower()
        assert '\n' not in str(e.value)
    photo.save(tmp_path / 'x.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff')  # damaged, and ignored
    assert read_image(tmp_path / 'x.jpg', max_pixels=600).size == (30, 20)
    with pytest.raises(UnreadableImage, match='30 x 20 pixels are more than 599'):
        read_image(tmp_path / 'x.jpg', max_pixels=599)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b'', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0', b'GIF89a', b'RIFF']))
def test_any_bytes(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / 'any.jpg'
    path.write_bytes(start + data)
    try:
        assert read_image(path).mode == 'RGB'
    except UnreadableImage as e:
        assert str(path) in str(e)


def test_nothing_but_regular_files_of_known_formats_is_opened(tmp_path, photo, monkeypatch):
    ran = tmp_path / 'ran'
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\ntouch {ran}\n')
    (tmp_path / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)
    folder = tmp_path / 'images'
    folder.mkdir()
    for kind, name in (('EPS', 'eps.jpg'), ('PDF', 'pdf.png'), ('ICO', 'ico.gif')):
        with open(folder / name, 'wb') as file:
            photo.save(file, kind)
    for name in ('eps.jpg', 'pdf.png', 'ico.gif'):
        with pytest.raises(UnreadableImage, match=r'is not an image in a format that is read here \(JPEG, PNG'):
            read_image(folder / name)
    with pytest.raises(Image.UnidentifiedImageError), open(folder / 'eps.jpg', 'rb') as file:
        open_image(file)
    assert not ran.exists()
    with pytest.raises(OSError), Image.open(folder / 'eps.jpg') as image:
        image.load()
    assert ran.exists()  # it would have been run

    os.mkfifo(folder / 'fifo.jpg')
    (folder / 'zero.jpg').symlink_to('/dev/zero')
    (folder / 'nowhere.jpg').symlink_to('gone.jpg')
    photo.save(tmp_path / 'photo.png')
    (folder / 'link.png').symlink_to(tmp_path / 'photo.png')
    for name in ('fifo.jpg', 'zero.jpg'):
        with pytest.raises(UnreadableImage, match=f'{name}: is not a regular file'):
            read_image(folder / name)
    assert find_images(folder).names == ['eps.jpg', 'ico.gif', 'link.png', 'nowhere.jpg', 'pdf.png']
    with pytest.raises(UnreadableImage, match=r'nowhere\.jpg: no such file'):
        read_image(folder / 'nowhere.jpg')
    with pytest.raises(FileNotFoundError, match='is not a folder, a list of images'):
        open_images(folder / 'fifo.jpg')


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='Linux tells the peak')
@pytest.mark.parametrize('mode', ['RGBA', 'F'])
def test_memory_a_pixel(tmp_path, mode):
    """12 bytes and what a strip takes, of a file that holds next to nothing, turned by its EXIF orientation."""
    side, exif = 5000, Image.Exif()
    exif[0x112] = 6
    kwargs = {'compression': 'tiff_lzw'} if mode == 'F' else {}
    path = tmp_path / ('x.tif' if kwargs else 'x.png')
    Image.new(mode, (side, side)).save(path, exif=exif, **kwargs)
    Path('/proc/self/clear_refs').write_text('5')
    before = memory('VmRSS')
    assert read_image(path).size == (side, side)
    assert memory('VmHWM') - before < 12.5 * side ** 2 + 64e6


def memory(what):
    """Bytes that this process takes (VmRSS), or took at most (VmHWM)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_formats_that_take_more_memory_hold_fewer_pixels(tmp_path):
    """A WebP file of 36 bytes and a JPEG 2000 file of 1 kB took 2.8 and 4.3 GB."""
    def patched(format, kind, offset, size):
        buffer = io.BytesIO()
        Image.new('RGB', (64, 64)).save(buffer, format, **({'lossless': True} if format == 'WEBP' else {}))
        data = bytearray(buffer.getvalue())
        start = data.index(kind) + offset
        data[start:start + len(size)] = size
        return io.BytesIO(data)

    def webp(width, height):
        return patched('WEBP', b'VP8L', 9, struct.pack('<I', width - 1 | (height - 1) << 14))

    def jp2(width, height):
        return patched('JPEG2000', b'ihdr', 4, struct.pack('>II', height, width))

    for make, fits, limit in ((webp, (16_000, 8388), 2 ** 31 // 16), (jp2, (9000, 9940), 2 ** 31 // 24)):
        with open_image(make(*fits)) as image:
            assert image.size == fits
        width, height = fits
        with pytest.raises(UnreadableImage, match=f'{width} x {height + 10} pixels are more than {limit} in all'):
            read_image(make(width, height + 10))
        with pytest.raises(UnreadableImage, match='more than 1000 in all'):
            read_image(make(*fits), max_pixels=1000)


def test_all_images_are_opened_in_one_place():
    """But for a JPEG file that the demo has just written to memory, and the text of a card."""
    package = Path(timm_multigrain.__file__).parent
    openers = [path for path in package.rglob('*.py') if 'Image.open(' in path.read_text()]
    assert {str(path.relative_to(package)) for path in openers} == {
        'images/pixels.py', 'images/copies.py', 'hub/card.py'}


RAMP = np.arange(45 * 35, dtype=np.uint16).reshape(35, 45) * 41
ALPHA = Image.fromarray((RAMP >> 8).astype(np.uint8))
PICTURE = noise((45, 35), (9, 7))
DRAWING = Image.new('RGBA', (45, 35), (0, 0, 0, 0))  # white lines on transparent black
ImageDraw.Draw(DRAWING).line([(5, 5), (40, 30)], fill=(255, 255, 255, 255), width=3)
TRANSPARENT, GREY_TRANSPARENT = PICTURE.copy(), PICTURE.convert('L')
TRANSPARENT.putalpha(ALPHA)
GREY_TRANSPARENT.putalpha(ALPHA)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {'exif': exif}


KINDS = {
    'grey.jpg': (PICTURE.convert('L'), {}), 'rgb.jpg': (PICTURE, {}), 'cmyk.jpg': (PICTURE.convert('CMYK'), {}),
    'turned.jpg': (PICTURE, turned(6)), 'mirrored grey.jpg': (PICTURE.convert('L'), turned(5)),
    'transparent.png': (TRANSPARENT, {}), 'drawing.png': (DRAWING, {}), 'deep.png': (Image.fromarray(RAMP), {}),
    'palette.png': (PICTURE.quantize(16), {'transparency': 3}), 'la.png': (GREY_TRANSPARENT, {}),
    'turned.png': (PICTURE, turned(8)),
    'animated.gif': (PICTURE, {'save_all': True, 'append_images': [DRAWING.convert('RGB')]}),
    'deep.tif': (Image.fromarray(RAMP), {}), 'lossless.webp': (TRANSPARENT, {'lossless': True})}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """One of each kind in a folder for its class."""
    root = tmp_path_factory.mktemp('files')
    for number, (name, (image, kwargs)) in enumerate(KINDS.items()):
        (root / f'{number:02d}').mkdir()
        image.save(root / f'{number:02d}' / name, **kwargs)
    known = get_img_extensions()
    add_img_extensions(('.gif', '.tif', '.webp'))
    yield root
    set_img_extensions(known)


def as_commands_see(files):
    return [PILToTensor()(read_image(path)) for path in sorted(files.rglob('*.*'))]


def in_tar(files):
    with tarfile.open(files.parent / 'images.tar', 'w') as file:
        file.add(files, '.')
    return ImageDataset(str(files.parent / 'images.tar'), reader='tar')


class Streams:
    """As timm's reader of Hugging Face data sets gives images."""

    def __init__(self, files):
        self.paths = sorted(files.rglob('*.*'))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return io.BytesIO(self.paths[index].read_bytes()), index


def folder(files):
    return ImageFolder(files, is_valid_file=lambda path: True)  # its list of suffixes has no GIF


DATASETS = {
    'tar': in_tar,
    'streams': lambda files: ImageDataset('', reader=Streams(files)),
    'subsets': lambda files: ConcatDataset([
        Subset(folder(files), range(9)), Subset(ImageDataset(str(files)), range(9, len(KINDS)))]),
}


@pytest.mark.parametrize('kind', DATASETS)
def test_training_and_validation_see_what_the_commands_see(files, kind):
    expected = as_commands_see(files)
    for make in (DecodedDataset, InstanceDataset, lambda dataset: InstanceDataset(dataset, fast=True)):
        dataset = make(DATASETS[kind](files))
        dataset.transform = Compose([PILToTensor()])
        for index, (name, pixels) in enumerate(zip(KINDS, expected, strict=True)):
            assert torch.equal(dataset[index][0], pixels), name


@pytest.mark.parametrize('fast', [False, True])
def test_timms_way(files, fast):
    reference = ImageDataset(str(files), transform=PILToTensor())
    dataset = InstanceDataset(ImageDataset(str(files)), 'timm', fast=fast)
    dataset.transform = Compose([PILToTensor()])
    for index in range(len(KINDS)):
        assert torch.equal(dataset[index][0], reference[index][0])
    assert reference[list(KINDS).index('drawing.png')][0].min() == 0
    grey = DecodedDataset(ImageDataset(str(files), input_img_mode='L'))  # a model of one channel
    assert all(np.array_equal(grey[index][0], read_image(path).convert('L'))
               for index, path in enumerate(sorted(files.rglob('*.*'))))
    with pytest.raises(ValueError, match="decode is 'pillow': give one of multigrain, timm"):
        InstanceDataset(reference, 'pillow')


@pytest.mark.parametrize('decode', ['multigrain', 'timm'])
def test_loader_of_validation(files, decode):
    """timm's own, with its transform."""
    dataset = ImageDataset(str(files))
    loader = create_loader(
        dataset, 32, 4, is_training=False, decode=decode, use_prefetcher=False, device=torch.device('cpu'),
        num_workers=0)
    images, targets = map(torch.cat, zip(*loader, strict=True))
    transform = create_transform(32)
    for index, path in enumerate(sorted(files.rglob('*.*'))):
        image = read_image(path) if decode == 'multigrain' else Image.open(path).convert('RGB')
        assert torch.equal(images[index], transform(image))
    assert targets.tolist() == list(range(len(KINDS))) and dataset.transform is None
