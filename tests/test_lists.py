"""Benchmarks that are lists: own lists, and each published set from the files that it comes with."""
import csv
import io
import json
import re
import tracemalloc

import numpy as np
import pytest
import torch

from timm_multigrain.images.sources import COLUMNS, read_entries
from timm_multigrain.measure.benchmarks import load_benchmark
from timm_multigrain.measure.benchmarks.layouts import _CORRUPT

from .test_datasets import chunks, touch
from .test_metrics import slow_figures

ROWS = [
    {'path': 'q/1.jpg', 'split': 'query', 'label': 'dress', 'instance': 'd1', 'box': [0, 0, 10.5, 20]},
    {'path': 'q/2.jpg', 'split': 'query', 'label': 'shoe', 'instance': 's1'},
    {'path': 'g/1.jpg', 'split': 'gallery', 'label': 'dress', 'instance': 'd1'},
    {'path': 'g/2.jpg', 'split': 'gallery', 'label': 'dress', 'instance': 'd2'},
    {'path': 'g/3.jpg', 'split': 'gallery', 'label': 'shoe', 'instance': 's1'},
    {'path': 'g/4.jpg', 'split': 'gallery', 'label': '', 'instance': ''},
    {'path': 'g/5.jpg', 'split': 'train', 'label': 'shoe', 'instance': 's1'}]


def written(path, rows=ROWS):
    """A list as CSV or JSON lines."""
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return path
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({**row, 'box': ' '.join(map(str, row.get('box', ())))} for row in rows)
    path.write_text('\ufeff' + text.getvalue(), encoding='utf-8')
    return path


@pytest.mark.parametrize('name', ['list.csv', 'list.jsonl'])
def test_own_list(tmp_path, name):
    written(tmp_path / name)
    touch(tmp_path, [row['path'] for row in ROWS])
    benchmark = load_benchmark('list', tmp_path)
    assert benchmark.title == tmp_path.name
    assert list(benchmark.queries.names) == ['q/1.jpg', 'q/2.jpg']
    assert list(benchmark.database.names) == ['g/1.jpg', 'g/2.jpg', 'g/3.jpg', 'g/4.jpg']
    assert benchmark.queries.boxes == [(0, 0, 10.5, 20), None] and benchmark.database.boxes is None
    scores = np.array([[.1, .9, .5, .2], [.3, .2, .4, .9]], np.float32)
    figures = {f.metric: f.value for f in benchmark.measure(chunks(scores, 2))}
    wanted = slow_figures(scores, [{0}, {2}], [(), ()])
    assert figures['Recall@1'] == wanted['Recall@1'] == 0 and figures['Recall@5'] == 100
    assert figures['MAP@R'] == wanted['MAP@R'] and figures['k-NN'] == 50  # the dress is next to another dress


def test_own_list_of_all_against_all(tmp_path):
    """No image says that it is a query: each is one, but for those that nothing else is like, and finds the others."""
    names = [f'{group}{i}.jpg' for group, number in (('a', 3), ('b', 2), ('c', 1)) for i in range(number)]
    written(tmp_path / 'list.csv', [{'path': name, 'label': name[0]} for name in names])
    benchmark = load_benchmark('list', touch(tmp_path, names))
    assert benchmark.queries is None and benchmark.query_rows.tolist() == [0, 1, 2, 3, 4]
    scores = np.random.default_rng(0).integers(-3, 3, (5, 6)).astype(np.float32)
    figures = {f.metric: f.value for f in benchmark.measure(chunks(scores))}
    wanted = slow_figures(scores, [set(own) for own in benchmark.relevant], [(row,) for row in range(5)])
    assert {name: figures[name] for name in ('Recall@1', 'Recall@5', 'MAP@R')} == pytest.approx(
        {name: wanted[name] for name in ('Recall@1', 'Recall@5', 'MAP@R')})


