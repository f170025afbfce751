"""Benchmarks in their published layouts: what is read, what is judged, and what is said of what is missing."""
import collections
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multigrain.cli.measure import _BENCHMARKS
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.benchmarks import BENCHMARKS, copydays, disc21, download_benchmark, layouts, load_benchmark
from timm_multigrain.measure.benchmarks.disc21 import read_pairs
from timm_multigrain.measure.benchmarks.revisited import read_ground_truth

from .test_archives import zipped


def touch(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def draw(root, names, size=(8, 6)):
    """Images whose left half is black and right half white."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new('RGB', size)
        image.paste((255, 255, 255), (size[0] // 2, 0, *size))
        image.save(path)
    return root


def trapezoid(order, relevant):
    """Average precision of Holidays, by its definition: precision before and at each relevant item."""
    found, total = 0, 0.
    for rank, item in enumerate(order):
        if item in relevant:
            before = found / rank if rank else 1.
            found += 1
            total += (before + found / (rank + 1)) / 2
    return total / len(relevant)


def chunks(scores, number=3):
    """The scores as a stream that can be read more than once."""
    return torch.from_numpy(scores).tensor_split(number, dim=1)


def holidays_names(shared_data):
    return [line.split()[0] for line in (shared_data / 'gt' / 'holidays_images.dat').read_text().splitlines()]


def test_holidays_as_published(tmp_path, shared_data):
    names = holidays_names(shared_data)
    benchmark = load_benchmark('holidays', touch(tmp_path, [f'jpg/{name}' for name in names]))
    assert list(benchmark.database.names) == names and benchmark.num_queries == 500
    assert [names[row] for row in benchmark.query_rows] == [name for name in names if int(name[:-4]) % 100 == 0]
    scores = np.random.default_rng(0).standard_normal((500, 1491)).astype(np.float32)
    figure, = benchmark.measure(chunks(scores))
    wanted = []
    for score, row in zip(scores, benchmark.query_rows, strict=True):
        group = {i for i, name in enumerate(names) if name[:4] == names[row][:4] and i != row}
        wanted.append(trapezoid([i for i in np.argsort(-score) if i != row], group))
    assert figure.metric == 'mAP' and figure.value == pytest.approx(100 * np.mean(wanted), rel=1e-12)


def test_holidays_incomplete(tmp_path, shared_data):
    touch(tmp_path, holidays_names(shared_data)[:-5])
    with pytest.raises(FileNotFoundError, match=r'lacks 5 of the 1491 .*\.jpg and 2 more; its archives jpg1'):
        load_benchmark('holidays', tmp_path)
    with pytest.raises(FileNotFoundError, match=r'INRIA Holidays not found: .* is not a folder; its archives'):
        load_benchmark('holidays', tmp_path / 'none')
    whole = [name for name in holidays_names(shared_data) if name[:4] in ('1000', '1003')]
    there = sorted([*whole, '100100.jpg', '100201.jpg'])  # a query with nothing to find, and another without its query
    benchmark = load_benchmark('holidays', touch(tmp_path / 'x', there), subset=True)
    assert list(benchmark.database.names) == there
    assert [there[row] for row in benchmark.query_rows] == ['100000.jpg', '100300.jpg']
    assert benchmark.title == f'INRIA Holidays (2 queries, {len(there)} images)'
    touch(tmp_path / 'x', ['copy/100000.jpg'])
    with pytest.raises(ValueError, match=r'has the image 100000\.jpg more than once'):
        load_benchmark('holidays', tmp_path / 'x', subset=True)


@pytest.mark.parametrize('form', ['json', 'txt'])
def test_holidays_upright(tmp_path, shared_data, form):
    names = [name for name in holidays_names(shared_data) if name[:4] == '1003']
    draw(tmp_path, names)
    turns = {names[0]: 90, names[1]: -90}
    path = tmp_path / f'turns.{form}'
    path.write_text(json.dumps(turns) if form == 'json' else '# clockwise\n' + ''.join(
        f'{name} {turn}\n' for name, turn in turns.items()))
    benchmark = load_benchmark('holidays', tmp_path, upright=path, subset=True)
    assert benchmark.title.endswith(', upright')
    turned, back = benchmark.database.load(0), benchmark.database.load(1)
    assert turned.size == back.size == (6, 8)
    # the white half was right: a clockwise turn brings it to the bottom, the other one to the top
    assert turned.getpixel((3, 7))[0] > 200 > 50 > turned.getpixel((3, 0))[0]
    assert back.getpixel((3, 0))[0] > 200 > 50 > back.getpixel((3, 7))[0]


def test_ukbench(tmp_path, shared_data, monkeypatch):
    part = shared_data / 'instances' / 'ukbench'
    benchmark = load_benchmark('ukbench', part, subset=True)
    assert len(benchmark.database) == benchmark.num_queries == 56
    assert benchmark.title == 'UKBench (56 queries, 56 images)'
    with pytest.raises(FileNotFoundError, match=r'lacks 10144 of the 10200 .*ukbench00056\.jpg'):
        load_benchmark('ukbench', part)
    benchmark = load_benchmark('ukbench', touch(tmp_path, [f'ukbench{i:05}.jpg' for i in range(7)]), subset=True)
    assert list(benchmark.database.names) == [f'ukbench{i:05}.jpg' for i in range(4)]
    with pytest.raises(ValueError, match=r'has no query of UKBench .* four images of each object'):
        load_benchmark('ukbench', touch(tmp_path / 'x', ['a.jpg']), subset=True)
    monkeypatch.setitem(BENCHMARKS, 'ukbench', replace(
        BENCHMARKS['ukbench'], read=lambda folder: layouts._ukbench(folder, 40), counts=(40, 40)))
    touch(tmp_path / 'y', [f'{folder}/ukbench{i:05}.jpg' for i in range(40) for folder in ('full', 'thumbnails')])
    benchmark = load_benchmark('ukbench', tmp_path / 'y')
    assert all('full' in str(path) for path in benchmark.database.paths) and benchmark.title == 'UKBench'
    scores = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    figure, = benchmark.measure(chunks(scores))
    wanted = np.mean([sum(i // 4 == q // 4 for i in np.argsort(-scores[q])[:4]) for q in range(40)])
    assert figure.metric == 'N-S' and figure.value == pytest.approx(wanted, rel=1e-12)


def make_copydays(root, blocks=6):
    originals = [f'{200000 + 100 * i}.jpg' for i in range(blocks)]
    names = [f'original/{name}' for name in originals]
    names += [f'{family}/{strength}/{name}' for family in ('crops', 'jpegqual') for strength in (10, 5)
              for name in originals]
    names += [f'strong/{200000 + 100 * i + 1 + k}.jpg' for i in range(blocks) for k in range(1 + i % 2)]
    return touch(root, names)


def test_copydays(tmp_path, monkeypatch):
    monkeypatch.setattr(copydays, 'NEAREST', 4)
    benchmark = load_benchmark('copydays', make_copydays(tmp_path), subset=True)
    assert len(benchmark.database) == 6 and benchmark.num_queries == 24 + 9 + 6
    scores = np.random.default_rng(0).standard_normal((39, 10)).astype(np.float32).round(1)  # 4 distractors
    scores += np.arange(10) / 1e4  # no two equal ones of a query, but of different queries
    figures = {(f.metric, f.split): f.value for f in benchmark.measure(chunks(scores))}
    ap, pairs = {}, []
    for query, name in enumerate(benchmark.queries.names):
        family, *strength, base = name.split('/')
        truth = list(benchmark.database.names).index(f'original/{base[:4]}00.jpg')
        value = trapezoid(list(np.argsort(-scores[query])), {truth})
        family = {'crops': 'crop', 'jpegqual': 'jpeg'}.get(family, family)
        for split in {family + ', all' if strength else family, ' '.join([family, *strength])}:
            ap.setdefault(('mAP', split), []).append(value)
        pairs += sorted((-scores[query, i], i == truth) for i in range(10))[:4]
    wanted = {key: 100 * np.mean(values) for key, values in ap.items()}
    ranking = [hit for _, hit in sorted(pairs)]  # wrong ones first
    wanted['uAP', 'crop, jpeg, original, strong'] = 100 * trapezoid(
        range(len(ranking)), {i for i, hit in enumerate(ranking) if hit}) * sum(ranking) / 39
    assert figures == pytest.approx(wanted, rel=1e-6) and len(wanted) == 9
    assert 0 < sum(ranking) < 39 and len({score for score, _ in pairs}) < len(pairs)


def test_copydays_incomplete(tmp_path):
    with pytest.raises(FileNotFoundError, match='original holds 6 images of INRIA Copydays, not 157'):
        load_benchmark('copydays', make_copydays(tmp_path / 'a'))
    touch(tmp_path / 'a', ['strong/299901.jpg'])  # of no original
    assert load_benchmark('copydays', tmp_path / 'a', subset=True).title == 'INRIA Copydays (39 queries, 6 images)'
    touch(tmp_path / 'a', ['originals/200000.jpg'])
    with pytest.raises(ValueError, match='original image 200000 twice'):
        load_benchmark('copydays', tmp_path / 'a', subset=True)
    touch(tmp_path / 'c', [f'original/{200000 + 100 * i}.jpg' for i in range(157)])
    with pytest.raises(FileNotFoundError, match='strong holds 0 images'):
        load_benchmark('copydays', tmp_path / 'c', subset=True)
    touch(tmp_path / 'c', [f'strong/{200000 + 100 * (i % 157) + 1 + i // 157}.jpg' for i in range(229)])
    assert load_benchmark('copydays', tmp_path / 'c').title == 'INRIA Copydays'
    touch(tmp_path / 'c', ['crops/10/200000.jpg'])
    with pytest.raises(FileNotFoundError, match='lacks 156 of the 157 images of "crop 10"'):
        load_benchmark('copydays', tmp_path / 'c')


def small_truth():
    return {'imlist': ['a', 'b', 'c', 'd', 'e'], 'qimlist': ['q0', 'q1'], 'gnd': [
        {'bbx': [1, 1, 5, 5], 'easy': [0], 'hard': [1, 2], 'junk': [3]},
        {'bbx': [0, 0, 8.5, 6], 'easy': [], 'hard': [4], 'junk': []}]}


@pytest.mark.parametrize('suffix', ['pkl', 'json'])
def test_revisited(tmp_path, suffix):
    truth = small_truth()
    draw(tmp_path, [f'jpg/{name}.jpg' for name in 'abcde'] + ['jpg/q0.jpg', 'jpg/q1.jpg'])
    path = tmp_path / f'gnd_roxford5k.{suffix}'
    path.write_bytes(pickle.dumps(truth) if suffix == 'pkl' else json.dumps(truth).encode())
    benchmark = load_benchmark('roxford5k', tmp_path, ground_truth=path, subset=True)
    assert benchmark.title == 'Revisited Oxford (2 queries, 5 images)'
    part, whole = benchmark.queries.load_part(0)
    assert (part.size, whole) == ((4, 4), (8, 6))
    scores = np.array([[.9, .1, .8, 1., .7, .75], [.1, .2, .3, .4, .35, .05]], np.float32)  # a distractor
    figures = {(f.metric, f.split): f.value for f in benchmark.measure(chunks(scores, 2))}
    # Medium: d is junk; a and c lead, b follows e and the distractor. Of the second query, e is behind d.
    first = (1 + (1 + 1) / 2 + (2 / 4 + 3 / 5) / 2) / 3
    assert figures['mAP', 'Medium'] == pytest.approx(100 * (first + (0 + 1 / 2) / 2) / 2)
    assert figures['mAP', 'Easy'] == pytest.approx(100)  # the second query has no easy image and is left out
    hard = (1 + (1 / 3 + 2 / 4) / 2) / 2
    assert figures['mAP', 'Hard'] == pytest.approx(100 * (hard + 1 / 4) / 2)
    assert figures['mP@1', 'Medium'] == pytest.approx(50)


def test_revisited_as_published(tmp_path, shared_data):
    path = shared_data / 'gt' / 'gnd_rparis6k.pkl'
    images, queries, entries = read_ground_truth(path)
    assert len(images) == 6322 and len(queries) == len(entries) == 70
    with open(path, 'rb') as file:
        assert dict(zip(('imlist', 'qimlist', 'gnd'), (images, queries, entries), strict=True)) == pickle.load(file)
    touch(tmp_path, [f'jpg/{name}.jpg' for name in [*images, *queries]])
    benchmark = load_benchmark('rparis6k', tmp_path, ground_truth=path)
    assert benchmark.title == 'Revisited Paris' and list(benchmark.database.names) == images
    with pytest.raises(FileNotFoundError, match='where Revisited Oxford has 70 and 4993: ask for a subset'):
        load_benchmark('roxford5k', tmp_path, ground_truth=path)
    (tmp_path / 'jpg' / f'{images[0]}.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=f'lacks 1 of the 6392 images of Revisited Paris: {images[0]}'):
        load_benchmark('rparis6k', tmp_path, ground_truth=path)
    with pytest.raises(FileNotFoundError, match=r'has no gnd_rparis6k\.pkl of Revisited Paris'):
        load_benchmark('rparis6k', tmp_path)


def test_revisited_part(tmp_path, shared_data):
    """The images that are there; a query goes with its image, or with the last image that it has to find."""
    path = shared_data / 'gt' / 'gnd_rparis6k.pkl'
    images, queries, entries = read_ground_truth(path)
    there = [name for number, name in enumerate(images) if number % 7 == 0]
    lost = {images[i] for kind in ('easy', 'hard') for i in entries[30][kind]}
    touch(tmp_path, [f'{name}.jpg' for name in [*there, *(queries[q] for q in (0, 3, 30, 60))] if name not in lost])
    benchmark = load_benchmark('rparis6k', tmp_path, ground_truth=path, subset=True)
    assert list(benchmark.queries.names) == [queries[q] for q in (0, 3, 60)]
    names = list(benchmark.database.names)
    assert names == [name for name in there if name not in lost]
    assert benchmark.title == f'Revisited Paris (3 queries, {len(names)} images)'
    for number, q in enumerate((0, 3, 60)):
        assert list(benchmark.queries.boxes[number]) == pytest.approx(entries[q]['bbx'])
        easy, hard, junk = ({images[i] for i in entries[q][kind]} & {*names} for kind in ('easy', 'hard', 'junk'))
        assert {names[i] for i in benchmark.relevant[number]} == easy | hard
        assert {names[i] for i in benchmark.ignore[number]} == junk and benchmark.asked[number].easy & {*names} == easy
    (tmp_path / 'a.json').write_text(json.dumps(small_truth() | {'imlist': ['a', 'b', 'c', 'd', 'a']}))
    with pytest.raises(ValueError, match='names images more than once'):
        read_ground_truth(tmp_path / 'a.json')


RAN = []


def note_run(*args):
    """What a hostile pickle calls."""
    RAN.append(args)


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class State:
    def __init__(self, value):
        self.value = value


def opcodes(*parts):
    return b'\x80\x02' + b''.join(parts) + b'.'


HOSTILE = {
    'function': Call(note_run, 1), 'shell': Call(os.system, 'touch pickled-was-here'), 'eval': Call(eval, 'RAN'),
    'getattr': Call(getattr, [], 'append'), 'own class': State(1), 'dict': collections.OrderedDict(a=1),
    'import': Call(__import__, 'os'), 'loader': Call(np.load, 'x'), 'array': np.ones(2), 'object array': np.array(
        [1, 'x'], dtype=object), 'function itself': note_run, 'loop of tuples': (([],),),
    'extension': opcodes(b'\x82\x05'), 'persistent id': opcodes(b'X\x01\x00\x00\x00a', b'Q'),
    'dotted name': opcodes(b'cbuiltins\nset.__class__\n'), 'instance': b"(S'touch x'\nios\nsystem\n.",
    'state of a list': opcodes(b']', b'}X\x01\x00\x00\x00aK\x01u', b'b'), 'cut off': pickle.dumps([1] * 100)[:-3],
    'nothing': b'', 'large': b'x' * (17 << 20),}


@pytest.mark.parametrize('kind', HOSTILE)
def test_pickles_are_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    value, path = HOSTILE[kind], tmp_path / 'a.pkl'
    for protocol in (0, 2, 4):
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps({'gnd': [value]}, protocol))
        with pytest.raises(ValueError, match=r'a\.pkl (is not a whole pickle|has to be|lacks)') as error:
            read_ground_truth(path)
        assert not RAN and os.listdir(tmp_path) == ['a.pkl'] and '\n' not in str(error.value)


def write_csv(root, lines, name='dev_ground_truth.csv'):
    root.mkdir(exist_ok=True)
    (root / name).write_text('\n'.join(['query_id,reference_id', *lines]) + '\n')
    return root


def test_disc21(tmp_path, monkeypatch):
    monkeypatch.setattr(BENCHMARKS['disc21'], 'num_references', 5)
    monkeypatch.setattr(disc21, 'MAX_PAIRS', 12)
    touch(tmp_path, [f'references/R{i:06}.jpg' for i in range(5)] + [f'queries/Q{i:05}.jpg' for i in range(6)]
          + ['training/T000000.jpg'])
    write_csv(tmp_path, ['Q00000,R000003', 'Q00001,', 'Q00002,R000001', 'Q00003,'])
    benchmark = load_benchmark('disc21', tmp_path)
    assert list(benchmark.queries.names) == [f'Q{i:05}' for i in range(4)]  # the dev queries, not all in the folder
    assert benchmark.title == 'DISC21 (4 queries)' and len(benchmark.training) == 1
    scores = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    scores[2, 1] = 3
    figures = {f.metric: f.value for f in benchmark.measure(chunks(scores))}
    pairs = sorted(((scores[q, r], (q, r) in {(0, 3), (2, 1)}) for q in range(4) for r in range(5)), reverse=True)[:12]
    hits = np.array([hit for _, hit in pairs])
    precision = hits.cumsum() / np.arange(1, 13)
    assert figures['uAP'] == pytest.approx(100 * (precision * hits).sum() / 2)
    assert figures['recall@P90'] == pytest.approx(100 * (hits.cumsum() / 2)[precision >= .9].max())


def test_disc21_which_queries(tmp_path, shared_data, monkeypatch):
    touch(tmp_path, ['R000001.jpg', 'R000002.jpg', 'Q00000.jpg', 'Q00001.jpg', 'Q00002.jpg'])
    listed = tmp_path / 'list.txt'
    listed.write_text('Q00000\nQ00001.jpg\nQ00002\nQ00001\n')

    def refused(message, kind=ValueError, **options):
        with pytest.raises(kind, match=message):
            load_benchmark('disc21', tmp_path, **options)

    for lines in (['Q1'], ['Q1,R1,0.5'], [',R1'], ['Q1,'], []):
        write_csv(tmp_path, lines)
        refused(r'dev_ground_truth\.csv')
    write_csv(tmp_path, ['Q00000,R000002', 'Q00002,R000001'])
    refused('does not say which queries there are')
    benchmark = load_benchmark('disc21', tmp_path, subset=True)
    assert list(benchmark.database.names) == ['R000001', 'R000002'] and benchmark.num_queries == 2
    benchmark = load_benchmark('disc21', tmp_path, subset=True, queries=listed)
    assert benchmark.num_queries == 3 and benchmark.pairs == [(0, 1), (2, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(BENCHMARKS['disc21'], 'num_references', 2)
        refused('names 1 references that DISC21 does not have: R000002', queries=listed)
    (tmp_path / 'R000001.jpg').unlink()
    benchmark = load_benchmark('disc21', tmp_path, subset=True, queries=listed)
    assert list(benchmark.database.names) == ['R000002'] and benchmark.pairs == [(0, 0)]
    assert benchmark.title == 'DISC21 (3 queries, 1 image)'
    listed.write_text('Q00001\n')
    refused('lacks 2 queries that', subset=True, queries=listed)
    queries, pairs = read_pairs(shared_data / 'gt' / 'disc21_subset_1_ground_truth.csv')
    assert len(queries) == len(pairs) == 4991
    write_csv(tmp_path, ['Q00000,'], 'other_ground_truth.csv')
    refused('more than once', FileNotFoundError)


def test_own_folders(tmp_path):
    names = ['a/0.jpg', 'a/1.jpg', 'a/2.png', 'b/0.jpg', 'b/1.jpg', 'alone/0.jpg']
    benchmark = load_benchmark('folder', touch(tmp_path / 'mine', names))
    assert list(benchmark.database.names) == sorted(names) and benchmark.num_queries == 5
    touch(tmp_path / 'mine', ['loose.jpg'])
    with pytest.raises(ValueError, match=r'images outside of groups \(loose\.jpg\)'):
        load_benchmark('folder', tmp_path / 'mine')
    with pytest.raises(ValueError, match='no query of one with an image to find: give a folder with two'):
        load_benchmark('folder', touch(tmp_path / 'one', ['a/0.jpg', 'b/0.jpg']))


def test_own_ground_truth(tmp_path):
    touch(tmp_path, ['x/0.jpg', 'x/1.jpg', 'x/2.jpg', 'x/3.jpg', 'y/0.jpg'])
    truth = tmp_path / 'gt.json'
    truth.write_text(json.dumps({'x/0.jpg': 5, 'x/1.jpg': -1, 'x/2.jpg': 5, 'x/3.jpg': -2, 'y/0.jpg': 5}))
    benchmark = load_benchmark('folder', tmp_path / 'x', ground_truth=truth)
    assert list(benchmark.database.names) == ['0.jpg', '1.jpg', '2.jpg'] and list(benchmark.query_rows) == [0, 2]
    assert load_benchmark('folder', tmp_path).num_queries == 3  # gt.json of the folder itself
    truth.write_text(json.dumps({'x/0.jpg': 5, 'x/9.jpg': 5}))
    with pytest.raises(FileNotFoundError, match=r'lacks 1 of the 2 images that .*gt\.json names there: x/9\.jpg'):
        load_benchmark('folder', tmp_path)
    truth.write_text(json.dumps({'x/0.jpg': 5, 'x/9.jpg': 5, 'y/0.jpg': 5}))
    assert list(load_benchmark('folder', tmp_path, subset=True).database.names) == ['x/0.jpg', 'y/0.jpg']
    for wrong in ({'x/0.jpg': 'a'}, {'x/0.jpg': -3}, {'x/0.jpg': True}, {'x/0.jpg': 1.5}, []):
        truth.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r'gt\.json'):
            load_benchmark('folder', tmp_path)


def test_names_and_options(tmp_path):
    with pytest.raises(ValueError, match="'holiday' is not a benchmark: take holidays"):
        load_benchmark('holiday', tmp_path)
    with pytest.raises(ValueError, match='ukbench has no option upright; it has subset'):
        load_benchmark('ukbench', tmp_path, upright='x')
    with pytest.raises(ValueError, match='DISC21: it is given out, against its terms'):
        download_benchmark('disc21', tmp_path)
    assert tuple(BENCHMARKS) == _BENCHMARKS


def test_download(tmp_path, server, monkeypatch, capsys):
    """From an address to a benchmark that loads."""
    content = pickle.dumps(small_truth())
    images = draw(tmp_path / 'made', [f'{name}.jpg' for name in [*'abcde', 'q0', 'q1']])
    archive = zipped({f'oxford/{path.name}': path.read_bytes() for path in images.iterdir()})
    monkeypatch.setitem(BENCHMARKS, 'roxford5k', replace(BENCHMARKS['roxford5k'], downloads=(
        RemoteFile(server.add('gnd_roxford5k.pkl', content)), RemoteFile(server.add('a.zip', archive), 'jpg'))))
    download_benchmark('roxford5k', tmp_path / 'set')
    assert capsys.readouterr().out.count('SHA-256') == 2
    assert len(load_benchmark('roxford5k', tmp_path / 'set', subset=True).database) == 5
