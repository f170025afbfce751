"""The demo's picture collection: layout, determinism, reuse, and that colour does not give the class away."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.demo import collection
from timm_multigrain.demo.collection import make_collection
from timm_multigrain.demo.pictures import CLASSES, draw_picture

SMALL = {'num_classes': 3, 'train_per_class': 3, 'val_per_class': 2, 'size': 32}


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_layout(tmp_path):
    root = make_collection(tmp_path / 'deep' / 'pictures', **SMALL)
    assert root == tmp_path / 'deep' / 'pictures'
    assert sorted(p.name for p in root.iterdir()) == ['collection.json', 'train', 'val']
    for split, count in (('train', 3), ('val', 2)):
        assert {p.name for p in (root / split).iterdir()} == set(list(CLASSES)[:3])
        for folder in (root / split).iterdir():
            pictures = sorted(folder.iterdir())
            assert [p.name for p in pictures] == [f'{folder.name}_{i:04d}.jpg' for i in range(count)]
            for path in pictures:
                with Image.open(path) as image:
                    assert (image.format, image.mode, image.size) == ('JPEG', 'RGB', (32, 32))
    assert [p.name for p in root.parent.iterdir()] == ['pictures']


def test_read_by_timm(tmp_path):
    from timm.data import create_dataset
    root = make_collection(tmp_path / 'pictures', **SMALL)
    dataset = create_dataset('', str(root), split='train')
    assert len(dataset) == 9 and sorted({label for _, label in dataset}) == [0, 1, 2]


def test_settings_alone_decide(tmp_path):
    a, b = (contents(make_collection(tmp_path / name, **SMALL)) for name in 'ab')
    assert a == b
    other = contents(make_collection(tmp_path / 'c', **SMALL, seed=1))
    assert a.keys() == other.keys() and not set(a.values()) & set(other.values())
    pictures = [data for name, data in a.items() if name.endswith('.jpg')]
    assert len(set(pictures)) == len(pictures)
    more = contents(make_collection(tmp_path / 'd', **{**SMALL, 'num_classes': 4, 'train_per_class': 4}))
    assert all(more[name] == data for name, data in a.items() if name.endswith('.jpg'))


def test_complete_collection_is_reused(tmp_path, monkeypatch):
    root = make_collection(tmp_path / 'pictures', **SMALL)
    monkeypatch.setattr(collection, '_draw_all', lambda *args: pytest.fail('drawn again'))
    assert make_collection(root, **SMALL) == root


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / 'pictures').mkdir()
    assert (make_collection(tmp_path / 'pictures', **SMALL) / 'train').is_dir()


def test_other_contents_are_refused_and_kept(tmp_path):
    root = make_collection(tmp_path / 'pictures', **SMALL)
    with pytest.raises(ValueError, match=r"other settings \(\{'size': 32\}\)"):
        make_collection(root, **{**SMALL, 'size': 48})
    before = contents(root)
    (root / 'val' / 'fish' / 'fish_0001.jpg').unlink()
    with pytest.raises(ValueError, match=r'fish_0001\.jpg is missing'):
        make_collection(root, **SMALL)
    assert len(contents(root)) == len(before) - 1
    (root / 'collection.json').write_text(json.dumps([1]))
    with pytest.raises(ValueError, match='other settings'):
        make_collection(root, **SMALL)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').write_text('dear')
    for place in (tmp_path / 'mine', tmp_path / 'mine' / 'letter.txt'):
        with pytest.raises(ValueError, match='not a collection'):
            make_collection(place, **SMALL)
    assert (tmp_path / 'mine' / 'letter.txt').read_text() == 'dear'


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            raise error
        return draw_picture(*args)

    monkeypatch.setattr(collection, 'draw_picture', stop)
    with pytest.raises(error):
        make_collection(tmp_path / 'pictures', **SMALL)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('rival_settings, accepted', [(SMALL, True), ({**SMALL, 'size': 40}, False)])
def test_rival_process_finishing_first(tmp_path, monkeypatch, rival_settings, accepted):
    rival = make_collection(tmp_path / 'rival', **rival_settings)
    rename = collection.os.rename

    def late(source, target):
        shutil.copytree(rival, target)
        rename(source, target)

    monkeypatch.setattr(collection.os, 'rename', late)
    if accepted:
        make_collection(tmp_path / 'pictures', **SMALL)
    else:
        with pytest.raises(ValueError, match='other settings'):
            make_collection(tmp_path / 'pictures', **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['pictures', 'rival']


@pytest.mark.parametrize('setting, message', [
    ({'num_classes': 1}, 'at least 2, got 1'), ({'num_classes': 11}, 'at most 10, got 11'),
    ({'train_per_class': 0}, 'train_per_class'), ({'val_per_class': -1}, 'val_per_class'),
    ({'size': 8}, 'size must be at least 16'), ({'seed': -1}, 'seed'),
])
def test_bad_settings(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        make_collection(tmp_path / 'pictures', **setting)
    assert not any(tmp_path.iterdir())


def nearest_class_accuracy(features, labels, test_features, test_labels, k):
    distances = np.abs(test_features[:, None] - features[None]).sum(-1)
    votes = labels[distances.argsort(1)[:, :k]]
    return np.mean([np.bincount(row, minlength=8).argmax() for row in votes] == test_labels)


@pytest.mark.slow
def test_colour_does_not_give_the_class_away():
    def draw(split, count):
        arrays = [np.asarray(draw_picture(kind, 64, np.random.default_rng([0, split, label, i])), dtype=np.int64)
                  for label, kind in enumerate(list(CLASSES)[:8]) for i in range(count)]
        return np.stack(arrays), np.repeat(np.arange(8), count)

    def mean(images):
        return images.mean((1, 2)) / 255

    def histogram(images):
        bins = (images // 64) @ [16, 4, 1]
        return np.stack([np.bincount(b.ravel(), minlength=64) for b in bins]) / bins[0].size

    (train, labels), (val, val_labels) = draw(0, 60), draw(1, 30)
    whole, centre = slice(None), slice(16, 48)
    for part in (whole, centre):
        for feature in (mean, histogram):
            x, y = feature(train[:, part, part]), feature(val[:, part, part])
            for k in (1, 5, 15):
                assert nearest_class_accuracy(x, labels, y, val_labels, k) < 2 / 8
