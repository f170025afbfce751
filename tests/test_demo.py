"""The demo, end to end on a small scale, and what it says about folders it cannot use."""
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.demo.evaluation import CopySet, _copy_map, evaluate
from timm_multigrain.demo.folder import open_folder
from timm_multigrain.demo.training import TrainSettings, _CountingSampler, train_model
from timm_multigrain.task import MultiGrainTask


def _folder(root, classes=('cat', 'dog'), splits=('train', 'val'), count=4, size=40):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((size, size + 10)).save(root / split / name / f'{i}.jpg')
    return root


def _demo(*args):
    return main(['demo', '--workers', '0', *map(str, args)])


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    data = _folder(tmp_path / 'my pictures', count=12)
    out = tmp_path / 'out'
    args = ('--data-dir', data, '-o', out, '--epochs', 2, '--img-size', 32, '--batch-size', 12)
    assert _demo(*args) == 0
    shown = capsys.readouterr().out
    assert 'classification only' in shown and 'joint (MultiGrain)' in shown and 'copy mAP' in shown
    results = json.loads((out / 'results.json').read_text())
    assert results['train_pictures'] == results['val_pictures'] == 24
    page = (out / 'index.html').read_text()
    assert page.count('<svg') > 3 and 'src="data:image/jpeg' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    model = timm.create_model(f'local-dir:{out / "model"}', pretrained=True).eval()
    assert model.num_classes == 2 and model.pretrained_cfg['label_names'] == ['cat', 'dog']
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)
    first = {p.name: p.read_bytes() for p in (out / 'model').iterdir()}
    assert _demo(*args) == 0  # the same seed gives the same weights
    assert json.loads((out / 'results.json').read_text()) == results
    assert {p.name: p.read_bytes() for p in (out / 'model').iterdir()} == first


def test_objectives_see_the_same_and_the_schedule_runs_without_a_terminal(tmp_path):
    folder = open_folder(_folder(tmp_path / 'data', count=6))
    seen = {}
    for weight in (1.0, 0.5):
        settings = TrainSettings(img_size=32, epochs=4, batch_size=6, classif_weight=weight, workers=0)
        batches = seen[weight] = []
        original = MultiGrainTask.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MultiGrainTask, 'forward', lambda task, x, target, batches=batches, original=original: (
                batches.append((x.clone(), target)), original(task, x, target))[1])
            history = train_model('run', folder, settings).history
        assert max(history['learning rate']) == pytest.approx(settings.lr, rel=0.2)
        assert history['learning rate'][-1] < 0.2 * settings.lr
        seen[weight, 'start'] = history['cross-entropy'][0]
    assert seen[1.0, 'start'] == seen[0.5, 'start']
    assert len(seen[1.0]) == 8
    for (x, target), (other_x, other_target) in zip(seen[1.0], seen[0.5], strict=True):
        assert torch.equal(x, other_x) and torch.equal(target, other_target)


@pytest.mark.slow
def test_draws_its_own_pictures(tmp_path):
    pytest.importorskip('matplotlib')
    assert _demo('-o', tmp_path / 'out', '--epochs', 1, '--img-size', 32, '--batch-size', 192) == 0
    pictures = list((tmp_path / 'out' / 'pictures').glob('*/*/*.jpg'))
    assert len(pictures) > 500 and len({p.parent.name for p in pictures}) >= 5


