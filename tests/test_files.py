"""Files that other people made: whatever is in them, an answer or one sentence, never a traceback."""
import copy
import json
import pickle
import random
import resource
import types

import pytest
import torch
import yaml
from PIL import Image

from timm_multigrain.embed.protocol import Protocol, check_fitted
from timm_multigrain.embed.shards import Descriptors, iter_shards, read_manifest, write_manifest, write_shard
from timm_multigrain.files import check_json, parse_json, read_json, write_bytes
from timm_multigrain.hub import read_metrics
from timm_multigrain.hub.card import load_card, make_card, own_figures
from timm_multigrain.images.labels import match_classes
from timm_multigrain.images.sources import ImageFiles, open_images
from timm_multigrain.index.export import _CONFIG, _record
from timm_multigrain.measure import archives
from timm_multigrain.measure.benchmarks import load_benchmark
from timm_multigrain.measure.benchmarks.holidays import read_turns
from timm_multigrain.measure.results import parse_metrics
from timm_multigrain.measure.tune_p import tune_p
from timm_multigrain.models.save import whitened_for
from timm_multigrain.train.options import TrainOptions

from .tiny import tiny_model

MODEL = tiny_model()


def test_check_json():
    form = {'names': [str], 'p': (float, None), 'sizes': {str: int}}
    check_json({'names': [], 'p': 3, 'sizes': {'a': 1}, 'more': 1}, form, 'f')
    check_json({'names': ['a'], 'p': None, 'sizes': {}}, form, 'f')
    for value, says in [
            ([], r"f has to be an object, not \[\]"), ({'names': []}, 'f lacks p, sizes'),
            ({'names': ['a', 3], 'p': 1, 'sizes': {}}, r'f\.names\[1\] has to be a text, not 3'),
            ({'names': [], 'p': True, 'sizes': {}}, r'f\.p has to be a number or null, not True'),
            ({'names': [], 'p': 2**70, 'sizes': {}}, r'f\.p has to be a number'),
            ({'names': [], 'p': float('inf'), 'sizes': {}}, r'f\.p has to be a number'),
            ({'names': [], 'p': 1, 'sizes': {'a\x1b': 1.5}}, r'f\.sizes\.a\\x1b has to be an integer, not 1\.5')]:
        with pytest.raises(ValueError, match=says):
            check_json(value, form, 'f')


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=rf"too large: '{tmp_path}/table.csv'"):
            write_bytes(tmp_path / 'table.csv', bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_read_json(tmp_path):
    path = tmp_path / 'a.json'
    for content in (b'{', b'NaN', b'[1, -Infinity]', b'\xff', b'[' * 100_000, b'1' * 10_000, b''):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'a\.json is not JSON'):
            read_json(path)
    with pytest.raises(FileNotFoundError, match='list of downloads not found'):
        read_json(tmp_path / 'b.json', 'list of downloads')
    assert parse_json('{"a": [1, 2.5, null]}') == {'a': [1, 2.5, None]}


ODD = [None, True, -1, 0, 1, 10**6, 2**63, 10**400, 1e308, 3.5, '', 'x', '../x', '/etc/passwd', 'a\x1b[31m\nb', '\0',
       '\ud800', [], {}, [[]], [1, 2], [None], {'a': 1}, ['a', 'b'], float('nan'), float('inf'), 'hf-hub:a/b', '\u202e']
BYTES = [b'\0', b'\xff\xfe', b'"', b'\n', b',', b'[[', b'NaN', b'1e999', b'\xf0\x9f', b'\x1b[31m']


def places(tree, path=()):
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


