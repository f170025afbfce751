"""The demo: its pictures, both trainings, measurements against plain loops, and what it says about bad input."""
import json
import re

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset

from timm_multigrain.cli.main import main
from timm_multigrain.demo import pictures as drawing
from timm_multigrain.demo.pictures import CLASSES, draw_picture, make_collection
from timm_multigrain.demo.run import KINDS, Scores, _gallery, measure
from timm_multigrain.demo.training import TrainSettings, open_pictures, protocol_of, train_model
from timm_multigrain.images.copies import make_copies
from timm_multigrain.task import MultiGrainTask

from .pictures import write_noise

SMALL = {'train_per_class': 3, 'val_per_class': 2, 'size': 32}


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_collection_is_an_image_folder_that_its_settings_decide(tmp_path, monkeypatch):
    """It replaces nothing, and leaves no part of itself."""
    root = make_collection(tmp_path / 'deep' / 'a', **SMALL)
    found = contents(root)
    assert len(found) == 6 * (3 + 2) + 1 and len(set(found.values())) == len(found)
    dataset = create_dataset('', str(root), split='train')
    assert len(dataset) == 18 and {label for _, label in dataset} == set(range(6)) and dataset[0][0].size == (32, 32)
    other = contents(make_collection(tmp_path / 'c', **SMALL, seed=1))
    assert found.keys() == other.keys() and not set(found.values()) & set(other.values())
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').write_text('dear')
    before = contents(tmp_path)
    for place in (root, tmp_path / 'mine', tmp_path / 'mine' / 'letter.txt'):
        with pytest.raises(ValueError, match='holds other things than the pictures to draw'):
            make_collection(place, **{**SMALL, 'size': 48})
    count = iter(range(4))
    monkeypatch.setattr(drawing, 'draw_picture', lambda *args: next(count, None) is not None and draw_picture(*args))
    with pytest.raises(AttributeError):
        make_collection(tmp_path / 'new', **SMALL)
    assert contents(tmp_path) == before and not (tmp_path / 'new').exists()
    assert make_collection(root, **SMALL) == root  # not drawn again


