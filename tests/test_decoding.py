"""A picture means the same to training, to its validation and to every command, whatever kind of file it is in."""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from timm.data import ImageDataset, add_img_extensions, create_transform, get_img_extensions, set_img_extensions
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor

from timm_multigrain.data import DecodedDataset, InstanceDataset, create_loader
from timm_multigrain.images.sources import read_image

CPU = torch.device('cpu')


def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((45, 35), Image.Resampling.BICUBIC)


def ramp():
    return np.arange(45 * 35, dtype=np.uint16).reshape(35, 45) * 41


def alpha():
    return Image.fromarray((ramp() >> 8).astype(np.uint8))


def drawing():
    """White lines on transparent black."""
    image = Image.new('RGBA', (45, 35), (0, 0, 0, 0))
    ImageDraw.Draw(image).line([(5, 5), (40, 30)], fill=(255, 255, 255, 255), width=3)
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def transparent(mode):
    image = picture().convert(mode)
    image.putalpha(alpha())
    return image


KINDS = {
    'grey.jpg': lambda f: picture().convert('L').save(f),
    'rgb.jpg': lambda f: picture().save(f),
    'cmyk.jpg': lambda f: picture().convert('CMYK').save(f),
    'turned.jpg': lambda f: picture().save(f, exif=turned(6)),
    'mirrored grey.jpg': lambda f: picture().convert('L').save(f, exif=turned(5)),
    'transparent.png': lambda f: transparent('RGB').save(f),
    'drawing.png': lambda f: drawing().save(f),
    'deep.png': lambda f: Image.fromarray(ramp()).save(f),
    'palette.png': lambda f: picture().quantize(16).save(f, transparency=3),
    'la.png': lambda f: transparent('L').save(f),
    'turned.png': lambda f: picture().save(f, exif=turned(8)),
    'animated.gif': lambda f: picture().save(f, save_all=True, append_images=[drawing().convert('RGB')]),
    'deep.tif': lambda f: Image.fromarray(ramp()).save(f),
    'lossless.webp': lambda f: transparent('RGB').save(f, lossless=True),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """One of each kind in a folder for its class."""
    root = tmp_path_factory.mktemp('files')
    for number, (name, save) in enumerate(KINDS.items()):
        (root / f'{number:02d}').mkdir()
        save(root / f'{number:02d}' / name)
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
    'timm': lambda files: ImageDataset(str(files)),
    'tar': in_tar,
    'streams': lambda files: ImageDataset('', reader=Streams(files)),
    'folder': folder,
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


def test_pixels_by_hand(files):
    expected = dict(zip(KINDS, as_commands_see(files), strict=True))
    upright = expected['rgb.jpg']
    assert torch.equal(expected['turned.jpg'], upright.rot90(-1, (1, 2)))  # 6: a quarter turn clockwise sets it right
    assert torch.equal(expected['mirrored grey.jpg'], expected['grey.jpg'].transpose(1, 2))
    assert torch.equal(expected['turned.png'], PILToTensor()(picture()).rot90(1, (1, 2)))
    deep = torch.from_numpy((ramp() / 257).round().astype(np.uint8)).expand(3, -1, -1)  # 65535 is 255
    assert torch.equal(expected['deep.png'], deep) and torch.equal(expected['deep.tif'], deep)
    lines = expected['drawing.png']
    assert lines.max() == 255 and lines[:, 0, -1].tolist() == [0, 0, 0]
    opacity = torch.from_numpy(np.asarray(alpha())).double() / 255
    for name in ('transparent.png', 'lossless.webp'):
        blended = PILToTensor()(picture()) * opacity + 255 * (1 - opacity)
        assert (expected[name] - blended).abs().max() <= 1, name


@pytest.mark.parametrize('fast', [False, True])
def test_timms_way(files, fast):
    reference = ImageDataset(str(files), transform=PILToTensor())
    dataset = InstanceDataset(ImageDataset(str(files)), 'timm', fast=fast)
    dataset.transform = Compose([PILToTensor()])
    for index in range(len(KINDS)):
        assert torch.equal(dataset[index][0], reference[index][0])
    assert reference[list(KINDS).index('drawing.png')][0].min() == 0
    with pytest.raises(ValueError, match="decode is 'pillow': give one of multigrain, timm"):
        InstanceDataset(reference, 'pillow')


def test_grey_input(files):
    """A model of one channel gets the grey values of what the others see."""
    dataset = DecodedDataset(ImageDataset(str(files), input_img_mode='L'))
    for index, path in enumerate(sorted(files.rglob('*.*'))):
        assert dataset[index][0].mode == 'L'
        assert np.array_equal(dataset[index][0], read_image(path).convert('L'))


@pytest.mark.parametrize('decode', ['multigrain', 'timm'])
def test_loader_of_validation(files, decode):
    """timm's own, with its transform."""
    dataset = ImageDataset(str(files))
    loader = create_loader(
        dataset, 32, 4, is_training=False, decode=decode, use_prefetcher=False, device=CPU, num_workers=0)
    images, targets = map(torch.cat, zip(*loader, strict=True))
    transform = create_transform(32)
    for index, path in enumerate(sorted(files.rglob('*.*'))):
        image = read_image(path) if decode == 'multigrain' else Image.open(path).convert('RGB')
        assert torch.equal(images[index], transform(image))
    assert targets.tolist() == list(range(len(KINDS))) and dataset.transform is None