def change_tree(tree, random, odd_values=ODD):
    """The tree with up to three of its parts replaced by odd values, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(random.randint(1, 3)):
        path, odd = random.choice(list(places(tree))), copy.deepcopy(random.choice(odd_values))
        if not path:
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        if random.random() < 0.7:
            parent[path[-1]] = odd
        elif random.random() < 0.5:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[random.choice(['x', '\x1b[2J', ''])] = odd
        else:
            parent.insert(path[-1], odd)
    return tree


def change_bytes(content, random):
    content = bytearray(content)
    for _ in range(random.randint(1, 6)):
        place = random.randint(0, len(content))
        new = random.choice([*BYTES, bytes([random.randint(0, 255)])])
        content[place:place + random.choice([0, 1, 1, 9, 1 << 20])] = new
    return bytes(content)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    for name in ('a', 'b', 'c', 'd', 'Q00000', 'Q00001', 'R000000', 'R000001'):
        Image.new('RGB', (20, 20)).save(folder / f'{name}.jpg')
    return folder


NAMES = ['a', 'b', 'c', 'd']
TRUTH = {'imlist': NAMES[1:], 'qimlist': ['a'],
         'gnd': [{'bbx': [0., 0., 9., 9.], 'easy': [0], 'hard': [1], 'junk': [2]}]}
FIGURE = {'task': 'classification', 'dataset': 'ImageNet-1k', 'metric': 'top1', 'value': 78.6, 'size': 500, 'p': 4,
          'protocol': 'longer side', 'whitening': None, 'source_name': 's', 'source_url': 'https://x.org'}
SETTINGS = {'p': 3., 'protocol': {'size': 64, 'kind': 'crop'}}
ROW = {'path': 'a.jpg', 'width': 1, 'height': 1, 'bytes': 1, 'mtime_ns': 1, 'sha256': 'a', 'classes': [['a', 0.5]]}
CONFIG = {'model': {'source': '/x', 'options': {}, 'weights_sha256': 'a', 'pool': 'gem', 'dim': 3, 'num_classes': 2,
                    'label_names': ['a', 'b']}, 'protocol': {'size': 64}}
OPTIONS = {'mg_repeats': 3, 'mg_classif_weight': .5, 'mg_instance_loss': 'margin', 'mg_margin': .2, 'mg_beta_init': 1.2,
           'mg_instance_loss_kwargs': {}, 'mg_sampling': 'row', 'mg_gather': False, 'mg_lighting': 0.}
MANIFEST = {'images': {'number': 2, 'sha256': 'b'}, 'settings': {'components': 3}, 'shard_size': 2, 'shards': 1}


def use_benchmark(benchmark):
    benchmark.database.load(0)
    benchmark.measure([torch.rand(benchmark.num_queries, len(benchmark.database))])


def use_card(folder, path):
    card = load_card(path, 'README.md')
    str(make_card(MODEL, 'me/x', 'mit', metrics=own_figures(card), base=card))


def use_metrics(folder, path):
    card = str(make_card(MODEL, 'me/x', 'mit', metrics=read_metrics(path)))
    assert all(c.isprintable() for line in card.splitlines() for c in line)


def use_notes(folder, path):
    notes = [f'whitening: {path.read_text()}']
    model = types.SimpleNamespace(whitened=True, gem_p=3., pretrained_cfg={'notes': notes})
    warning = check_fitted(model, Protocol(32))
    assert warning is None or warning.isprintable()
    Protocol.for_model(MODEL, **whitened_for(model))


def use_labels(folder, path):
    cfg = {'label_names': json.loads(path.read_bytes()).get('names')}
    match_classes(types.SimpleNamespace(num_classes=3, pretrained_cfg=cfg), ['a', 'b', 'c'])


def use_shards(folder, path):
    shards = path.parent
    if path.name == 'manifest.json':
        write_shard(shards, 0, {**MANIFEST}, Descriptors(('a', 'b'), torch.eye(3)[:2], {'c': 'why'}))
    str(Descriptors.load(shards))
    list(iter_shards(shards))


def shard_header(folder, path):
    """A shard of somebody else's, whose hash is right."""
    write_manifest(path.parent, MANIFEST)
    given = json.loads(path.read_bytes())
    shard = Descriptors((), torch.eye(3)[:2])
    shard.names, shard.skipped = given.get('names'), given.get('skipped')
    write_shard(path.parent, 0, read_manifest(path.parent), shard)
    use_shards(folder, path)


def tune(folder, path):
    source = ImageFiles([folder / f'{name}.jpg' for name in NAMES], labels=[0, 1, 2, 0])
    tune_p(MODEL, source, Protocol(32), grid=(1., 3.), batch_size=2, state_file=path, workers=0, progress=False)


