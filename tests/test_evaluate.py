"""Benchmarks from images to tables: figures recomputed by hand, systems that share a trunk, settings, the command."""
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_multigrain.cli.main import main
from timm_multigrain.embed.poolings import System, Systems, choose_systems
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.hub import read_metrics, save_pretrained
from timm_multigrain.images.sources import find_images
from timm_multigrain.layers import create_pool, gem, l2_normalize
from timm_multigrain.measure.benchmarks import BENCHMARKS, load_benchmark
from timm_multigrain.measure.evaluate import add_whitened, evaluate
from timm_multigrain.measure.metrics import clustering_nmi
from timm_multigrain.measure.results import BenchmarkResult, Metric, SystemResult
from timm_multigrain.search.local import LocalDescriber, match_images
from timm_multigrain.search.rerank import RerankedChunks
from timm_multigrain.whiten.fit import fit_whitening

from .test_datasets import small_truth, trapezoid
from .tiny import tiny_model

PROTOCOL = Protocol(size=40, kind='longer-side')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Four groups of three pictures: a pattern of colours with noise on it."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for group in 'abcd':
        pattern = rng.integers(0, 256, (6, 8, 3)).repeat(6, 0).repeat(6, 1)
        (root / group).mkdir()
        for i in range(3):
            noisy = (pattern + rng.integers(-200, 200, pattern.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / group / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def model():
    return tiny_model()


@torch.inference_mode()
def describe(model, benchmark, pool, protocol=PROTOCOL):
    """Pooled maps of the database, image by image."""
    rows = []
    for i in range(len(benchmark.database)):
        x = protocol.normalize(protocol.pixels(benchmark.database.load(i)))[None]
        rows.append(pool(model.forward_features(x))[0])
    return torch.stack(rows)


def by_hand(vectors, benchmark):
    """mAP of groups by sorting."""
    vectors = l2_normalize(vectors)
    scores = (vectors @ vectors.T).numpy()
    groups = [name[0] for name in benchmark.database.names]
    values = []
    for row in range(len(vectors)):
        order = [i for i in np.argsort(-scores[row], kind='stable') if i != row]
        values.append(trapezoid(order, {i for i in order if groups[i] == groups[row]}))
    return 100 * np.mean(values)


def values(result):
    return [metric.value for metric in result.metrics]


def figures_of(benchmark, scores):
    return pytest.approx([value for _, value, _ in benchmark.measure([scores])], abs=1e-4)


def test_every_system_of_one_pass(model, pictures):
    benchmark = load_benchmark('folder', pictures)
    result = evaluate({'tiny': model}, benchmark, protocols=PROTOCOL, poolings=['gem', 'mac', 'spoc', 'rmac', 'crow'],
                     exponents=[1, 2.5])
    fmt = {'input_fmt': model.output_fmt}
    pools = [lambda x: gem(x, 1), lambda x: gem(x, 2.5), *(create_pool(name, **fmt) for name in (
        'mac', 'spoc', 'rmac', 'crow'))]
    wanted = [by_hand(describe(model, benchmark, pool), benchmark) for pool in pools]
    assert values(result) == pytest.approx(wanted, abs=1e-4)
    assert [m.p for m in result.metrics] == [1, 2.5, 'inf', 1, None, None]
    assert len(set(wanted)) > 3  # they do differ
    own = evaluate(model, benchmark, protocols=PROTOCOL)  # GeM with p = 3
    assert own.value('mAP') == pytest.approx(by_hand(describe(model, benchmark, gem), benchmark), abs=1e-4)
    metric, = own.metrics
    assert (metric.p, metric.whitening, metric.size) == (3, None, 40)
    again = evaluate(model, 'folder', pictures, PROTOCOL, poolings=['gem'], exponents=[3], nmi=True)
    vectors = l2_normalize(describe(model, benchmark, gem))
    assert again.metrics[:1] == own.metrics
    assert again.value('NMI') == pytest.approx(100 * clustering_nmi(vectors, np.arange(12) // 3), abs=1e-4)


def test_several_views_equal_a_system_alone(model, pictures):
    """Averages over views are taken of each system's descriptors, so a shared pass must not be taken."""
    protocol = replace(PROTOCOL, scales=(1, 0.7), flip=True)
    result = evaluate({'tiny': model}, 'folder', pictures, protocol, poolings=['gem', 'spoc'], exponents=[2])
    for metric, pool in zip(result.metrics, ['gem', 'spoc'], strict=True):
        alone = tiny_model()
        alone.reset_classifier(3, pool)
        if pool == 'gem':
            alone.set_gem_p(2)
        assert evaluate(alone, 'folder', pictures, protocol).metrics == [metric]


def test_whitening_beside_without(model, pictures, noise_folder):
    """Fitted on other images at the same size, from the same pass."""
    benchmark = load_benchmark('folder', pictures)
    result = evaluate({'tiny': model}, benchmark, protocols=PROTOCOL, poolings=['gem', 'crow'], exponents=[3],
                     whiten=noise_folder, dim=8)
    assert [(row.system, row.metrics[0].whitening) for row in result.systems] == [
        ('tiny, GeM p=3', None), ('tiny, CroW', None), ('tiny, GeM p=3, whitened 8', 8), ('tiny, CroW, whitened 8', 8)]
    images = replace(benchmark, database=find_images(noise_folder))
    for value, pool in zip(values(result)[2:], [gem, lambda x: l2_normalize(create_pool('crow')(x))], strict=True):
        fit = fit_whitening(describe(model, images, pool), 8)
        z = describe(model, benchmark, pool).double()
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        z = z / z.norm(dim=1, keepdim=True)
        whitened = ((z - fit.mean) @ fit.proj).float()
        assert value == pytest.approx(by_hand(whitened, benchmark), abs=1e-4)
    assert not model.whitened


def test_whitened_sums_do_not_depend_on_their_number(model, pictures, noise_folder):
    """SPoC is GeM with p = 1 times the number of positions, so that both are the same L2-normalised and whitened."""
    systems = Systems.of(model, choose_systems(model, ['spoc']))
    with tempfile.TemporaryDirectory() as folder:
        systems = add_whitened(systems, find_images(noise_folder), PROTOCOL, None, Path(folder))
    maps = torch.rand(1, model.num_features, 3, 4)
    wide = torch.cat([maps, maps], 3)  # twice the positions, the same mean
    one, two = (l2_normalize(systems.models[1].forward_head(x, pre_logits=True)) for x in (maps, wide))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_whitened_model(pictures, noise_folder):
    whitened = tiny_model(whitening=9)
    result = evaluate(whitened, 'folder', pictures, PROTOCOL)
    assert result.metrics[0].whitening == 9 and result.systems[0].system == 'model, GeM p=3, whitened 9'
    with pytest.raises(ValueError, match='whitened for its own pooling'):
        evaluate(whitened, 'folder', pictures, PROTOCOL, poolings=['mac'])
    with pytest.raises(ValueError, match='whitened already'):
        evaluate(whitened, 'folder', pictures, PROTOCOL, whiten=noise_folder)


def test_queries_cut_out_and_distractors(model, pictures, tmp_path):
    """Cut out and reduced by the factor of the whole picture, files as they are stored, by Pillow alone; distractors,
    one of them unreadable."""
    rng = np.random.default_rng(0)
    shapes = dict(a=(80, 60), b=(30, 20), c=(64, 64), d=(40, 80), e=(50, 41), q0=(80, 60), q1=(30, 24))
    turned, more = Image.Exif(), tmp_path / 'more'
    turned[0x112] = 6
    for name, (width, height) in shapes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            tmp_path / f'{name}.jpg', exif=turned)
    shutil.copytree(pictures / 'a', more)
    (more / 'broken.jpg').write_bytes(b'x')
    truth = small_truth()
    for entry in truth['gnd']:
        entry['bbx'] = [4, 4.4, 28, 23.6]  # 24 x 20
    (tmp_path / 'gnd.json').write_text(json.dumps(truth))
    benchmark = load_benchmark('rparis6k', tmp_path, ground_truth=tmp_path / 'gnd.json', subset=True)
    protocol = Protocol.for_model(model, size=40, **benchmark.published)

    def prepare(path, box=None, side=40):
        image = Image.open(path)
        image = image.crop(box) if box else image
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return protocol.normalize(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))[None]

    box, files = (4, 4, 28, 24), [*(tmp_path / f'{name}.jpg' for name in 'abcde'), *sorted(more.glob('*.png'))]
    with torch.inference_mode():
        queries = torch.cat([model.embed(prepare(tmp_path / 'q0.jpg', box, side=12)),  # half of 24, as 80 becomes 40
                             model.embed(prepare(tmp_path / 'q1.jpg', box))])  # the whole has less than 40
        database = torch.cat([model.embed(prepare(path)) for path in files])
    result = evaluate(model, benchmark, protocols=protocol, work_dir=tmp_path / 'cache', distractors=more)
    row, = result.systems
    assert values(result) == figures_of(benchmark, queries @ database.T)
    vectors = [load_file(path)['vectors'] for path in (tmp_path / 'cache').rglob('*.safetensors')]
    found, = (l2_normalize(v) for v in vectors if len(v) == 2)
    torch.testing.assert_close(found, queries, rtol=0, atol=1e-6)
    assert '2 queries, 8 images searched' in row.images and result.metrics[0].dataset.endswith('+ 3 distractors')
    note, = row.notes
    assert 'broken.jpg' in note and note in str(result) and result.metrics[0].protocol == (
        'longer side at most 40 (thumbnail), smaller images as they are, lanczos, EXIF ignored, queries cut out, then '
        'reduced as the whole image')
    assert evaluate(model, benchmark).metrics[0].protocol.startswith('longer side at most ')  # by default
    result = evaluate(model, benchmark, protocols=PROTOCOL)
    assert 'Not comparable with published figures, which have kind thumbnail, exif False.' in str(result)
    assert result.metrics[0].protocol.endswith('queries cut out, then resized as an image of their own')


def test_after_the_first_ranking(model, pictures):
    """Augmentation first, then expansion on what it gave, a query's own row left out; by loops."""
    benchmark = load_benchmark('folder', pictures)
    vectors = l2_normalize(describe(model, benchmark, create_pool('gem')))

    def expand(rows):
        out = []
        for i, row in enumerate(rows):
            near = sorted((j for j in range(len(rows)) if j != i), key=lambda j: -float(rows[j] @ row))[:2]
            out.append(row + sum(float(rows[j] @ row) ** 3 * rows[j] for j in near))
        return l2_normalize(torch.stack(out))

    augmented = expand(vectors)
    queries = expand(augmented)
    result = evaluate(model, benchmark, protocols=PROTOCOL, qe=(2, 3.), dba=(2, 3.))
    assert values(result) == figures_of(benchmark, queries @ augmented.T)
    assert result.metrics[0].protocol == (
        'longer side 40, smaller images enlarged, query expansion k=2 alpha=3, database augmentation k=2 alpha=3')
    result = evaluate(model, benchmark, protocols=PROTOCOL, rerank=2)
    chunks = RerankedChunks(vectors, vectors, torch.arange(len(vectors)), 2)
    assert values(result) == figures_of(benchmark, torch.cat(list(chunks), 1))
    assert result.metrics[0].protocol.endswith('enlarged, re-ranking k=2') and '12 of 12 queries' in str(result)
    result = evaluate(model, benchmark, protocols=PROTOCOL, rerank=2, local=5, workers=0)
    details = list(LocalDescriber(model, PROTOCOL, workers=0).fit(benchmark.database).describe(benchmark.database))
    scores = torch.cat(list(chunks), 1)
    for query, row in enumerate(scores):
        for number in row.topk(5).indices.tolist():
            row[number] += min(50, len(match_images(details[query], details[number]))) / 50
    assert values(result) == figures_of(benchmark, scores)
    assert result.metrics[0].protocol.endswith('re-ranking k=2, first 5 verified by details')
    for options, message in (({'local': 0}, 'local=0: give'), ({'local': 1, 'distractors': 'x'}, 'distractors out')):
        with pytest.raises(ValueError, match=message):
            evaluate(model, benchmark, protocols=PROTOCOL, **options)
    with pytest.raises(ValueError, match='leave qe and dba out'):
        evaluate(model, benchmark, protocols=PROTOCOL, rerank='auto', qe=(2, 3.))


def disc(root, pictures, monkeypatch):
    """A set of copies: twelve references, of which four have a copy, two other queries, training images."""
    monkeypatch.setattr(BENCHMARKS['disc21'], 'num_references', 12)
    rng = np.random.default_rng(3)
    for i, path in enumerate(sorted(pictures.rglob('*.png'))):
        Image.open(path).save(root / f'R{i:06}.jpg')
        if i < 4:
            Image.open(path).crop((4, 4, 44, 32)).save(root / f'Q{i:05}.jpg', quality=30)
    for i in range(16):
        noise = Image.fromarray(rng.integers(0, 256, (36, 48, 3), dtype=np.uint8))
        noise.save(root / (f'T{i:06}.jpg' if i < 14 else f'Q{i:05}.jpg'))
    rows = [f'Q{i:05},R{i:06}' for i in range(4)] + ['Q00014,', 'Q00015,']
    (root / 'ground_truth.csv').write_text('\n'.join(['query_id,reference_id', *rows]))
    return root


def test_score_normalisation(model, pictures, tmp_path, monkeypatch):
    benchmark = load_benchmark('disc21', disc(tmp_path, pictures, monkeypatch))
    result = evaluate(model, benchmark, protocols=PROTOCOL, score_norm=True)
    assert result.metrics[0].task == 'copy-detection'
    parts = [l2_normalize(describe(model, replace(benchmark, database=source), create_pool('gem')))
             for source in (benchmark.queries, benchmark.database, benchmark.training)]
    scores = parts[0] @ parts[1].T
    offsets = -2 * (parts[0] @ parts[2].T).sort(dim=1, descending=True).values[:, 9]
    assert values(result)[:2] == figures_of(benchmark, scores)
    assert values(result)[2:] == figures_of(benchmark, scores + offsets[:, None])
    assert [m.split for m in result.metrics] == [None, None, 'normalised', 'normalised']
    assert 'queries cut out' not in result.metrics[0].protocol and 'kind thumbnail' in str(result)
    assert evaluate(model, benchmark).metrics[0].protocol.startswith('longer side at most ')  # the organisers'
    with pytest.raises(ValueError, match='has no training images'):
        evaluate(model, 'folder', pictures, PROTOCOL, score_norm=True)


def test_cache_is_used_and_told_apart(model, pictures, tmp_path, monkeypatch):
    first = evaluate(model, 'folder', pictures, PROTOCOL, work_dir=tmp_path)
    shards = {path for path in tmp_path.rglob('*') if path.is_file()}
    before = {path: path.stat().st_mtime_ns for path in shards}

    def no_pass(*args):
        raise KeyboardInterrupt('the trunk ran again')  # no Exception: those are told as what is wrong with an image

    monkeypatch.setattr(type(model), 'forward_features', no_pass)
    assert evaluate(model, 'folder', pictures, PROTOCOL, work_dir=tmp_path) == first
    assert all(path.stat().st_mtime_ns == before[path] for path in shards if path.suffix == '.safetensors')
    for other in (tiny_model(seed=1), tiny_model(gem_p=2.)):
        with pytest.raises(KeyboardInterrupt, match='ran again'):
            evaluate(other, 'folder', pictures, PROTOCOL, work_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt, match='ran again'):
        evaluate(model, 'folder', pictures, replace(PROTOCOL, size=41), work_dir=tmp_path)


def test_images_of_the_benchmark_have_to_be_readable(model, pictures, tmp_path):
    (shutil.copytree(pictures, tmp_path / 'pictures') / 'a' / '1.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'1\.png.* is not an image'):
        evaluate(model, 'folder', tmp_path / 'pictures', PROTOCOL)


def test_choose_systems(model):
    assert choose_systems(model) == [System('gem', 3.0, own=True)]
    assert choose_systems(model, ['gem']) == [System('gem', 3.0)]
    assert choose_systems(model, [], [1, 4, 1]) == [System('gem', 1), System('gem', 4)]
    assert choose_systems(model, ['mac', 'gem', 'mac'], [math.inf])[1].exponent == 'inf'


def test_a_models_own_exponents_stay(pictures):
    """Systems beside the model's own never touch it."""
    model = tiny_model(per_channel_p=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate({'tiny': model}, 'folder', pictures, PROTOCOL, poolings=['gem', 'mac'], exponents=[2])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    own, = choose_systems(model)
    assert own.exponent is None and str(own) == 'GeM'


def result(system='m, GeM p=3', value=50.123, protocol='crop 224', command=None, notes=()):
    metrics = [Metric('retrieval', 'Set', name, value, 224, 3., protocol, None, split, command=command)
               for name, value, split in (('mAP', value, 'Easy'), ('mP@1', 80., 'Easy'), ('mAP', 20., 'Hard'))]
    return SystemResult(system, tuple(metrics), 'Set: 7 queries, 100 images searched; crop 224', notes)


def test_result_prints_and_saves(tmp_path):
    both = BenchmarkResult((result(), result('m, MAC', 60., 'crop 224, MAC', 'timm-multigrain evaluate', ('a note',))))
    assert str(both) == '\n'.join([
        'Set: 7 queries, 100 images searched; crop 224', '',
        '| system     | size |  mAP Easy |  mAP Hard |',
        '|------------|------|-----------|-----------|',
        '| m, GeM p=3 |  224 |     50.12 | **20.00** |',
        '| m, MAC     |  224 | **60.00** | **20.00** |', '', 'a note'])
    assert read_metrics(both.save(tmp_path / 'results.json')) == both.metrics and len(both.metrics) == 6
    one = BenchmarkResult((result(),))
    assert '**' not in str(one) and one.value('mAP', 'Hard') == 20
    with pytest.raises(KeyError):
        one.value('mAP', 'Medium')


def test_the_command(pictures, tmp_path, noise_folder, hub, capsys):
    """Systems at two sizes, and their figures on the card."""
    save_pretrained(tiny_model(), tmp_path / 'model')
    status = main([
        'evaluate', str(tmp_path / 'model'), '--benchmark', 'folder', '--data', str(pictures), '--size', '32', '40',
        '--pool', 'gem', 'mac', '--p', '1', '3', '--whiten', str(noise_folder), '--dim', '8', '--qe', '2', '3',
        '--json', str(tmp_path / 'r.json'), '--device', 'cpu', '--workers', '0'])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert out.count('whitened 8') == 6 and 'query expansion k=2 alpha=3' in out
    figures = read_metrics(tmp_path / 'r.json')
    assert len(figures) == 12 and {f.size for f in figures} == {32, 40} and {f.whitening for f in figures} == {None, 8}
    assert {f.protocol.endswith(', MAC') for f in figures if f.p == 'inf'} == {True}
    assert main(['publish', str(tmp_path / 'model'), 'me/model', '--license', 'mit', '--metrics',
                 str(tmp_path / 'r.json')]) == 0
    assert b'mAP' in hub.repos['me/model'].files()['README.md']


@pytest.mark.parametrize(('args', 'message'), [
    (['--benchmark', 'folder', '--qe', '2', 'x'], '--qe 2 x: give a number'),
    (['--benchmark', 'folder', '--download-distractors'], 'is for roxford5k and rparis6k'),
    (['--benchmark', 'folder', '--whiten', 'nowhere'], 'nowhere is not a folder'),
    (['--benchmark', 'folder', '--pool', 'max'], "Unknown pooling 'max'"),
    (['--benchmark', 'folder', '--pool', 'mac', '--p', '2'], 'add gem'),
    (['--benchmark', 'folder', '--p', '3', '0'], 'p has to be above 0'),
])
def test_the_command_says_what_is_wrong(pictures, capsys, args, message):
    status = main(['evaluate', 'test_resnet', '--no-pretrained', '--data', str(pictures), '--device', 'cpu', *args])
    err = capsys.readouterr().err
    assert status == 2 and message in err and 'Traceback' not in err and err.count('\n') == 1
