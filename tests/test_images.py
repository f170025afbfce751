"""Reading images of every kind, and finding them."""
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import timm_multigrain
from timm_multigrain.images.labels import find_classes
from timm_multigrain.images.sources import (
    ImageFiles,
    UnreadableImage,
    decode,
    find_images,
    open_image,
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


BLACK, GREY, WHITE, RED = (0, 0, 0), (127, 127, 127), (255, 255, 255), (255, 0, 0)


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
    with Image.open(tmp_path / 'x.png') as image:
        twice = decode(decode(image))
        assert twice.size == upright.size and twice.tobytes() == upright.tobytes()
        assert decode(image, exif=False).tobytes() == photo.tobytes()
    photo.convert('L').save(tmp_path / 'grey.jpg', exif=exif)
    twice = decode(read_image(tmp_path / 'grey.jpg'))
    assert twice.size == upright.size and twice.tobytes() == read_image(tmp_path / 'grey.jpg').tobytes()


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
            'empty.jpg': 'is empty', 'text.jpg': 'is not an image', 'cut.jpg': 'truncated', 'bomb.png': 'pixels',
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
    classes = find_classes(tmp_path)
    assert classes.names == ['a/2.png', 'a/deep/er.bmp', 'b/1.JPG'] and classes.labels == [0, 2, 1]
    assert classes.class_names == ['a', 'b', 'deep']
    assert all(classes.load(i).size == (30, 20) for i in range(len(classes)))
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
    (tmp_path / 'deep.json').write_text('[' * 100_000)
    (tmp_path / 'binary.bin').write_bytes(b'\0\1')
    for name, message in {
            'none': 'holds no image files', 'empty.txt': 'lists no images', 'bad.json': 'not a JSON list',
            'worse.json': 'is not JSON', 'deep.json': 'is not JSON: it is nested too deep',
            'binary.bin': 'is not a list of images'}.items():
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='is not a folder, a list of images or a data set'):
        open_images(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='is not a folder'):
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


def test_nothing_but_regular_files_of_known_formats_is_opened(tmp_path, photo, monkeypatch):
    ran = tmp_path / 'ran'
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\ntouch {ran}\n')
    (tmp_path / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)
    folder = tmp_path / 'images'
    folder.mkdir()
    photo.save(folder / 'page.eps')
    os.rename(folder / 'page.eps', folder / 'eps.jpg')
    photo.save(folder / 'page.pdf')
    os.rename(folder / 'page.pdf', folder / 'pdf.png')
    photo.save(folder / 'icon.ico')
    os.rename(folder / 'icon.ico', folder / 'ico.gif')
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
@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'I;16', 'F', 'CMYK'])
def test_memory_a_pixel(tmp_path, mode):
    """12 bytes and what a strip takes, of a file that holds next to nothing, turned by its EXIF orientation."""
    side, exif = 5000, Image.Exif()
    exif[0x112] = 6
    kwargs = {'compression': 'tiff_lzw'} if mode in ('F', 'CMYK') else {}
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


def test_small_pictures_of_large_jpegs(tmp_path):
    Image.new('RGB', (3200, 1600), 'red').save(tmp_path / 'x.jpg')
    assert read_image(tmp_path / 'x.jpg', size=400).size == (800, 400)
    assert read_image(tmp_path / 'x.jpg', size=400, max_pixels=400_000).size == (800, 400)
    Image.new('RGB', (32, 16), 'red').save(tmp_path / 'x.png')
    assert read_image(tmp_path / 'x.png', size=4).size == (32, 16)


def test_all_images_are_opened_in_one_place():
    """But for a JPEG file that the demo has just written to memory, and the text of a card."""
    package = Path(timm_multigrain.__file__).parent
    openers = [path for path in package.rglob('*.py') if 'Image.open(' in path.read_text()]
    assert {str(path.relative_to(package)) for path in openers} == {
        'images/pixels.py', 'images/copies.py', 'hub/card.py'}


def test_file_objects(tmp_path, photo):
    photo.save(tmp_path / 'x.png')
    with open(tmp_path / 'x.png', 'rb') as file:
        assert read_image(file).tobytes() == photo.tobytes()
    assert read_image(io.BytesIO((tmp_path / 'x.png').read_bytes())).tobytes() == photo.tobytes()
    with pytest.raises(UnreadableImage, match=r'^image: is not an image'):
        read_image(io.BytesIO(b'text'))
