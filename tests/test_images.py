"""Reading images of every kind, and finding them."""
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_multigrain.images.sources import (
    ImageFiles,
    UnreadableImage,
    find_images,
    open_images,
    printable,
    read_image,
    read_list,
)


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


@pytest.mark.parametrize('mode, extension', [
    ('RGB', 'png'), ('L', 'png'), ('1', 'png'), ('P', 'png'), ('CMYK', 'jpg'), ('YCbCr', 'jpg'), ('CMYK', 'tif')])
def test_modes(tmp_path, photo, mode, extension):
    path = tmp_path / f'x.{extension}'
    photo.convert(mode).save(path)
    image = read_image(path)
    with Image.open(path) as expected:
        assert image.mode == 'RGB' and image.tobytes() == expected.convert('RGB').tobytes()


def test_sixteen_bits(tmp_path):
    grey = np.linspace(0, 65535, 600).round().astype(np.uint16).reshape(20, 30)
    Image.fromarray(grey).save(tmp_path / 'x.png')
    got = np.asarray(read_image(tmp_path / 'x.png'))
    np.testing.assert_array_equal(got, np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize('dtype, top', [(np.int32, 255), (np.int32, 65535), (np.float32, 1), (np.float32, 255)])
def test_ranges_of_wide_modes(tmp_path, dtype, top):
    grey = np.linspace(0, 1, 600).reshape(20, 30)
    Image.fromarray((grey * top).astype(dtype)).save(tmp_path / 'x.tif')
    got = np.asarray(read_image(tmp_path / 'x.tif')).astype(int)
    assert np.abs(got[..., 0] - grey * 255).max() <= 1.01


def test_not_a_number_is_black(tmp_path):
    Image.fromarray(np.array([[np.nan, 1, 0.5]], dtype=np.float32)).save(tmp_path / 'x.tif')
    assert np.asarray(read_image(tmp_path / 'x.tif'))[0, :, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparent_is_white(tmp_path, mode):
    image = Image.new('RGBA', (4, 2), (255, 0, 0, 0)).convert(mode)
    kwargs = {'transparency': image.getpixel((0, 0))} if mode == 'P' else {}
    image.save(tmp_path / 'x.png', **kwargs)
    assert np.asarray(read_image(tmp_path / 'x.png')).min() == 255


@pytest.mark.parametrize('extension', ['gif', 'webp', 'png'])
def test_first_frame_of_an_animation(tmp_path, extension):
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue', 'lime')]
    frames[0].save(tmp_path / f'x.{extension}', save_all=True, append_images=frames[1:], **(
        {'lossless': True} if extension == 'webp' else {}))
    assert read_image(tmp_path / f'x.{extension}').getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    photo.save(tmp_path / 'x.png', exif=exif)
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}.get(orientation, [])  # Pillow's Transpose
    upright = photo
    for turn in turns:
        upright = upright.transpose(turn)
    assert read_image(tmp_path / 'x.png').tobytes() == upright.tobytes()
    assert read_image(tmp_path / 'x.png', exif=False).tobytes() == photo.tobytes()


def test_damaged_exif_is_ignored(tmp_path, photo):
    photo.save(tmp_path / 'x.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff')
    assert read_image(tmp_path / 'x.jpg').size == (30, 20)


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
            'empty.jpg': 'is empty', 'text.jpg': 'is no image', 'cut.jpg': 'truncated', 'bomb.png': 'pixels',
            'large.png': '', 'folder.jpg': 'is a folder', 'missing.jpg': 'no such file', 'loop.jpg': '',
            'nul\0.jpg': 'null'}.items():
        with pytest.raises(UnreadableImage) as e:
            read_image(f'{tmp_path}/{name}')
        assert str(e.value).startswith(f'{tmp_path}/{printable(name)}: ') and reason in str(e.value).lower()
        assert '\n' not in str(e.value)
    photo.save(tmp_path / 'x.png')
    with pytest.raises(UnreadableImage, match='30 x 20 pixels are more than 599'):
        read_image(tmp_path / 'x.png', max_pixels=599)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b'', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0', b'GIF89a', b'RIFF']))
