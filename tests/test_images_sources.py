"""Finding images: folders with odd names, lists, parts, data sets of timm."""
import json
import os

import pytest

from timm_multigrain.images.labels import find_classes
from timm_multigrain.images.pixels import UnreadableImage
from timm_multigrain.images.sources import ImageFiles, Subset, find_images, open_images, read_list


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


@pytest.mark.parametrize('box, size', [
    ((2, 3, 12, 13), (10, 10)), ((2.5, 3.5, 12.4, 12.6), (10, 9)), ((-5, -5, 10, 10), (15, 15))])
def test_boxes(tmp_path, photo, box, size):
    photo.save(tmp_path / 'x.png')
    got = ImageFiles([tmp_path / 'x.png'], boxes=[box]).load_part(0)[0]
    assert got.size == size and got.tobytes() == photo.crop(box).tobytes()


def test_bad_boxes_and_lists(tmp_path, photo):
    photo.save(tmp_path / 'x.png')
    for box in ((5, 5, 5, 9), (5, 5, 4, 9), (0, 0, 0.4, 9), (0, 0, float('nan'), 9), (0, 0, 9)):
        with pytest.raises(ValueError, match=r'box .* is empty'):
            ImageFiles(['x.png'], boxes=[box])
    with pytest.raises(UnreadableImage, match='outside the image of 30 x 20'):
        ImageFiles([tmp_path / 'x.png'], boxes=[(30, 0, 40, 10)]).load_part(0)
    with pytest.raises(ValueError, match='2 names for 1 image:'):
        ImageFiles(['x.png'], names=['a', 'b'])
    with pytest.raises(ValueError, match='0 labels for 1 image:'):
        ImageFiles(['x.png'], labels=[])


def test_fingerprint_tells_lists_apart():
    lists = [ImageFiles(['a', 'b']), ImageFiles(['b', 'a']), ImageFiles(['a']), ImageFiles(['a\udcff', 'b']),
             ImageFiles(['a', 'b'], boxes=[(0, 0, 1, 1), None]), ImageFiles(['a', 'b'], boxes=[None, (0, 0, 1, 1)])]
    assert len({source.fingerprint() for source in lists}) == len(lists)
    assert ImageFiles(['a', 'b'], boxes=[None, None]).fingerprint() == lists[0].fingerprint()
    assert ImageFiles(['x', 'y'], names=['a', 'b']).fingerprint() == lists[0].fingerprint()


def test_subset(noise_folder):
    classes = find_classes(noise_folder / 'train')
    source = ImageFiles(classes.paths, classes.names, [(i, 0, i + 9, 9) for i in range(len(classes))], classes.labels)
    part = Subset(source, [5, 20])
    assert part.names == [source.names[5], source.names[20]] and part.labels == [0, 1]
    assert part.load_part(1)[0].tobytes() == source.load(20).crop((20, 0, 29, 9)).tobytes()
    assert part.fingerprint() != source.fingerprint() and Subset(source, [5], [7]).labels == [7]
