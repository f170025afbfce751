"""Classification: folders matched with classes, ranks counted in loops, the validate command."""
import os
import shutil

import numpy as np
import pytest
import torch
from timm.data import ImageDataset

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.labels import (
    class_names,
    find_classes,
    first_of_each,
    match_classes,
    open_classes,
    read_class_names,
    write_class_names,
)
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.measure.classify import ranks_of_truth, validate
from timm_multigrain.measure.results import read_metrics
from timm_multigrain.models.open import open_model

from .tiny import tiny_model

PROTOCOL = Protocol(size=32, kind='longer-side')


@pytest.fixture(scope='module')
def model():
    return tiny_model()


def test_ranks_by_loop():
    torch.manual_seed(0)
    logits = torch.randint(0, 4, (50, 7)).float()  # with ties
    labels = torch.randint(0, 7, (50,))
    for row, label, rank in zip(logits, labels, ranks_of_truth(logits, labels), strict=True):
        assert rank == sum(1 for k in range(7) if k != label and row[k] >= row[label])


def test_accuracy_image_by_image(model, noise_folder):
    source = open_classes(noise_folder, model, 'train')
    result = validate(model, source, PROTOCOL, workers=0, batch_size=5)
    ranks = []
    for i in range(len(source)):
        x = PROTOCOL.normalize(PROTOCOL.pixels(source.load(i)))[None]
        with torch.no_grad():
            logits = model(x)
        ranks.append(int((logits[0] >= logits[0, source.labels[i]]).sum()) - 1)
    assert result.ranks.tolist() == ranks
    assert result.top1 == np.mean([rank == 0 for rank in ranks]) and result.top5 == 1
    assert str(result) == f'top-1 {100 * result.top1:.2f} %, top-5 100.00 % over 36 images'


def test_rectangles_and_damaged_images(model, tmp_path):
    from PIL import Image
    for name, size in (('a', (50, 20)), ('b', (20, 50))):
        (tmp_path / name).mkdir()
        Image.new('RGB', size, 'red').save(tmp_path / name / 'x.png')
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'x.png').write_bytes(b'no')
    source = open_classes(tmp_path, model)
    result = validate(model, source, PROTOCOL, workers=0)
    assert len(result.ranks) == 2 and 'c/x.png' in result.skipped and result.labels.tolist() == [0, 1]
    assert '2 classes among 3' in str(result) and 'could not be read' in str(result)
    with pytest.raises(ValueError, match=r'x\.png'):
        validate(model, source, PROTOCOL, workers=0, strict=True)


IMAGENET = ['n01440764', 'n03888257', 'n15075141']


@pytest.mark.parametrize('num_classes, names, folders, wanted', [
    (3, ['cat', 'dog', 'ant'], ['ant', 'cat'], [2, 0]), (3, {0: 'cat', 2: 'ant', 1: 'dog'}, ['dog', 'cat'], [1, 0]),
    (3, ['cat', 'dog', 'ant'], ['cat', 'cow'], '1 of 2 class folders, such as cow, are not classes of the model'),
    (3, 'cat', ['cat'], "has to be a list or an object, not 'cat'"), (3, None, ['10', '2', '1'], [2, 1, 0]),
    (3, None, ['x', 'y'], r'2 class folders \(x, y\) for a model of 3 classes'),
    (3, None, ['Cat', 'cat', 'dog'], 'timm has no fixed order of the classes Cat and cat'),
    (3, None, ['01', '1', 'x'], 'no fixed order of the classes 01 and 1'),
    (1000, None, IMAGENET, [0, 701, 999]), (0, None, ['x'], 'no classifier'),
    (1000, None, ['n01440764', 'n00000001'], 'n00000001, are not classes of the imagenet-1k'),
    (1000, None, ['tench', 'n01440764'], 'for a model of 1000 classes')])
def test_matching_folders_with_classes(num_classes, names, folders, wanted):
    model = tiny_model(num_classes=num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}
    if isinstance(wanted, list):
        assert match_classes(model, folders) == wanted
    else:
        with pytest.raises(ValueError, match=wanted):
            match_classes(model, folders)


def test_matching_by_class_map(model, tmp_path):
    path = tmp_path / 'map.txt'
    path.write_text('z\ny\nx\n')
    assert match_classes(model, ['x', 'z'], path) == [2, 0]
    with pytest.raises(ValueError, match='q, are not classes of the class map'):
        match_classes(model, ['q'], path)
    for content in ('z\ny\n', 'z\ny\nx\nw\n', 'z\ny\ny\n', ''):
        path.write_text(content)
        with pytest.raises(ValueError, match='for a model of 3'):
            match_classes(model, ['z'], path)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='is not a UTF-8 text file'):
        match_classes(model, ['z'], path)
    with pytest.raises(FileNotFoundError, match=r'class map .*nowhere\.txt not found'):
        match_classes(model, ['z'], tmp_path / 'nowhere.txt')


