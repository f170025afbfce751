"""Parts of pictures in an index: embedded as pictures of their own, found, brought up to date, left out elsewhere."""
import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multigrain.app.answers import Answers
from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.pixels import read_image
from timm_multigrain.index import Index, regions
from timm_multigrain.index.ann import update_structure
from timm_multigrain.index.between import ImageSet, find_copies_between
from timm_multigrain.index.dedup import find_copies
from timm_multigrain.index.export import export_parquet
from timm_multigrain.index.model import embed_queries
from timm_multigrain.index.records import REGION
from timm_multigrain.report.collection import indexed_picture
from timm_multigrain.search.rerank import Background, rerank_candidates

from . import test_index_build
from .small_index import CLASSES, unit_vectors, write_index, writer_of
from .tiny import tiny_model

pictures, picture = test_index_build.pictures, test_index_build.picture
ROWS = [('0.png', '0 0 30 70', 'left'), ('0.png', '44.6 10.4 200 60', 'right'), ('sub/1.png', '5 5 40 40', ''),
        ('2.png', '-9 20 45 50', 'left'), ('sub/3.png', '', '')]
BOXES = {('0.png', (0, 0, 30, 70), 'left'), ('0.png', (45, 10, 90, 60), 'right'), ('1.png', (5, 5, 40, 40), ''),
         ('2.png', (0, 20, 45, 50), 'left')}


def listed(path, rows=ROWS):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([('path', 'box', 'category'), *rows])
    return path


@pytest.fixture
def read(monkeypatch):
    """Names of the pictures that are read for their parts."""
    names = []
    monkeypatch.setattr(regions, 'read_image', lambda path, **options: names.append(os.path.basename(path)) or
                        read_image(path, **options))
    return names


def update(pictures, boxes=None, **options):
    test_index_build.update(pictures, boxes=boxes, **options)
    return test_index_build.opened(pictures)


def make(pictures, boxes, **options):
    return update(pictures, boxes, model=tiny_model(), protocol=Protocol(64), **options)


def regions_in(index):
    records = [index.records(row) for row in range(len(index), len(index.image_rows))]
    return {(os.path.basename(record.path), record.box, record.category) for record in records}


def check(index):
    """Every part is found by what is cut out there."""
    for row in range(len(index), len(index.image_rows)):
        record = index.records(row)
        cut = embed_queries(tiny_model(), index.protocol(), [read_image(record.path).crop(record.box)]).vectors
        scores, rows = index.search(cut, 1)
        assert rows[0, 0] == row and scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_parts_are_embedded_as_pictures_of_their_own(pictures, tmp_path, capsys):
    index = make(pictures, listed(tmp_path / 'boxes.csv'))
    assert len(index) == len(index.vectors) == 8 and regions_in(index) == BOXES
    assert index.categories == ['left', 'right'] and index.info['regions'] == 4
    check(index)
    query = tmp_path / 'query.png'
    read_image(pictures / '0.png').crop((45, 10, 90, 60)).save(query)
    page = tmp_path / 'found.html'
    assert main(['search', str(index.path), str(query), '-k', '2', '--html', str(page), '--json', '-']) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found[0]['box'], found[0]['category']) == ([45, 10, 90, 60], 'right') and 'right [45, 10, 90, 60]' in \
        page.read_text()
    assert main(['search', str(index.path), str(query), '-k', '9', '--category', 'left']) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 and all('.png  left [' in line for line in lines)
    assert main(['search', str(index.path), str(query), '--category', 'lift']) == 2
    assert "did you mean 'left'" in capsys.readouterr().err


