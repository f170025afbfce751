"""Copies in an indexed folder: what is found, what is suggested to be kept, the command and its page; files stay."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.collection import Index
from timm_multigrain.collection.dedup import find_copies
from timm_multigrain.collection.dedup_page import write_copies
from timm_multigrain.collection.dedup_recall import measure_recall
from timm_multigrain.collection.edits import EDITS

from .copies_folder import make_index, make_pictures
from .small_index import unit_vectors, write_index

NASTY = '<img src=x onerror=alert(1)> & "q"\n\udcff.png'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp('dedup') / 'pictures')
    shutil.copyfile(folder / '5.png', folder / NASTY)
    return folder


@pytest.fixture(scope='module')
def index(pictures):
    return make_index(pictures, pictures.parent / 'index')


def names(group):
    return [os.path.basename(file.record.path) for file in group.files]


def state_of(folder):
    return {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in os.listdir(folder)}


def test_groups(index, pictures):
    before = state_of(pictures)
    copies = find_copies(index)
    assert [names(group) for group in copies.of_kind('exact')] == [['0.png', 'a longer name.png'], ['5.png', NASTY]]
    near = [set(names(group)) for group in copies.of_kind('near')]
    assert {'1.png', 'small.jpg'} in near and any({'2.png', 'mirror.png'} <= group for group in near)
    [small] = [group for group in copies.of_kind('near') if 'small.jpg' in names(group)]
    assert names(small)[0] == '1.png' and small.keep == str(pictures / '1.png')  # more pixels
    kept = {os.path.basename(group.keep) for group in copies.groups}
    assert {'0.png', '1.png', '5.png'} <= kept and not set(copies.surplus) & {str(pictures / '1.png')}
    assert len(copies.surplus) == len(set(copies.surplus))
    assert copies.surplus_bytes == sum(os.path.getsize(os.fsencode(path)) for path in copies.surplus)
    for group in copies.groups:
        scores = [file.score for file in group.files]
        assert scores[0] == 1 and (np.diff(scores[1:]) <= 0).all()
    assert find_copies(index) == copies and state_of(pictures) == before
    assert f'{len(copies.surplus)} surplus files' in str(copies) and '2 groups of identical files' in str(copies)


def test_keep_is_largest_then_least_compressed_then_shortest_name(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    picture = Image.effect_noise((80, 80), 90).convert('RGB')
    picture.save(folder / 'copy of it.jpg', quality=95)
    picture.save(folder / 'it.jpg', quality=60)
    picture.resize((70, 70)).save(folder / 'a.png')
    copies = find_copies(make_index(folder, tmp_path / 'index'), 0.9)
    [group] = copies.groups
    assert names(group)[0] == 'copy of it.jpg' and set(names(group)[1:]) == {'it.jpg', 'a.png'}


def test_only_exact(index):
    copies = find_copies(index, exact_only=True)
    assert {group.kind for group in copies.groups} == {'exact'} and copies.thresholds is None
    json.dumps(copies.to_json())


def test_without_looking_no_picture_is_read(index, monkeypatch):
    monkeypatch.setattr('timm_multigrain.images.sources.read_image', lambda *a, **k: pytest.fail('it was read'))
    copies = find_copies(index, look=False)
    assert copies.unreadable == 0 and copies.of_kind('exact')


def test_pictures_that_are_gone(pictures, index, tmp_path):
    moved = tmp_path / 'index'
    shutil.copytree(index.path, moved)  # its pictures are looked for beside it, and are not there
    copies = find_copies(Index.open(moved))
    assert copies.unreadable and len(copies.of_kind('exact')) == 2
    page = write_copies(tmp_path / 'page.html', copies).read_text()
    assert 'can no longer be read' in page and 'could not be read' in page


def test_order_of_indexing_decides_nothing(tmp_path):
    vectors = unit_vectors(60, dim=8)
    vectors[30:] = vectors[:30]
    paths = [f'{i}.jpg' for i in range(60)]
    shuffle = np.random.default_rng(0).permutation(60)
    first = find_copies(Index.open(write_index(tmp_path / 'a', vectors, paths)), 0.9, look=False)
    second = find_copies(Index.open(write_index(
        tmp_path / 'b', vectors[shuffle], [paths[i] for i in shuffle])), 0.9, look=False)
    first, second = (
        {frozenset(file.record.path for file in group.files) for group in found.groups} for found in (first, second))
    assert len(first) == 30 and first == second


def test_empty_and_tiny_indexes(tmp_path):
    for count in (0, 1, 2):
        index = Index.open(write_index(tmp_path / str(count), unit_vectors(count)))
        assert find_copies(index).groups == ()
    with pytest.raises(ValueError, match='above -1 and at most 1'):
        find_copies(index, 1.5)
    with pytest.raises(ValueError, match='share above 0'):
        find_copies(Index.open(write_index(tmp_path / 'ten', unit_vectors(10))), false_positives=0)


def test_page_is_self_contained_and_names_are_text(index, tmp_path):
    page = write_copies(tmp_path / 'page.html', find_copies(index), 'Copies <of> it').read_text(encoding='utf-8')
    assert "default-src 'none'" in page and '<title>Copies &lt;of&gt; it</title>' in page
    assert '<img src=x' not in page and '&lt;img src=x onerror=alert(1)&gt; &amp; &quot;q&quot;' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count('>Keep<') == page.count('<section class="card">')
    assert '<script' not in page and '>Identical<' in page


@pytest.mark.slow
def test_command(index, pictures, tmp_path, capfd):
    folder = str(index.path)
    assert main(['dedup', folder, '--html', str(tmp_path / 'copies.html')]) == 0
    assert 'surplus files' in capfd.readouterr().out and (tmp_path / 'copies.html').stat().st_size > 10_000
    assert main(['dedup', folder, '--json']) == 0
    told = json.loads(capfd.readouterr().out)
    assert told == json.loads(json.dumps(find_copies(index).to_json()))
    assert {file['path'] for group in told['groups'] for file in group['files']} >= {str(pictures / NASTY)}
    done = subprocess.run([sys.executable, '-m', 'timm_multigrain', 'dedup', folder, '--list', '-0', '--exact'],
                          capture_output=True, check=True)
    assert done.stdout == b''.join(os.fsencode(pictures / name) + b'\0' for name in ('a longer name.png', NASTY))
    assert main(['dedup', folder, '--threshold', '2']) == 2 and 'at most 1' in capfd.readouterr().err
    assert main(['dedup', str(tmp_path / 'nothing')]) == 2
    assert 'is not there' in capfd.readouterr().err
    assert set(os.listdir(pictures)) == {Path(path).name for path in index.paths}


def test_recall_of_edits(index, capfd):
    edits = {name: EDITS[name] for name in ('jpeg 90', 'mirror', 'rotate 15')}
    recall = measure_recall(index, 6, false_positives=0.01, edits=edits)
    assert recall.images == 6 and set(recall.recall) == set(edits)
    assert recall.recall['mirror'] >= 0.5 and all(0 <= share <= 1 for share in recall.recall.values())
    everything = measure_recall(index, 6, threshold=-0.99, false_positives=0.01, edits=edits)
    assert set(everything.recall.values()) == {1} and 'mean' in str(everything)
    with pytest.raises(ValueError, match='nothing to measure'):
        measure_recall(index, 0, false_positives=0.01)