def test_any_bytes(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / 'any.jpg'
    path.write_bytes(start + data)
    try:
        assert read_image(path).mode == 'RGB'
    except UnreadableImage as e:
        assert str(path) in str(e)


@pytest.mark.parametrize('box, size', [
    ((2, 3, 12, 13), (10, 10)), ((2.5, 3.5, 12.4, 12.6), (10, 9)), ((-5, -5, 10, 10), (15, 15))])
def test_boxes(tmp_path, photo, box, size):
    photo.save(tmp_path / 'x.png')
    got = ImageFiles([tmp_path / 'x.png'], boxes=[box]).load_part(0)[0]
    assert got.size == size and got.tobytes() == photo.crop(box).tobytes()


def test_bad_boxes_and_lists(tmp_path, photo):
    photo.save(tmp_path / 'x.png')
    for box in ((5, 5, 5, 9), (5, 5, 4, 9), (0, 0, 0.4, 9), (0, 0, float('nan'), 9)):
        with pytest.raises(ValueError, match=r'box .* is empty'):
            ImageFiles(['x.png'], boxes=[box])
    with pytest.raises(UnreadableImage, match='outside the image of 30 x 20'):
        ImageFiles([tmp_path / 'x.png'], boxes=[(30, 0, 40, 10)]).load_part(0)
    with pytest.raises(ValueError, match='2 names for 1 images'):
        ImageFiles(['x.png'], names=['a', 'b'])
    with pytest.raises(ValueError, match='0 labels for 1 images'):
        ImageFiles(['x.png'], labels=[])


def test_fingerprint_tells_lists_apart():
    lists = [ImageFiles(['a', 'b']), ImageFiles(['b', 'a']), ImageFiles(['a']), ImageFiles(['a\udcff', 'b']),
             ImageFiles(['a', 'b'], boxes=[(0, 0, 1, 1), None]), ImageFiles(['a', 'b'], boxes=[None, (0, 0, 1, 1)])]
    assert len({source.fingerprint() for source in lists}) == len(lists)
    assert ImageFiles(['a', 'b'], boxes=[None, None]).fingerprint() == lists[0].fingerprint()
    assert ImageFiles(['x', 'y'], names=['a', 'b']).fingerprint() == lists[0].fingerprint()


def strange_folder(root, photo):
    names = ['b/1.JPG', 'a/2.png', 'line\nbreak.png', 'top.webp', 'a/deep/er.bmp']
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(root / name)
    for other in ('notes.txt', '.hidden.png', 'b/._1.jpg'):
        (root / other).write_bytes(b'')
    (root / '.cache').mkdir()
    photo.save(root / '.cache' / 'x.png')
    (root / 'a' / 'loop').symlink_to(root)
    with open(os.fsencode(root) + b'/caf\xe9.png', 'wb') as file:
        photo.save(file, 'PNG')
    return sorted([*names, 'caf\udce9.png'])


def test_find_images(tmp_path, photo):
    names = strange_folder(tmp_path, photo)
    source = find_images(tmp_path)
    assert source.names == names and source.labels is None
    assert all(source.load(i).size == (30, 20) for i in range(len(source)))
    classes = find_images(tmp_path, classes=True)
    assert classes.names == ['a/2.png', 'a/deep/er.bmp', 'b/1.JPG'] and classes.labels == [0, 0, 1]
    assert classes.class_names == ['a', 'b']
    assert open_images(tmp_path, 'b').names == ['1.JPG']


def test_linked_folder_is_followed(tmp_path, photo):
    (tmp_path / 'real').mkdir()
    photo.save(tmp_path / 'real' / 'x.png')
    (tmp_path / 'list').mkdir()
    (tmp_path / 'list' / 'linked').symlink_to(tmp_path / 'real')
    assert find_images(tmp_path / 'list').names == ['linked/x.png']


def test_lists(tmp_path, photo):
    names = strange_folder(tmp_path, photo)
    lines = [name for name in names if '\n' not in name]
    (tmp_path / 'list.txt').write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(map(os.fsencode, lines)) + b'\r\n\r\n')
    (tmp_path / 'list.json').write_text(json.dumps(names))
    assert read_list(tmp_path / 'list.txt').names == lines
    source = open_images(tmp_path / 'list.json')
    assert source.names == names
    assert all(source.load(i).size == (30, 20) for i in range(len(source)))
    (tmp_path / 'other.txt').write_text('a\nmissing.jpg\n')
    source = open_images(tmp_path / 'other.txt')
    with pytest.raises(UnreadableImage, match='a: is a folder'):
        source.load(0)
    with pytest.raises(UnreadableImage, match=r'missing\.jpg: no such file'):
        source.load(1)


def test_nothing_to_read(tmp_path, photo):
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'x.txt').write_text('')
    (tmp_path / 'empty.txt').write_text('\n \n')
    (tmp_path / 'bad.json').write_text('{"a": 1}')
    (tmp_path / 'worse.json').write_text('[')
    (tmp_path / 'binary.bin').write_bytes(b'\0\1')
    for name, message in {
            'none': 'holds no image files', 'empty.txt': 'lists no images', 'bad.json': 'not a JSON list',
            'worse.json': 'is not JSON', 'binary.bin': 'is not a list of images'}.items():
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='is no folder of images, no list'):
        open_images(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='is no folder'):
        find_images(tmp_path / 'nowhere')
    photo.save(tmp_path / 'one.png')
    assert len(open_images(tmp_path / 'one.png')) == 1


def test_dataset_of_timm(tmp_path, monkeypatch, photo):
    import timm.data
    monkeypatch.setattr(timm.data, 'create_dataset', lambda name, root, split: [(photo, 1), (None, 2)])
    source = open_images(f'torch/cifar10:{tmp_path}')
    assert source.names == ['00000000', '00000001'] and source.load(0).tobytes() == photo.tobytes()
    with pytest.raises(UnreadableImage, match='torch/cifar10 validation, 00000001'):
        source.load(1)
    monkeypatch.setattr(timm.data, 'create_dataset', lambda name, root, split: iter([]))
    with pytest.raises(ValueError, match='images by number'):
        open_images('hfds/some')


@settings(deadline=None)
@given(st.text())
def test_printable(name):
    shown = printable(name.replace('\0', ''))
    shown.encode('utf-8')
    assert len(shown.splitlines()) <= 1