def test_the_app_shows_the_part(pictures, tmp_path):
    index = make(pictures, listed(tmp_path / 'boxes.csv'))
    answers, question = Answers(index), {'picture': None, 'k': 9, 'class_name': '', 'category': 'right'}
    row = index.paths.index(str(pictures / '0.png'))
    hit, = answers.search({**question, 'row': row, 'part': [0.5, 10 / 70, 0.5, 50 / 70]})['hits']
    assert (hit['score'], hit['class'], hit['part']) == ('1.000', 'right', [0.5, 10 / 70, 0.5, 50 / 70])
    assert answers.search({**question, 'row': hit['row'], 'part': hit['part']})['hits'] == [hit]
    whole, part = (np.asarray(indexed_picture(index.records(i)), float) for i in (row, hit['row']))
    changed = np.argwhere(np.abs(whole - part).sum(2))
    assert (changed.min(0).tolist(), changed.max(0).tolist()) == ([10, 45], [59, 89]) and len(changed) == 2 * 93


@pytest.mark.parametrize('kind', [None, 'hnsw'])
def test_each_image_is_found_once_by_its_best_part(tmp_path, kind):
    vectors, queries, rng = unit_vectors(120), unit_vectors(7, seed=1), np.random.default_rng(2)
    folder = write_index(tmp_path / 'index', vectors)
    owners, names = np.sort(rng.integers(0, 119, 200)), rng.choice([b'a', b'b'], 200)
    parts = unit_vectors(200, seed=3)
    with writer_of(folder) as writer:
        wanted = [np.array([((1, 2, 3 + i, 4), names[i], 0) for i in np.flatnonzero(owners == row)], REGION)
                  for row in range(120)]
        writer.set_regions(range(120), 'list', wanted, parts)
        writer.commit()
        writer.remove([5])  # with its parts
        writer.commit()
    if kind:
        pytest.importorskip('faiss')
        with writer_of(folder) as writer:
            update_structure(writer, kind, progress=False)
    index = Index(folder)
    for chosen in ({}, {'class_name': 'car'}, {'category': 'a'}, {'category': 'b', 'class_name': 'tree'}):
        scores, rows = index.search(queries, 6, **chosen)
        for query, values, found in zip(queries, scores, rows, strict=True):
            best = {}
            for row in range(120):
                if row == 5 or ('class_name' in chosen and CLASSES[row % 3] != chosen['class_name']):
                    continue
                if 'category' not in chosen:
                    best[row] = (vectors[row] @ query, None)
                for i in np.flatnonzero(owners == row):
                    if chosen.get('category', names[i].decode()) == names[i].decode():
                        best[row] = max(best.get(row, (-2., None)), (parts[i] @ query, 3 + i), key=lambda x: x[0])
            expected = sorted(best.items(), key=lambda item: -item[1][0])[:6]
            assert [(os.path.basename(r.path), r.box and r.box[2]) for r in map(index.records, found)] == [
                (f'{row}.jpg', right) for row, (_, right) in expected]
            assert np.allclose(values, [score for _, (score, _) in expected], atol=1e-6)
    for class_name in (None, 'car'):  # the first ones refine each other
        _, rows = index.search(queries[:1], 400, class_name)
        best = torch.from_numpy(np.stack([parts[record.box[2] - 3] if record.box else index.vectors[row]
                                          for row, record in zip(rows[0], map(index.records, rows[0]), strict=True)]))
        again, _ = rerank_candidates(torch.from_numpy(queries[0]), best, Background.of(vectors[np.arange(120) != 5]), 3)
        values, found = index.search(queries[:1], 10, class_name, rerank=3)
        order = again.argsort(descending=True, stable=True)[:10]
        assert np.array_equal(found[0], rows[0][order]) and np.allclose(values[0], again[order], atol=1e-6)


