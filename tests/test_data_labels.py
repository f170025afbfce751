"""Instances and classes of images by folder, class, CSV file and numbers."""
import shutil

import pytest
import torch
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder

from timm_multigrain.data import create_loader
from timm_multigrain.data.labels import label_instances

from .pictures import write_noise

# class/instance: photographs; two classes have an instance of the same name
PHOTOGRAPHS = {'10/red': 3, '10/green': 1, '2/red': 2, '2/x/deep': 2}
NAMES = [f'{folder}/{i}.png' for folder, number in PHOTOGRAPHS.items() for i in range(number)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp('instances'), NAMES, (20, 20))


@pytest.fixture
def listed(tmp_path):
    """A CSV file that turns everything round: classes by number, the instance by folder."""
    path = tmp_path / 'list.csv'
    lines = [f'{name},kind {name[-5]},"{name.rpartition("/")[0]}"' for name in NAMES]
    path.write_text('path,class,instance\n' + '\n'.join(lines) + '\n')
    return path


def found(dataset, ids):
    """Name: (class, instance) of each image."""
    folder = getattr(dataset, 'reader', dataset)
    return {str(path).removeprefix(f'{folder.root}/'): (label, int(i))
            for (path, label), i in zip(folder.samples, ids, strict=True)}


@pytest.mark.parametrize('make', [lambda root: ImageDataset(str(root)), lambda root: ImageFolder(str(root))])
def test_folder_and_list(root, listed, make):
    dataset = make(root)
    before = dict(vars(getattr(dataset, 'reader', dataset)))
    for way, classes, label in (
            ('folder', {'2': 0, '10': 1}, lambda name: {'2': 0, '10': 1}[name.split('/')[0]]),
            (listed, {'kind 0': 0, 'kind 1': 1, 'kind 2': 2}, lambda name: int(name[-5]))):
        labelled, ids = label_instances(dataset, way)
        assert getattr(labelled, 'reader', labelled).class_to_idx == classes
        rows = found(labelled, ids)
        assert {name: row[0] for name, row in rows.items()} == {name: label(name) for name in NAMES}
        for one in NAMES:
            for other in NAMES:
                same = one.rpartition('/')[0] == other.rpartition('/')[0] and (
                    way == 'folder' or label(one) == label(other))
                assert (rows[one][1] == rows[other][1]) == same
        assert [labelled[i][1] for i in range(8)] == [row[0] for row in rows.values()]
    assert vars(getattr(dataset, 'reader', dataset)) == before


def test_classes_and_numbers(root):
    dataset = ImageFolder(str(root))
    targets = [label for _, label in dataset.samples]
    assert label_instances(dataset, 'copy') == (dataset, None)
    both = ConcatDataset([Subset(ImageDataset(str(root)), [5, 0]), dataset])
    leaves = [label for _, label in ImageDataset(str(root)).reader.samples]
    for data, expected in ((dataset, targets), (Subset(dataset, [7, 1, 2]), [targets[i] for i in (7, 1, 2)]),
                           (both, [leaves[5], leaves[0], *targets])):
        assert label_instances(data, 'class')[1].tolist() == expected
    assert label_instances(both, list(range(10)))[1].tolist() == list(range(10))
    for data, given, message in (
            (dataset, [1, 2], r'int64 of shape \(2,\), and the dataset has 8 images'), (dataset, [.5] * 8, 'float64'),
            ([(0, 1)], 'class', 'classes of this list are not known'), ([(0, 1)], 'folder', 'files of this list'),
            (Subset(dataset, [1]), 'folder', 'files of this Subset are not in a folder')):
        with pytest.raises(ValueError, match=message):
            label_instances(data, given)