def _broken(root):
    _folder(root)
    path = root / 'val' / 'dog' / '2.jpg'
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize('make, message', [
    (lambda root: None, 'There is no folder'),
    (lambda root: root.mkdir(), 'has no folder train/'),
    (lambda root: _folder(root, splits=('train',)), 'has no folder val/'),
    (lambda root: _folder(root, count=0), 'holds 0 class folders'),
    (lambda root: _folder(root, classes=('cat',)), r'holds 1 class folders .*\(cat\), at least 2'),
    (lambda root: (_folder(root), _folder(root, classes=('cow',), splits=('val',))), 'differ between .* cow'),
    (_broken, r'dog.2\.jpg: .*replace this picture or take it out'),
])
def test_folders_it_cannot_use(tmp_path, capsys, make, message):
    make(tmp_path / 'data')
    assert _demo('--data-dir', tmp_path / 'data', '-o', tmp_path / 'out') == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and 'Traceback' not in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize('args, message', [
    (('--num-repeats', 1), 'num_repeats=1 with classif_weight=0.5'),
    (('--classif-weight', 2), r'\(lambda\) = 2.0 is outside'),
    (('--batch-size', 2), 'batch_size is 2, less than num_repeats=3'),
    (('--batch-size', 3), 'copies of one instance'),
    (('--batch-size', 480), 'no full batch of 480'),
    (('--img-size', 0), 'img_size is 0: give at least 32'),
    (('--epochs', 0), 'epochs is 0'),
    (('--lr', 'nan'), 'lr is nan'),
    (('--model', 'resnet18'), "'resnet18' is not a MultiGrain model"),
    (('--model', 'multigrain_resnet81'), 'multigrain_resnet81'),
])
def test_settings_it_cannot_use(tmp_path, capsys, args, message):
    data = _folder(tmp_path / 'data')
    base = ('--data-dir', data, '-o', tmp_path / 'out', '--epochs', 1, '--img-size', 32, '--batch-size', 6)
    try:
        code = _demo(*base, *args)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


def test_class_numbers_and_copy_map(tmp_path):
    data = _folder(tmp_path / 'data', classes=('10', '9'))
    (data / 'train' / '9' / '3.jpg').rename(data / 'train' / '9' / '3.jfif')
    folder = open_folder(data)
    assert folder.class_names == ('9', '10')  # numbers by value, as timm counts them
    assert [folder.train[i][1] for i in range(8)] == [0] * 4 + [1] * 4
    assert folder.path(5).parent.name == '10'
    # three pictures with eight copies each; all found, then one copy of the first lost behind every stranger
    kinds = 9
    similarity = torch.zeros(3, 3 * kinds)
    for q in range(3):
        similarity[q, q * kinds:(q + 1) * kinds] = 1
    assert _copy_map(similarity, range(1, kinds)) == 100
    similarity[0, 0 * kinds + 8] = -1  # behind all 18 strangers
    ap = (0 / 18 + 1 / 19) / 2  # kind 8 alone: its rank is 18 for the first query
    assert _copy_map(similarity, [8]) == pytest.approx(100 * (ap + 2) / 3)


def test_evaluate_against_plain_loops():
    torch.manual_seed(0)
    model = timm.create_model('multigrain', trunk='resnet10t', num_classes=3).eval()
    copies = CopySet(torch.randint(0, 256, (4, 9, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    scores = evaluate(model, copies, batch_size=7)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    with torch.no_grad():
        def embed(i, j):
            return model.embed(((copies.images[i, j] / 255 - mean) / std)[None])[0].double()
        vectors = [[embed(i, j) for j in range(9)] for i in range(4)]
        aps = []
        for q in range(4):
            ranked = sorted(
                ((i, j) for i in range(4) for j in range(9) if (i, j) != (q, 0)),
                key=lambda ij: -float(vectors[q][0] @ vectors[ij[0]][ij[1]]))
            hits, ap = 0, 0.
            for rank, (i, _) in enumerate(ranked):
                if i == q:
                    ap += ((hits / rank if rank else 1.) + (hits + 1) / (rank + 1)) / 2 / 8
                    hits += 1
            aps.append(ap)
    assert scores.copy_map == pytest.approx(100 * np.mean(aps), rel=1e-6)
    assert 0 <= scores.top1 <= 100 and scores.predictions.shape == (36,)


@pytest.mark.parametrize('name', ['batch', 'row'])
def test_share_of_uniform_rows(name):
    """Rows of nothing but images beyond the cutoff are uniform; one that is not finite has no negatives at all."""
    embedding = torch.nn.functional.normalize(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    embedding[:4] = torch.eye(64)[0] * torch.tensor([1, 1, -1, -1])[:, None]
    embedding[8] = torch.nan
    sampler, alone = (_CountingSampler(name, nonzero_loss_cutoff=1.0, max_positives=1) for _ in range(2))
    assert sampler.uniform_share is None
    target = torch.arange(9) // 2
    sampler(embedding, target)
    prob, uniform = alone.probabilities(embedding, target)
    assert uniform.sum() > 0 and (prob.sum(1) > 0).sum() == 8
    assert sampler.uniform_share == uniform.sum() / 8
