"""p*: the recipe recomputed step by step, the scan against models of each p, the command, cut off and gone on with."""
import argparse
import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import write_text
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.labels import open_classes
from timm_multigrain.layers import GeM
from timm_multigrain.measure import tune_p as module
from timm_multigrain.measure.benchmarks import load_benchmark
from timm_multigrain.measure.classify import validate
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.measure.tune_p import PResult, scan_p_groups, tune_p
from timm_multigrain.models.open import open_model
from timm_multigrain.models.save import fitted

from .tiny import tiny_model

PROTOCOL = Protocol(size=48, kind='longer-side')
SETTINGS = ['--size', '48', '--protocol', 'longer-side', '--device', 'cpu', '--workers', '0']


@pytest.fixture(scope='module')
def model():
    model = tiny_model()
    with torch.no_grad():
        model.head.fc.weight.mul_(30)  # so that p matters
    return model


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """3 classes of 6 pictures of several shapes."""
    root = tmp_path_factory.mktemp('classes')
    rng = np.random.default_rng(0)
    for label in range(3):
        (root / 'train' / f'{label}').mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, ((40, 30) if i % 2 else (24, 48)) + (3,)) // (label + 1)
            Image.fromarray(pixels.astype(np.uint8)).save(root / 'train' / f'{label}' / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def source(model, pictures):
    return open_classes(pictures, model, 'train')


def recipe(model, source, order, batch, lr) -> list[float]:
    """p after each step, in plain autograd with torch's own SGD."""
    p = torch.tensor(float(model.gem_p), requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=lr, momentum=0.9)
    steps, trace = -(-len(order) // batch), [p.item()]
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = lr * (1 - step / steps) ** 0.9
        losses = []
        for i in order[step * batch:(step + 1) * batch]:
            x = PROTOCOL.normalize(PROTOCOL.pixels(source.load(i)))[None]
            with torch.no_grad():
                maps = model.forward_features(x)
            e = maps.clamp(min=1e-6).pow(p).mean((-2, -1)).pow(1 / p)
            losses.append(torch.nn.functional.cross_entropy(model.head.fc(e), torch.tensor([source.labels[i]])))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        trace.append(p.item())
    return trace


def test_the_recipe(model, source):
    result = tune_p(model, source, PROTOCOL, grid=(), batch_size=4, lr=0.05, seed=3, workers=0)
    order = np.random.default_rng(3).permutation(18)
    expected = recipe(model, source, order.tolist(), 4, 0.05)
    assert len(result.trace) == 6 and abs(expected[-1] - 3) > 1e-2
    np.testing.assert_allclose(result.trace, expected, rtol=1e-5)
    assert result.tuned == result.trace[-1] and model.gem_p == 3 and result.best is None


def test_the_scan(model, source):
    grid = (4, 1, 2.5, float('inf'))
    result = tune_p(model, source, PROTOCOL, grid=grid, finetune=False, workers=0)
    assert result.grid == (1, 2.5, 3, 4, float('inf')) and result.tuned is None
    own = validate(model, source, PROTOCOL, workers=0).ranks < 1
    for p, value, loss in zip(result.grid, result.values, result.losses, strict=True):
        other = tiny_model()
        other.load_state_dict(model.state_dict())
        other.set_gem_p(p)
        expected = validate(other, source, PROTOCOL, workers=0)
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(
                other(PROTOCOL.normalize(PROTOCOL.pixels(source.load(i)))[None]), torch.tensor([label]))
                for i, label in enumerate(source.labels)]
        assert value == pytest.approx(expected.top1) and loss == pytest.approx(np.mean(losses), rel=1e-5)
        noise = ((expected.ranks < 1) != own).sum() ** 0.5 / 18
        assert result.noise[result.grid.index(p)] == pytest.approx(noise)
    best = max(zip(result.values, [-x for x in result.losses], result.grid, strict=True))
    assert result.best == best[2]


def test_scan_of_groups(model, pictures):
    groups = load_benchmark('folder', pictures / 'train')
    result = scan_p_groups(model, groups, PROTOCOL, (1, 8), workers=0)
    assert result.grid == (1, 3, 8)
    x = extract(model, groups.database, PROTOCOL, workers=0).vectors
    own = mean_average_precision(x @ x.T, groups.relevant, groups.ignore).ap
    for p, value, noise in zip(result.grid, result.values, result.noise, strict=True):
        other = tiny_model()
        other.load_state_dict(model.state_dict())
        other.set_gem_p(p)
        x = extract(other, groups.database, PROTOCOL, workers=0).vectors
        figure, = groups.measure(x @ x.T)
        assert value == pytest.approx(figure.value / 100, abs=1e-6)
        differences = mean_average_precision(x @ x.T, groups.relevant, groups.ignore).ap - own
        assert noise == pytest.approx(sum(d * d for d in differences) ** 0.5 / 18, abs=1e-6)
    assert result.criterion == 'mAP' and 'mAP' in str(result)


@pytest.mark.parametrize('won, lost, changed', [
    (0, 0, False), (4, 0, False), (5, 0, True), (8, 1, True), (60, 40, False), (61, 39, True), (0, 9, False)])
def test_p_is_kept_where_nothing_is_surely_better(won, lost, changed):
    """Of 200 images some become hits at p = 2 and some none any more; (won - lost) ** 2 > 4 (won + lost) by hand."""
    hits = torch.tensor([[False] * lost + [True] * won + [False] * (200 - lost - won),
                         [True] * lost + [False] * (200 - lost)])  # at p = 2 and 3
    state = {'count': 0, 'hits': [0., 0.], 'changed': [0., 0.], 'loss': [0., 0.]}
    for pair in hits.T:
        classify = lambda _, pair=pair: torch.stack([pair.float() * 2, torch.ones(2)], 1)  # noqa: E731
        model = argparse.Namespace(gem_p=3., head=argparse.Namespace(pool=GeM(3.), classify=classify))
        module._scan(state, model, torch.ones(1, 1, 1, 1), 0, (2., 3.))
    values, noise = [hit / 200 for hit in state['hits']], [changed ** 0.5 / 200 for changed in state['changed']]
    result = PResult('top-1', (2., 3.), values, noise, 3., 200, PROTOCOL, None, 3.2, (3., 3.2))
    assert values == [won / 200, lost / 200]
    assert (result.how, result.p) == (('best', 2) if changed else ('kept', 3))
    assert str(result).endswith('best of the grid' if changed else 'no other is surely better')
    for chosen, p in (({'choose': 'best'}, 2 if won >= lost else 3), ({'choose': 'tuned'}, 3.2),
                      ({'grid': (), 'values': (), 'noise': ()}, 3.2)):
        other = replace(result, **chosen)
        assert other.p == other.to_dict()['p'] == p and f'p* = {p:.4g}, ' in str(other)


def test_going_on_gives_the_same(model, source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'SAVED_EVERY', 1)
    whole = tune_p(model, source, PROTOCOL, grid=(1, 3), workers=0)
    assert whole.trace == tune_p(model, source, PROTOCOL, grid=(), workers=0).trace  # scanning changes nothing
    state, calls, scan = tmp_path / 'state.json', [], module._scan

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        scan(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, '_scan', interrupted)
        tune_p(model, source, PROTOCOL, grid=(1, 3), workers=0, state_file=state)
    assert json.loads(state.read_text())['step'] == 2
    again = tune_p(model, source, PROTOCOL, grid=(1, 3), workers=0, state_file=state)
    assert again.to_dict() == whole.to_dict()
    with pytest.raises(ValueError, match='not the progress of a run with this model'):
        tune_p(model, source, PROTOCOL, grid=(1, 4), workers=0, state_file=state)
    state.write_text('{')
    with pytest.raises(ValueError, match='remove it'):
        tune_p(model, source, PROTOCOL, grid=(1, 3), workers=0, state_file=state)


def test_refusals(model, source):
    whitened = tiny_model(whitening=5)
    for other, kwargs, message in (
            (tiny_model(global_pool='spoc'), {}, "'spoc', which has no exponent"),
            (tiny_model(per_channel_p=True), {}, 'exponent for each channel'),
            (whitened, {}, 'whitened at p = 3, and another p needs another whitening'),
            (tiny_model(num_classes=0), {}, 'model with a classifier'),
            (tiny_model(gem_p=float('inf')), {}, 'start from a finite one'),
            (model, {'grid': (0, 1)}, 'exponents are above 0'),
            (model, {'grid': (float('nan'),)}, 'exponents are above 0'),
            (model, {'batch_size': 0}, 'batch_size=0'),
            (model, {'lr': 1e6, 'grid': ()}, 'run away')):
        with pytest.raises(ValueError, match=message):
            tune_p(other, source, PROTOCOL, workers=0, **kwargs)
    with pytest.raises(ValueError, match='one scale, without flip'):
        tune_p(model, source, Protocol(size=48, flip=True), workers=0)


def test_command(model, pictures, tmp_path, capsys):
    folder = save_pretrained(model, tmp_path / 'm', label_names=['0', '1', '2'])
    assert main(['tune-p', str(folder), str(pictures), '-o', str(tmp_path / 'tuned'), '--grid', '1', '3', '--lr',
                 '0.05', '--per-class', '4', '--choose', 'tuned', *SETTINGS]) == 0
    shown = capsys.readouterr().out
    again = timm.create_model(f'local-dir:{tmp_path}/tuned', pretrained=True)
    assert '12 images of 3 classes' in shown and f'p* = {again.gem_p:.4g}, fine-tuned' in shown and again.gem_p != 3
    assert 'steps, few' in shown
    found = json.loads((tmp_path / 'tuned-p.json').read_text())
    assert found['tuned'] == found['p'] == again.gem_p and found['grid'] == [1, 3] and found['num_images'] == 12
    with Image.open(tmp_path / 'tuned-p.png') as image:
        assert image.width > 300
    assert fitted(again, 'p')['how'] == 'tuned' and again.pretrained_cfg['label_names'] == ['0', '1', '2']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['m', 'tuned', 'tuned-p.json', 'tuned-p.png']


def test_command_scanning(model, pictures, tmp_path, capsys):
    folder = save_pretrained(model, tmp_path / 'm')
    assert main(['tune-p', str(folder), str(pictures / 'train'), '-o', str(tmp_path / 'out'), '--grid', '1', '6',
                 '--criterion', 'map', *SETTINGS]) == 0
    found = json.loads((tmp_path / 'out-p.json').read_text())
    saved = open_model(tmp_path / 'out')
    assert saved.gem_p == found['p'] and found['criterion'] == 'mAP' and found['grid'] == [1, 3, 6]
    assert f"p* = {found['p']:g}, " in capsys.readouterr().out and fitted(saved, 'p')['how'] == found['how']
    for extra, message in ((['--choose', 'best', '--grid'], 'needs a grid'), (['--fast'], '--fast is for'),
                           (['--criterion', 'map', '--choose', 'tuned'], 'scanned only')):
        assert main(['tune-p', str(folder), str(pictures), *extra, *SETTINGS]) == 2
        assert message in capsys.readouterr().err


def test_a_command_that_was_interrupted_goes_on(model, pictures, tmp_path, monkeypatch):
    """A damaged image among them, which is left out."""
    def write(path, text):
        write_text(path, text)
        raise KeyboardInterrupt

    folder = save_pretrained(model, tmp_path / 'm', label_names=['0', '1', '2'])
    data = shutil.copytree(pictures, tmp_path / 'data')
    (data / 'train' / '1' / 'x.png').write_bytes(b'no')
    monkeypatch.setattr(module, 'SAVED_EVERY', 1)
    arguments = ['tune-p', str(folder), str(data), '--grid', '1', '3', *SETTINGS, '-o']
    with monkeypatch.context() as patch:
        patch.setattr(module, 'write_text', write)
        assert main([*arguments, str(tmp_path / 'a')]) == 128 + signal.SIGINT
    assert json.loads((tmp_path / 'a-progress.json').read_text())['step'] == 1
    assert main([*arguments, str(tmp_path / 'a')]) == main([*arguments, str(tmp_path / 'b')]) == 0
    assert (tmp_path / 'a-p.json').read_bytes() == (tmp_path / 'b-p.json').read_bytes()
    found = json.loads((tmp_path / 'a-p.json').read_text())
    assert found['num_images'] == 18 and list(found['skipped']) == ['1/x.png']
    assert not (tmp_path / 'a-progress.json').exists()