def test_other_layouts(root, tmp_path):
    """class/image is one of validation only, where the class is the instance; classes are those of the training."""
    for name in NAMES[:6]:
        target = tmp_path / name.split('/')[0] / name.replace('/', '-')
        target.parent.mkdir(exist_ok=True)
        shutil.copy(root / name, target)
    dataset = ImageDataset(str(tmp_path))
    with pytest.raises(ValueError, match=r'6 of 6 images, such as 2/.*png, are not in folders class/instance/image'):
        label_instances(dataset, 'folder')
    numbers = {'10': 0, '2': 1, 'other': 2}
    for way in ('folder', tmp_path / 'not read'):
        labelled, ids = label_instances(dataset, way, numbers, is_training=False)
        assert labelled.reader.class_to_idx == numbers
        assert {name.split('/')[0]: row for name, row in found(labelled, ids).items()} == {'2': (1, 0), '10': (0, 1)}
    with pytest.raises(ValueError, match='the class 2 is not one of the 1 classes 10'):
        label_instances(dataset, 'folder', {'10': 0}, is_training=False)
    (tmp_path / 'loose.png').write_bytes((root / NAMES[0]).read_bytes())
    with pytest.raises(ValueError, match=r'1 of 7 images, such as loose\.png'):
        label_instances(ImageDataset(str(tmp_path)), 'folder', numbers, is_training=False)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda text: text + 'a/b.png,1,2\n', '1 image, such as a/b.png, are not in the training folder'),
    (lambda text: text.replace(f'{NAMES[2]},', 'x.png,'), 'such as x.png, are not in the training folder'),
    (lambda text: '\n'.join(text.splitlines()[:-2]), '2 images, such as 2/x/deep/0.png, of the training folder'),
    (lambda text: text + f'{NAMES[0]},a,b\n', f'line 10: {NAMES[0]} has another class or instance above'),
    (lambda text: text + 'a,b\n', 'line 10: give path,class,instance, not .a,b'),
    (lambda text: text + 'a, ,b\n', 'line 10: give path,class,instance'),
    (lambda text: text + 'a,"b"c,b\n', 'line 10: '),
    (lambda text: '\xe9', 'is not a UTF-8 text file')])
def test_bad_lists(root, listed, change, message):
    listed.write_text(change(listed.read_text()), encoding='latin-1')
    with pytest.raises(ValueError, match=message):
        label_instances(ImageDataset(str(root)), listed)
    with pytest.raises(FileNotFoundError, match=r'instances nowhere\.csv not found'):
        label_instances(ImageDataset(str(root)), 'nowhere.csv')


@pytest.mark.parametrize('options', [
    {}, {'fast': True}, {'input_size_choices': [16, 24]}, {'use_multi_epochs_loader': True, 'num_workers': 1}])
def test_loader(root, options):
    """m photographs of an instance side by side, or copies of one; pixels of a file and targets go together."""
    dataset = ImageDataset(str(root))
    loader = create_loader(
        dataset, 16, 4, num_repeats=2, instances='folder', device=torch.device('cpu'),
        **{'num_workers': 0, 'no_aug': True, **options})
    seen = []
    for _, targets in loader:
        assert targets.shape == (4, 2) and torch.equal(targets[::2], targets[1::2])
        seen += targets[::2].tolist()
    assert len(seen) == 6  # 2 + 1 + 1 + 1 groups in batches of two
    assert {tuple(row) for row in seen} == set(found(*label_instances(dataset, 'folder')).values())


def test_loader_refuses(root):
    cpu = torch.device('cpu')
    with pytest.raises(ValueError, match=r'batch_size is 5, and num_repeats 2: give a multiple'):
        create_loader(ImageDataset(str(root)), 16, 5, num_repeats=2, instances='class', device=cpu)
    with pytest.raises(ValueError, match=r'batch_size_choices are \[4, 5\]: give multiples of 2'):
        create_loader(ImageDataset(str(root)), 16, 4, num_repeats=2, instances='class', device=cpu,
                      input_size_choices=[16, 24], batch_size_choices=[4, 5])
    loader = create_loader(ImageDataset(str(root)), 16, 4, is_training=False, instances='folder', device=cpu)
    assert sorted(torch.cat([labels for _, labels in loader]).tolist()) == [0] * 4 + [1] * 4