def test_colour_does_not_give_the_class_away():
    """The nearest neighbours by mean colour or colour histogram guess hardly better than chance, 1 of 6."""
    def draw(split, count):
        arrays = [np.asarray(draw_picture(kind, 48, np.random.default_rng([0, split, label, i])), dtype=np.int64)
                  for label, kind in enumerate(CLASSES) for i in range(count)]
        return np.stack(arrays), np.repeat(np.arange(6), count)

    def histogram(images):
        return np.stack([np.bincount(bins.ravel(), minlength=64) for bins in (images // 64) @ [16, 4, 1]])

    (train, labels), (val, val_labels) = draw(0, 30), draw(1, 20)
    for part in (slice(None), slice(12, 36)):
        for feature in (lambda images: images.mean((1, 2)), histogram):
            x, y = feature(train[:, part, part]), feature(val[:, part, part])
            nearest = np.abs(y[:, None] - x[None]).sum(-1).argsort(1)
            for k in (1, 5, 15):
                guesses = [np.bincount(labels[row[:k]], minlength=6).argmax() for row in nearest]
                assert np.mean(guesses == val_labels) < 2 / 6


def make_folder(root, classes=('cat', 'dog'), splits=('train', 'val'), count=4):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
    return write_noise(root, [f'{split}/{name}/{i}.jpg' for split in splits for name in classes for i in range(count)],
                       (40, 50), (6, 6))


def demo(*args):
    return main(['demo', '--workers', '0', *map(str, args)])


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    out = tmp_path / 'out'
    args = ('--data-dir', make_folder(tmp_path / 'my pictures', count=6), '-o', out, '--epochs', 2, '--img-size', 32,
            '--batch-size', 12, '--seeds', 2)
    assert demo(*args) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / 'results.json').read_text())
    assert results['train_pictures'] == results['val_pictures'] == 12
    for name, runs in results['scores'].items():
        assert [run['seed'] for run in runs] == [0, 1]
        top1, copies = ([run[column] for run in runs] for column in ('top1', 'copy_map'))
        cells = [rf'{sum(x) / 2:.1f} ± {abs(x[0] - x[1]) / 2 ** 0.5:.1f}' for x in (top1, copies)]
        assert re.search(rf'^{re.escape(name)} +{cells[0]} +{cells[1]}$', shown, re.MULTILINE)
    page = (out / 'index.html').read_text()
    assert page.count('<svg') > 3 and page.count('<article') == 5
    model = timm.create_model(f'local-dir:{out / "model"}', pretrained=True).eval()
    assert model.num_classes == 2 and model.pretrained_cfg['label_names'] == ['cat', 'dog']
    pictures = open_pictures(tmp_path / 'my pictures')  # the saved model measures the same, by its own configuration
    protocol = protocol_of(model, TrainSettings(img_size=model.pretrained_cfg['input_size'][1]))
    again = measure(model, pictures.val, protocol, workers=0)
    joint = results['scores']['joint (MultiGrain)'][-1]
    assert (again.top1, again.copy_ap.mean()) == pytest.approx((joint['top1'], joint['copy_map']))
    first = contents(out / 'model')
    assert demo(*args) == 0  # the same seed gives the same weights
    assert json.loads((out / 'results.json').read_text()) == results and contents(out / 'model') == first


def test_objectives_see_the_same_and_the_schedule_runs_without_a_terminal(tmp_path, monkeypatch):
    pictures = open_pictures(make_folder(tmp_path / 'data', count=6))
    seen, histories, forward = {}, {}, MultiGrainTask.forward
    for weight in (1.0, 0.5):
        batches = seen[weight] = []
        monkeypatch.setattr(MultiGrainTask, 'forward', lambda task, x, target, batches=batches: (
            batches.append((x.clone(), target)), forward(task, x, target))[1])
        settings = TrainSettings(img_size=32, epochs=4, batch_size=6, classif_weight=weight, workers=0)
        _, histories[weight] = train_model('run', pictures, settings)
        rates = histories[weight]['learning rate']
        assert max(rates) == pytest.approx(settings.lr, rel=0.2) and rates[-1] < 0.2 * settings.lr
    assert histories[1.0]['cross-entropy'][0] == histories[0.5]['cross-entropy'][0]
    assert 'beta' not in histories[1.0] and 0 < histories[0.5]['beta'][0] < 1.2
    assert len(seen[1.0]) == 8
    for (x, target), (other_x, other_target) in zip(seen[1.0], seen[0.5], strict=True):
        assert torch.equal(x, other_x) and torch.equal(target, other_target)


def test_measure_against_plain_loops(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('multigrain', trunk='resnet10t', num_classes=3).eval()
    val = open_pictures(make_folder(tmp_path, classes=('10', '9', 'a'), count=2)).val
    assert val.class_names == ['9', '10', 'a']  # numbers by value, as timm counts them
    protocol = protocol_of(model, TrainSettings(img_size=32))
    scores = measure(model, val, protocol, workers=0)
    vectors, right = [], 0
    for number in range(6):
        picture = val.load(number)
        views = [picture, *make_copies(picture).values()]
        x = torch.stack([protocol.normalize(protocol.pixels(view)) for view in views])
        with torch.no_grad():
            vectors.append(model.embed(x).double())
            right += int(model(x[:1]).argmax()) == val.labels[number]
    ap = {kinds: [] for kinds in (range(1, 9), (2,))}
    for q in range(6):
        for kinds, values in ap.items():
            items = [(i, j) for i in range(6) for j in range(9) if i != q or j in kinds]
            items.sort(key=lambda item: -float(vectors[q][0] @ vectors[item[0]][item[1]]))
            hits, precision = 0, 0.
            for rank, (i, _) in enumerate(items):
                if i == q:
                    precision += ((hits / rank if rank else 1.) + (hits + 1) / (rank + 1)) / 2 / len(kinds)
                    hits += 1
            values.append(precision)
    assert scores.top1 == pytest.approx(100 * right / 6)
    assert scores.copy_ap == pytest.approx(100 * np.array(ap[range(1, 9)]))
    assert scores.copy_map_of[KINDS[2]] == pytest.approx(100 * np.mean(ap[2,]))


def test_first_example_is_the_median(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, count=3))
    before, after = [50, 20, 90, 40, 10], [60, 90, 70, 45, 40]  # gains 10, 70, -20, 5, 30
    similarity, predictions = torch.rand(5, 5 * len(KINDS)), torch.zeros(5, dtype=torch.int64)
    scores = {name: Scores(0., np.array(ap, dtype=float), {}, similarity, predictions)
              for name, ap in (('classification only', before), ('joint', after))}
    found = [[answer.prediction for answer in query.answers] for query in _gallery(pictures, scores)]
    assert [int(re.search(r'(\d+) %', first)[1]) for first, _ in found] == [50, 90, 40, 10, 20]
    assert [int(re.search(r'(\d+) %', second)[1]) for _, second in found] == [60, 70, 45, 40, 90]


def break_one(root):
    path = make_folder(root) / 'val' / 'dog' / '2.jpg'
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize('make, args, message', [
    (lambda root: None, (), "train' is not a folder"),
    (lambda root: make_folder(root, splits=('train',)), (), "val' is not a folder"),
    (lambda root: make_folder(root, count=0), (), 'holds no'),
    (lambda root: make_folder(root, classes=('cat',)), (), 'same classes, at least 2: cat and cat'),
    (lambda root: (make_folder(root), make_folder(root, classes=('cow',), splits=('val',))), (), 'dog and cat, cow'),
    (break_one, (), r'dog.2\.jpg: '),
    *((make_folder, args, message) for args, message in (
        (('--batch-size', 1), 'num_repeats is 2, and batch_size 1'), (('--batch-size', 480), 'no full batch of 480'),
        (('--img-size', 0), 'img_size is 0: give at least 32'), (('--lr', 'nan'), 'lr is nan'),
        (('--model', 'resnet17'), 'resnet17 is neither a folder'), (('--seeds', 0), 'seeds is 0: give at least 1')))])
def test_what_it_cannot_use(tmp_path, capsys, make, args, message):
    make(tmp_path / 'data')
    assert demo('--data-dir', tmp_path / 'data', '-o', tmp_path / 'out', '--epochs', 1, '--img-size', 32,
                '--batch-size', 6, *args) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and 'Traceback' not in error and len(error.strip().splitlines()) == 1