def test_first_folders_are_the_classes_where_the_last_are_not(model, noise_folder, tmp_path, monkeypatch):
    """As in a training with instances: <class>/<instance>/<image>."""
    for i, path in enumerate(sorted((noise_folder / 'train').glob('*/*'))):
        instance = tmp_path / 'data' / path.parent.name / f'{path.parent.name}{i % 2}'
        instance.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, instance)
    source = open_classes(tmp_path / 'data', model)
    assert len(source) == 36 and source.labels == ['abc'.index(name[0]) for name in source.names]
    monkeypatch.setitem(model.pretrained_cfg, 'label_names', ['c', 'b', 'a'])
    assert [2 - label for label in source.labels] == open_classes(tmp_path / 'data', model).labels
    monkeypatch.setitem(model.pretrained_cfg, 'label_names', ['a0', 'c0', 'x'])
    with pytest.raises(ValueError, match='4 of 6 class folders, such as a1, are not classes of the model'):
        open_classes(tmp_path / 'data', model)
    (tmp_path / 'map').write_text('b\nc\na\n')
    assert set(open_classes(tmp_path / 'data', model, class_map=tmp_path / 'map').labels) == {0, 1, 2}


def test_folders(model, noise_folder, tmp_path):
    assert len(open_classes(noise_folder, model, 'validation')) == 6
    source = open_classes(noise_folder / 'train', model, 'train')
    part = first_of_each(source, 2)
    assert part.names == ['a/0.png', 'a/1.png', 'b/0.png', 'b/1.png', 'c/0.png', 'c/1.png']
    assert len(source) == 36 and part.labels == [0, 0, 1, 1, 2, 2]
    shutil.copytree(noise_folder / 'train', tmp_path / 'data')
    (tmp_path / 'data' / 'empty').mkdir()
    with pytest.raises(ValueError, match='1 of 4 class folders hold no images, such as empty'):
        open_classes(tmp_path / 'data', model)
    with pytest.raises(FileNotFoundError, match='no subfolder fold7'):
        open_classes(noise_folder, model, 'fold7')
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        open_classes(tmp_path / 'nowhere', model, 'validation')
    with pytest.raises(ValueError, match='0 images of each class'):
        first_of_each(source, 0)
    source.labels = [3] * 36
    with pytest.raises(ValueError, match='3 to 3, and the model has 3'):
        validate(model, source, PROTOCOL, workers=0)
    with pytest.raises(ValueError, match='have no labels'):
        validate(model, ImageFiles(['x.png']), PROTOCOL, workers=0)


NAMES = ['1', '2', '10', 'a10', 'a9', 'B1', 'b02', 'Zebra', 'apple', 'Öl', 'öre', 'É2', 'é10', 'x-1', 'x_1', 'ｆ２',
         'ß', 'İ', '日本', '٣', '12a3', '12A20', ' lead', 'ǅ']


def test_classes_are_those_of_timm(tmp_path):
    rng = np.random.default_rng(0)
    for split, nested in (('flat', ''), ('deep', 'some/where')):
        for name in rng.permutation(NAMES):
            folder = tmp_path / split / nested / str(name)
            folder.mkdir(parents=True)
            (folder / 'x.png').touch()
        if nested:  # a folder with images and folders, and the same name in two places
            for name in ('some/x.png', 'other/10/y.png', 'other/y.jpg'):
                (tmp_path / split / name).parent.mkdir(exist_ok=True, parents=True)
                (tmp_path / split / name).touch()
        truth = ImageDataset(str(tmp_path / split)).reader
        source = find_classes(tmp_path / split)
        assert truth.class_to_idx == {name: i for i, name in enumerate(source.class_names)}
        labels = {os.path.relpath(path, tmp_path / split): label for path, label in truth.samples}
        assert labels == dict(zip(source.names, source.labels, strict=True)) and len(labels) >= len(NAMES)
    assert class_names(['b', '2²', 'B', '10', '9', '1', '01']) == ['01', '1', '2²', '9', '10', 'B', 'b']


def test_class_names_beside_a_checkpoint(tmp_path):
    assert read_class_names(tmp_path / 'last.pth.tar') is None
    path = write_class_names(tmp_path / 'run', ['10', 'Ö "quoted"', 'line\nbreak'])
    assert read_class_names(tmp_path / 'run' / 'model_best.pth.tar') == ['10', 'Ö "quoted"', 'line\nbreak']
    assert read_class_names(tmp_path / 'run') == read_class_names(path)
    for content in (b'{"a": 1}', b'["a", 1]', b'[', b'\xff', b'[' * 100_000, b'null'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'class_names\.json is not (a JSON list|JSON)'):
            read_class_names(tmp_path / 'run')


def test_command(noise_folder, tmp_path, capsys):
    folder = save_pretrained(tiny_model(), tmp_path / 'm', label_names=['a', 'b', 'c'])
    arguments = ['validate', str(folder), str(noise_folder), '--size', '32', '--protocol', 'longer-side', '--device',
                 'cpu', '--workers', '0']
    assert main([*arguments, '--p', '4', '--json', str(tmp_path / 'r.json')]) == 0
    model = open_model(folder, p=4)
    protocol = Protocol.for_model(model, size=32, kind='longer-side')
    result = validate(model, open_classes(noise_folder, model, 'validation'), protocol, workers=0)
    assert f'longer side 32, smaller images enlarged, p = 4\n{result}' in capsys.readouterr().out
    top1, top5 = read_metrics(tmp_path / 'r.json')
    assert (top1.value, top5.value) == (100 * result.top1, 100 * result.top5)
    assert (top1.metric, top1.size, top1.p, top1.protocol) == (
        'top1', 32, 4, 'longer side 32, smaller images enlarged')
    assert main([*arguments[:2], str(tmp_path), *arguments[3:]]) == 2
    assert 'error' in capsys.readouterr().err