PARSERS = {
    'gnd.json': (TRUTH, lambda folder, path: use_benchmark(
        load_benchmark('roxford5k', folder, ground_truth=path, subset=True))),
    'gnd.pkl': (TRUTH, lambda folder, path: use_benchmark(
        load_benchmark('roxford5k', folder, ground_truth=path, subset=True))),
    'gt.json': ({f'{name}.jpg': i // 2 for i, name in enumerate(NAMES)}, lambda folder, path: use_benchmark(
        load_benchmark('folder', folder, ground_truth=path))),
    'turns.json': ({'100000.jpg': 90, '100100.jpg': -90}, lambda folder, path: read_turns(path)),
    'turns.txt': (b'100000.jpg 90\n# c\n100100.jpg -90\n', lambda folder, path: read_turns(path)),
    'truth.csv': (b'query_id,reference_id\nQ00000,R000000\nQ00001,R000001\n', lambda folder, path: load_benchmark(
        'disc21', folder, ground_truth=path, subset=True)),
    'list.json': ([f'{name}.jpg' for name in NAMES], lambda folder, path: open_images(path).fingerprint()),
    'list.txt': (b'a.jpg\nb.jpg\n', lambda folder, path: open_images(path).fingerprint()),
    'map.txt': (b'a\nb\nc\n', lambda folder, path: match_classes(MODEL, ['a', 'b', 'c'], path)),
    'names.json': ({'names': ['a', 'b', 'c']}, use_labels),
    'figures.json': ([FIGURE], use_metrics),
    'README.md': (None, use_card),
    'notes.json': (SETTINGS, use_notes),
    'downloads.json': ({'http://a/b.tar': {'bytes': 1, 'sha256': 'a', 'done': True}},
                       lambda folder, path: archives.read_manifest(path.parent)),
    'config.json': (CONFIG, lambda folder, path: check_json(read_json(path), _CONFIG, 'config')),
    'row.json': (ROW, lambda folder, path: _record({'entity': json.loads(path.read_bytes()), 'distance': 1.})),
    'recipe.yaml': (OPTIONS, lambda folder, path: TrainOptions.from_mapping(yaml.safe_load(path.read_bytes()))),
    'manifest.json': ({'format': 'timm_multigrain descriptors', 'format_version': 1, **MANIFEST}, use_shards),
    'header.json': ({'names': ['a', 'b'], 'skipped': {'c': 'why'}}, shard_header),
    'state.json': (None, tune),
}


BYTEWISE = ('gnd.json', 'gnd.pkl', 'gt.json', 'turns.json', 'list.json', 'figures.json', 'README.md', 'downloads.json',
            'config.json', 'manifest.json')


def encode(name, tree, number):
    if name.endswith('.pkl'):
        return pickle.dumps(tree, number % 6)
    if name.endswith('.md'):
        return b'---\n' + yaml.safe_dump(tree).encode() + b'---\n# Mine\n'
    return yaml.safe_dump(tree).encode() if name.endswith('.yaml') else json.dumps(tree).encode()


@pytest.mark.parametrize('name', PARSERS)
def test_other_peoples_files(folder, name):
    """Many changed files for each parser: each is read, or refused in one sentence."""
    tree, use = PARSERS[name]
    path, chance, outcomes = folder / name, random.Random(name), set()
    if name == 'README.md':
        card = str(make_card(MODEL, 'me/x', 'mit', metrics=parse_metrics([FIGURE])))
        tree = yaml.safe_load(card.split('---')[1])
    if name == 'state.json':
        path.unlink(missing_ok=True)
        tune(folder, path)
        tree = json.loads(path.read_bytes())
    for number in range(60 if name != 'state.json' else 30):
        if isinstance(tree, bytes):
            content = change_bytes(tree, chance) if number else tree
        else:
            content = encode(name, change_tree(tree, chance) if number else tree, number)
            content = change_bytes(content, chance) if number % 4 == 3 and name in BYTEWISE else content
        path.write_bytes(content)
        try:
            use(folder, path)
            outcomes.add('read')
        except (ValueError, OSError, RuntimeError) as e:
            assert not isinstance(e, (UnicodeError, json.JSONDecodeError, RecursionError)), (content, e)
            assert str(e).strip() and '\n' not in str(e), (content, e)
            outcomes.add('refused')
    assert outcomes == {'read', 'refused'}