def test_large_groups_are_opened_in_little_memory(tmp_path):
    """As `adapt` opens class folders: what each image has to find is not written down before it is asked for."""
    touch(tmp_path, [f'{i % 2}/{i}.jpg' for i in range(3000)])
    tracemalloc.start()
    benchmark = load_benchmark('folder', tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6 < 8 * 1500 * benchmark.num_queries and len(benchmark.relevant[0]) == 1499


def test_things_in_one_picture(tmp_path):
    """Each part is a query of its own; a path that is given in full is that file, whatever others are called."""
    rows = [{'path': 'd/a.jpg', 'label': label, 'box': [0, 0, side, side]} for label, side in (('x', 5), ('y', 6))]
    written(tmp_path / 'list.csv', [*rows, {'path': 'b.jpg', 'label': 'x'}, {'path': 'c.jpg', 'label': 'y'}])
    benchmark = load_benchmark('list', touch(tmp_path, ['d/a.jpg', 'b.jpg', 'c.jpg', 'more/d/a.jpg']))
    assert benchmark.query_rows.tolist() == [0, 1, 2, 3]
    assert [own.tolist() for own in benchmark.relevant] == [[2], [3], [0], [1]]
    assert [own.tolist() for own in benchmark.ignore] == [[0], [1], [2], [3]]


def test_categories(tmp_path):
    """A query is searched in its own category, where the gallery has any; figures are given for each."""
    rows = [{'path': f'{part}{category}{i}.jpg', 'split': split, 'label': str(i), 'category': category}
            for part, split in (('q', 'query'), ('g', 'gallery')) for category in 'xy' for i in range(2)]
    written(tmp_path / 'list.csv', rows)
    benchmark = load_benchmark('list', touch(tmp_path, [row['path'] for row in rows]))
    assert [own.tolist() for own in benchmark.relevant] == [[0], [1], [2], [3]]
    scores = np.array([[.1, .2, .9, .9, .15], [.1, .2, .9, .9, 0], [.9, .9, .5, .4, 0], [.9, .9, .5, .4, 0]])
    figures = {(f.metric, f.split): f.value for f in benchmark.measure(chunks(scores))}  # the last is a distractor
    assert [figures['Recall@1', split] for split in ('x', 'y', 'all')] == [50, 50, 50]
    assert figures['mAP', 'x'] == pytest.approx(100 * (1 + 1 / 3 / 2) / 2)


@pytest.mark.parametrize('line, message', [
    ({'split': 'query'}, 'line 1: it lacks path'), ({'path': ''}, 'not one of a file below the folder'),
    ({'path': '../a.jpg'}, 'not one of a file below'), ({'path': '/a.jpg'}, 'not one of a file below'),
    ({'path': 'a.jpg', 'split': 'val'}, "split is 'val': give query, gallery, train"),
    ({'path': 'a.jpg', 'kind': 'x'}, "'kind' is not a column of a list: path, label"),
    ({'path': 'a.jpg', 'box': [1, 2]}, 'box is'),
    ({'file': 'a.jpg'}, "'file' is not a column of a list: path, label"),
    ({'path': 'a.jpg', 'label': [1]}, 'line 1: label has to be a text'), (['a.jpg'], 'it has to be an object'),
    ({'path': 'a.jpg', 'box': [0, 0, 'x', 1]}, r'line 1: box\[2\] has to be a number')])
def test_wrong_lines(tmp_path, line, message):
    (tmp_path / 'list.jsonl').write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read_entries(tmp_path / 'list.jsonl')


def test_wrong_lists(tmp_path):
    touch(tmp_path, ['a.jpg'])
    for text, message in (
            ('path,box\na.jpg,\nb.jpg,1 2 x 4\n', r'list\.csv, line 3: could not convert'),
            ('path,label,instance\na.jpg,7,\n', r'no query of .* with an image to find'),
            ('path,label,split\na.jpg,7,query\nb.jpg,7,\n', r'does not say of 1 image \(b\.jpg\) whether they are of'),
            ('path,label\na.jpg,7\nb.jpg,7\na.jpg,7\n', r'list\.csv lists a\.jpg 2 times')):
        (tmp_path / 'list.csv').write_text(text)
        with pytest.raises(ValueError, match=message):
            load_benchmark('list', tmp_path)
    with pytest.raises(FileNotFoundError, match=r'has no list\.csv or list\.jsonl'):
        load_benchmark('list', touch(tmp_path / 'x', ['a.jpg']))


def cars(folder):
    scipy_io = pytest.importorskip('scipy.io')
    for part, of_class in (('train', (98, 99, 196)), ('test', (99, 99))):
        annotations = np.array([(f'{i:05}.jpg', label) for i, label in enumerate(of_class)],
                               dtype=[('fname', object), ('class', object)])
        where = 'devkit/cars_train_annos.mat' if part == 'train' else 'cars_test_annos_withlabels.mat'
        (folder / where).parent.mkdir(exist_ok=True)
        scipy_io.savemat(folder / where, {'annotations': annotations})


def instre(folder):
    gnd = np.array([(np.array([1, 3]), np.array([5, 6, 10, 20])), (2, np.array([0, 0, 4, 4]))],
                   dtype=[('ok', object), ('bbx', object)])
    pytest.importorskip('scipy.io').savemat(folder / 'gnd_instre.mat', {
        'imlist': np.array(['S1/a/1.jpg', 'S1/a/2.jpg', 'S2/b/1.jpg'], object),
        'qimlist': np.array(['S1/a/9.jpg', 'S2/b/9.jpg'], object), 'gnd': gnd})


EVAL = 'Eval/list_eval_partition.txt'
FILES = {
    'cub200': {'CUB_200_2011/images.txt':
               '1 100.A/a.jpg\n2 101.B/b1.jpg\n3 101.B/b2.jpg\n4 200.C/c.jpg\n5 101.B/b3.jpg',
               'CUB_200_2011/image_class_labels.txt': '1 100\n2 101\n3 101\n4 200\n5 101'},
    'sop': {'Stanford_Online_Products/Ebay_test.txt': 'image_id class_id super_class_id path\n'
            '1 11319 1 bicycle_final/1_0.JPG\n2 11319 1 bicycle_final/1_1.JPG\n3 11320 2 sofa_final/2_0.JPG'},
    'inshop': {EVAL: '4\nimage_name item_id evaluation_status\nimg/M/id_1/1.jpg id_1 query\n'
               'img/M/id_1/2.jpg id_1 gallery\nimg/M/id_2/1.jpg id_2 gallery\nimg/M/id_3/1.jpg id_3 train'},
    'consumer2shop': {EVAL: '4\nimage_pair_name_1 image_pair_name_2 item_id evaluation_status\n'
                      'img/T/id_1/comsumer_01.jpg img/T/id_1/shop_01.jpg id_1 test\n'
                      'img/T/id_1/comsumer_01.jpg img/T/id_1/shop_02.jpg id_1 test\n'
                      'img/T/id_2/comsumer_01.jpg img/T/id_2/shop_01.jpg id_2 test\n'
                      'img/T/id_3/comsumer_01.jpg img/T/id_3/shop_01.jpg id_3 train'},
    'street2shop': {
        'meta/json/retrieval_dresses.json': json.dumps([
            {'photo': photo, 'product': product} for photo, product in ((1, 7), (2, 7), (3, 8))]),
        'meta/json/test_pairs_dresses.json': json.dumps([
            {'photo': 10, 'product': q, 'bbox': {'left': 1, 'top': 2, 'width': 3, 'height': 4}} for q in (7, 8)]),
        'meta/json/retrieval_tops.json': json.dumps([{'photo': 3, 'product': 8}, {'photo': 4, 'product': 9}]),
        'meta/json/test_pairs_tops.json': json.dumps([
            {'photo': 10, 'product': 8, 'bbox': {'left': 0, 'top': 0, 'width': 9, 'height': 9}}])},
    'gldv2': {'index.csv': 'id\nabc1\nabd2\nffe3\n', 'retrieval_solution_v2.1.csv':
              'id,images,Usage\n1234,abc1 ffe3,Private\n2345,abd2,Public\n3456,None,Ignored\n'},
    'ilias': {},
    'oxford5k': {f'gt/all_souls_1_{kind}.txt': text for kind, text in (
        ('query', 'oxc1_all_souls_000013 136.5 34.1 648.5 955.7'), ('good', 'all_souls_000013\nall_souls_000026'),
        ('ok', 'all_souls_000091'), ('junk', 'radcliffe_1'))},
    'grocery': {},
    'cars196': cars, 'instre': instre}
IMAGES = {
    'cub200': [f'CUB_200_2011/images/{name}.jpg' for name in ('101.B/b1', '101.B/b2', '200.C/c', '101.B/b3')],
    'sop': ['Stanford_Online_Products/bicycle_final/1_0.JPG', 'Stanford_Online_Products/bicycle_final/1_1.JPG',
            'Stanford_Online_Products/sofa_final/2_0.JPG'],
    'inshop': [f'Img/{part}/M/id_{i}.jpg' for part in ('img', 'img_highres') for i in ('1/1', '1/2', '2/1')],
    'consumer2shop': [f'Img/img/T/{name}.jpg' for name in (
        'id_1/comsumer_01', 'id_1/shop_01', 'id_1/shop_02', 'id_2/comsumer_01', 'id_2/shop_01')],
    'street2shop': ['images/1.jpg', 'images/000000002.png', 'images/3.jpg', 'images/4.jpg', 'images/10.jpg'],
    'gldv2': ['index/a/b/c/abc1.jpg', 'index/a/b/d/abd2.jpg', 'index/f/f/e/ffe3.jpg', 'test/1/2/3/1234.jpg',
              'test/2/3/4/2345.jpg'],
    'ilias': [f'ilias_core/{name}.jpg' for name in (
        'bimp_000/query/Q000_00', 'bimp_000/pos/P000_00', 'bimp_000/pos/P000_01', 'zoot_001/query/Q001_00',
        'zoot_001/query/Q001_01', 'zoot_001/pos/P001_00')],
    'oxford5k': [f'jpg/{name}.jpg' for name in (
        'all_souls_000013', 'all_souls_000026', 'all_souls_000091', 'radcliffe_1', 'paris_louvre_000136')],
    'grocery': [f'{part}/Apple/{name}.jpg' for part in ('train', 'test') for name in ('Royal/1', 'Golden/2')],
    'cars196': ['cars_train/00001.jpg', 'cars_train/00002.jpg', 'cars_test/00000.jpg', 'cars_test/00001.jpg'],
    'instre': ['S1/a/1.jpg', 'S1/a/2.jpg', 'S2/b/1.jpg', 'S1/a/9.jpg', 'S2/b/9.jpg']}
# of the first query: its name, what it finds, what is left out of its ranking; how many queries there are
FIRST = {
    'cub200': ('101.B/b1.jpg', ['101.B/b2.jpg', '101.B/b3.jpg'], ['101.B/b1.jpg'], 3),
    'sop': ('bicycle_final/1_0.JPG', ['bicycle_final/1_1.JPG'], ['bicycle_final/1_0.JPG'], 2),
    'inshop': ('M/id_1/1.jpg', ['M/id_1/2.jpg'], [], 1),
    'consumer2shop': ('T/id_1/comsumer_01.jpg', ['T/id_1/shop_01.jpg', 'T/id_1/shop_02.jpg'], [], 2),
    'street2shop': ('images/10.jpg', ['images/1.jpg', 'images/000000002.png', 'images/3.jpg'], [], 2),
    'gldv2': ('test/1/2/3/1234', ['index/a/b/c/abc1', 'index/f/f/e/ffe3'], [], 2),
    'ilias': ('ilias_core/bimp_000/query/Q000_00.jpg',
              ['ilias_core/bimp_000/pos/P000_00.jpg', 'ilias_core/bimp_000/pos/P000_01.jpg'], [], 3),
    'oxford5k': ('all_souls_000013', ['all_souls_000013', 'all_souls_000026', 'all_souls_000091'], ['radcliffe_1'], 1),
    'grocery': ('test/Apple/Golden/2.jpg', ['train/Apple/Golden/2.jpg'], [], 2),
    'cars196': ('cars_train/00001.jpg', ['cars_test/00000.jpg', 'cars_test/00001.jpg'], ['cars_train/00001.jpg'], 3),
    'instre': ('S1/a/9.jpg', ['S1/a/1.jpg', 'S2/b/1.jpg'], [], 2)}
BOXES = {'street2shop': (1, 2, 4, 6), 'oxford5k': (136.5, 34.1, 648.5, 955.7), 'instre': (5, 6, 15, 26)}
PARTS = {'gldv2': ['private', 'public', 'all'], 'street2shop': ['dresses', 'tops', 'all']}


@pytest.mark.parametrize('name', FILES)
def test_published_layouts(tmp_path, name):
    """Read as a subset, and refused as the whole set, which says where that is to be had; a lost image is left out."""
    if callable(FILES[name]):
        FILES[name](tmp_path)
    for path, text in {} if callable(FILES[name]) else FILES[name].items():
        touch(tmp_path, [path])
        (tmp_path / path).write_text(text)
    benchmark = load_benchmark(name, touch(tmp_path, IMAGES[name]), subset=True)
    query, right, left_out, number = FIRST[name]
    database, queries = benchmark.database, benchmark.queries
    first = database.names[benchmark.query_rows[0]] if queries is None else queries.names[0]
    assert (first, benchmark.num_queries) == (query, number)
    assert sorted(database.names[i] for i in benchmark.relevant[0]) == sorted(right)
    assert [database.names[i] for i in benchmark.ignore[0]] == left_out
    assert all((tmp_path / path).is_file() for path in database.paths) and not _CORRUPT & set(database.names)
    assert (queries.boxes[0] if queries and queries.boxes else None) == BOXES.get(name)
    scores = torch.rand(benchmark.num_queries, len(database), generator=torch.Generator().manual_seed(0)) - 0.5
    figures = benchmark.measure([scores])
    assert [f.metric for f in figures[:len(benchmark.layout.measures)]] == list(benchmark.layout.measures)
    assert list(dict.fromkeys(f.split for f in figures)) == PARTS.get(name, [None])

    lost = next(path for path in IMAGES[name] if right[-1].split('.')[0] in path)
    (tmp_path / lost).unlink()
    if benchmark.layout.counts is not None or name in ('consumer2shop', 'street2shop'):
        with pytest.raises(FileNotFoundError, match=re.escape(benchmark.layout.source)):
            load_benchmark(name, tmp_path)
    if len(right) > 1:
        again = load_benchmark(name, tmp_path, subset=True)
        assert len(again.relevant[0]) == len(right) - 1
        assert len(again.database) == len(database) - list(database.names).count(right[-1])
        assert re.search(rf' \({again.num_queries} quer(y|ies), {len(again.database)} images?\)', again.title)