def test_updates(pictures, tmp_path, read):
    index = make(pictures, listed(tmp_path / 'boxes.csv'))
    assert sorted(read) == ['0.png', '1.png', '2.png']  # each once
    read.clear()
    assert regions_in(update(pictures, tmp_path / 'boxes.csv')) == regions_in(update(pictures)) == BOXES and not read
    os.rename(pictures / 'sub' / '1.png', pictures / '1.png')
    picture(9).save(pictures / '0.png')
    (pictures / '2.png').unlink()
    assert regions_in(update(pictures)) == {('1.png', (5, 5, 40, 40), '')} and not read  # moved; the others are new
    rows = [('0.png', '1 1 30 30', 'x'), ('1.png', '5 5 40 40', ''), ('sub/3.png', '0 0 9 9', 'y')]
    index = update(pictures, listed(tmp_path / 'boxes.csv', rows))
    assert regions_in(index) == {('0.png', (1, 1, 30, 30), 'x'), ('1.png', (5, 5, 40, 40), ''),
                                 ('3.png', (0, 0, 9, 9), 'y')}
    assert sorted(read) == ['0.png', '3.png']
    check(index)
    number = len(index.store.file)
    index = update(pictures, listed(tmp_path / 'boxes.csv', [('sub/3.png', '0 0 9 9', 'z'), ('0.png', '', '')]))
    assert regions_in(index) == {('3.png', (0, 0, 9, 9), 'z')}
    assert len(index.store.file) == 8 < number  # the file of vectors was written anew
    check(index)
    index.store.check()


def test_a_detector_sees_each_picture_once(pictures, tmp_path, monkeypatch):
    turned = Image.Exif()
    turned[0x112] = 6  # a quarter turn: 90 x 70 pixels are shown as 70 x 90
    picture(7).save(pictures / '7.jpg', exif=turned)
    asked = []

    def detect(image):
        asked.append(image.size)
        if len(asked) == 4:
            raise KeyError('the detector fails')
        return [(0, 0, image.width, 20.4), (2, 2, 2.2, 9, 'empty')] if image.width < image.height else []

    monkeypatch.setattr(regions, 'PICTURES', 1)
    with pytest.raises(RuntimeError, match=r'\.png: .*detect failed with KeyError: .the detector fails.'):
        make(pictures, detect)
    with pytest.warns(UserWarning, match='of its last update: 6 pictures'):
        Index(tmp_path / 'index')
    assert update(pictures).pending == 0  # all pictures are there, and nobody asks for parts any more
    with pytest.warns(UserWarning, match='Boxes of 1 picture were left out'):
        index = update(pictures, detect)
    assert len(asked) == 10 and regions_in(index) == {('7.jpg', (0, 0, 70, 20), '')}
    check(index)
    update(pictures, detect)
    assert len(asked) == 10
    index = update(pictures, lambda image: np.array([[0, 0, 10, 10]]))  # another one is asked again
    assert len(index.store.regions) == 9


def test_elsewhere_there_are_whole_pictures_only(pictures, tmp_path):
    def results(index):
        target = tmp_path / f'{len(index.store.regions)}.parquet'
        assert export_parquet(index, target, progress=False).written == 9
        between = find_copies_between(ImageSet(index, pictures / 'sub'), ImageSet(index, pictures / 'rest'), 0.9)
        return find_copies(index, 0.9).to_dict(), between.to_dict(), pytest.importorskip('pyarrow.parquet').read_table(
            target).to_pydict()

    (pictures / 'rest').mkdir()
    picture(1).save(pictures / 'rest' / '1.jpg', quality=90)
    before = results(make(pictures, None))
    assert before[0]['groups'] and before[1]['pairs']
    after = update(pictures, lambda image: [(0, 0, *image.size), (0, 0, *image.size)])
    assert len(after.store.regions) == 18 and results(after) == before


def test_what_gives_no_boxes(pictures):
    for boxes, error in (('boxes.txt', 'name a list'), ('math:no', 'math does not have it'), ('no.csv', 'not found'), *(
            ((lambda image, box=box: [box]), 'up to 64 bytes, not') for box in (
                (1, 2, 3), (1, 2, 3, 4, .9, 'x'), (0, 0, float('nan'), 9), (0, 0, 9, 9, 'x' * 65), 'abcd'))):
        with pytest.raises((ValueError, OSError), match=error):
            make(pictures, boxes)
    other = ('x/0.png', '0 0 9 9', '')
    with pytest.raises(ValueError, match=r'Not in the index: 1 of 1 picture with boxes, such as x/0\.png'):
        make(pictures, listed(pictures.parent / 'boxes.csv', [other]))
    with pytest.warns(UserWarning, match='1 of 5 pictures'):
        update(pictures, listed(pictures.parent / 'boxes.csv', [*ROWS, other]))
