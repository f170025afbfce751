"""timm's training script under the launcher: every feature of it, with MultiGrain's objective.

The script is each train.py in the folders that TIMM_SCRIPTS lists, and timm's other scripts there are run too; without
such folders it is the stand-in beside this file.
"""
import argparse
import csv
import importlib
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import get_img_extensions, set_img_extensions

from timm_multigrain.cli.main import main
from timm_multigrain.data import Lighting, RepeatedAugSampler
from timm_multigrain.data.fast import TensorTransform
from timm_multigrain.images.labels import read_class_names
from timm_multigrain.task import MultiGrainTask
from timm_multigrain.train import launcher
from timm_multigrain.train.options import TrainOptions
from timm_multigrain.train.plugin import TrainPlugin

from .test_train_evaluation import figures_of, load

FOLDERS = [Path(folder) for folder in os.environ.get('TIMM_SCRIPTS', '').split(os.pathsep) if folder]
SCRIPTS = [folder / 'train.py' for folder in FOLDERS] or [Path(__file__).with_name('standin_train.py')]
IMAGES = 24  # of the training set
MODEL = '--model', 'multigrain', '--model-kwargs', 'trunk=test_resnet'
RESNET18 = '--model', 'multigrain_resnet18'
# One epoch of two steps at a learning rate that moves the boundary; what a test gives comes after and wins.
FLAGS = (
    '--num-classes', '3', '--img-size', '32', '-b', '12', '-j', '0', '--device', 'cpu', '--epochs', '1',
    '--warmup-epochs', '0', '--lr', '0.1', '--log-interval', '1', '--checkpoint-hist', '2')
START = torch.tensor([1.2])

Batch = namedtuple('Batch', 'images targets result')


@dataclass
class Run:
    """What a training left behind, and the batches its task saw; without a task of ours these are empty."""
    folder: Path
    rows: list[dict[str, float]] = field(default_factory=list)
    checkpoint: dict = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    task: MultiGrainTask | None = None
    loader: object = None
    batches: list[Batch] = field(default_factory=list)

    @property
    def beta(self) -> torch.Tensor:
        return self.checkpoint['task_state']['instance_loss']['beta']

    @property
    def groups(self) -> list[dict]:
        return self.checkpoint['optimizer']['param_groups']

    def state_of(self, parameter: int) -> dict:
        return self.checkpoint['optimizer']['state'][parameter]


@contextmanager
def restored(script: Path):
    """Puts back what a script changes in its process."""
    root, own = logging.getLogger(), logging.getLogger('train')
    kept = sys.argv, sys.path, root.handlers, own.filters, launcher.running
    level, extensions = root.level, get_img_extensions()
    sys.path, root.handlers, own.filters = [*sys.path], [], []
    try:
        yield
    finally:
        sys.argv, sys.path, root.handlers, own.filters, launcher.running = kept
        set_img_extensions(extensions)
        root.setLevel(level)
        for name in (script.stem, 'timm_multigrain.auto'):
            sys.modules.pop(name, None)


def record(patch: pytest.MonkeyPatch, run: Run) -> None:
    """Has a run keep its batches, as the task saw and judged them."""
    forward, create_loader = MultiGrainTask.forward, TrainPlugin.create_loader

    def seen_forward(task, images, targets):
        result = forward(task, images, targets)
        run.task = task
        # train.py divides the loss in place
        run.batches.append(Batch(images.clone(), targets.clone(), {k: v.detach().clone() for k, v in result.items()}))
        return result

    def seen_create_loader(plugin, *args, is_training=False, **kwargs):
        loader = create_loader(plugin, *args, is_training=is_training, **kwargs)
        run.loader = loader if is_training else run.loader
        return loader

    patch.setattr(MultiGrainTask, 'forward', seen_forward)
    patch.setattr(TrainPlugin, 'create_loader', seen_create_loader)


def plainly(script: str, argv: list[str]) -> None:
    """As `python SCRIPT ARGV`."""
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name='__main__')


def finished(folder: Path) -> tuple[list[dict[str, float]], dict]:
    """Rows of summary.csv and the last checkpoint."""
    with (folder / 'summary.csv').open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    with torch.serialization.safe_globals([argparse.Namespace]):
        return rows, torch.load(folder / 'last.pth.tar', weights_only=True)


def arguments(images: Path, folder: Path, *flags: str, model: tuple[str, ...] = MODEL) -> list[str]:
    """Of a training whose results go to `folder`."""
    places = '--data-dir', images, '--output', folder.parent, '--experiment', folder.name
    return [str(word) for word in (*model, *FLAGS, *places, *flags)]


def training(script: Path, images: Path, folder: Path, *flags: str, start=launcher.launch, **kwargs) -> Run:
    """A training in this process."""
    run = Run(folder)
    if start is launcher.launch and not {'--mg-instance-loss', '--mg-beta-init'} & set(flags):
        flags = '--mg-beta-init', '1.2', *flags  # a boundary that is a parameter is what can go wrong
    with restored(script), pytest.MonkeyPatch.context() as patch:
        lines = logging.Handler()
        lines.emit = lambda record: run.log.append(record.getMessage())
        logging.getLogger().addHandler(lines)
        record(patch, run)
        start(str(script), arguments(images, folder, *flags, **kwargs))
    run.rows, run.checkpoint = finished(folder)
    return run


def python(*command: object, cwd: Path, **env: object) -> subprocess.CompletedProcess:
    """A Python of its own."""
    places = Path(__file__).resolve().parents[1], cwd, os.environ.get('PYTHONPATH', '')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, map(str, places))), **env}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for split, number in (('train', IMAGES // 3), ('validation', 2)):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
                pixels[..., label] //= 2
                path = root / split / str(label) / f'{i}.png'
                Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.parent.name)
def script(request):
    return request.param


@pytest.fixture
def train(script, images, tmp_path):
    """Trains with the launcher, or with another `start`, in folders of their own."""
    def run(*flags, **kwargs):
        return training(script, images, tmp_path / f'run{len(list(tmp_path.glob("run*")))}', *flags, **kwargs)

    return run


def assert_joint(run: Run, weight: float = 0.5, model: str = 'multigrain', **kwargs) -> None:
    """Both losses were trained, and the checkpoint is one of timm's with the boundary beside the model."""
    row = run.rows[-1]
    joint = weight * row['train_classification_loss'] + (1 - weight) * row['train_instance_loss']
    assert row['train_loss'] == pytest.approx(joint, rel=1e-4)
    assert run.beta.shape == (1,) and run.beta.dtype == torch.float32
    assert torch.isfinite(run.beta) and not torch.equal(run.beta, START)
    assert len(run.groups[-1]['params']) == 1 and run.groups[-1]['weight_decay'] == 0
    assert_plain_keys(run, model, **kwargs)


def assert_plain_keys(run: Run, model: str = 'multigrain', **kwargs) -> None:
    kwargs = kwargs or ({'trunk': 'test_resnet'} if model == 'multigrain' else {})
    fresh = timm.create_model(model, num_classes=3, **kwargs)
    assert fresh.state_dict().keys() == run.checkpoint['state_dict'].keys()
    fresh.load_state_dict(run.checkpoint['state_dict'], strict=True)


def weights(run: Run, key: str = 'state_dict') -> dict[str, torch.Tensor]:
    """Without the running statistics of batch norm."""
    return {k: v for k, v in run.checkpoint[key].items() if 'running_' not in k and 'tracked' not in k}


def ids(run: Run) -> list[int]:
    return torch.cat([batch.targets for batch in run.batches])[:, 1].tolist()


def order(epoch: int = 0, repeats: int = 3, **kwargs) -> list[int]:
    sampler = RepeatedAugSampler(IMAGES, repeats, seed=42, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_defaults(train):
    run = train('--epochs', '2')
    assert_joint(run)
    assert [row['epoch'] for row in run.rows] == [0, 1]
    assert ids(run) == order(0) + order(1)
    for row, batches in zip(run.rows, (run.batches[:2], run.batches[2:]), strict=True):
        for name in ('classification_loss', 'instance_loss', 'active_positives', 'effective_negatives'):
            mean = torch.stack([batch.result[name] for batch in batches]).mean()
            assert row[f'train_{name}'] == pytest.approx(mean.item(), rel=1e-5), name
        assert row['train_beta'] == pytest.approx(batches[-1].result['beta'].item())
        assert 1 <= row['train_effective_negatives'] <= 9
    lines = [line for line in run.log if line.startswith('Train: ')]
    assert len(lines) == 4
    for line, batch in zip(lines, run.batches, strict=True):
        assert f'CE: {batch.result["classification_loss"]:#.3g} (' in line
        assert f'Beta: {batch.result["beta"].item():.4f}' in line
    settings = yaml.safe_load((run.folder / 'args.yaml').read_text())
    assert settings['mg_repeats'] == 3 and settings['mg_classif_weight'] == 0.5
    assert {f'mg_{option.name}' for option in fields(TrainOptions)} <= settings.keys()


def test_boundary_follows_the_distances(train):
    run = train('--mg-beta-init', 'auto')
    first, last = (batch.result['beta'].item() for batch in run.batches)
    assert 0 < first < 2 and last == run.beta.item() and 0 < abs(last - first) < 0.1
    assert len(run.groups) == len(train('--mg-repeats', '1', '--mg-classif-weight', '1').groups)  # not a parameter


def test_ema_recovery_and_channels_last(train):
    run = train('-b', '6', '--model-ema', '--model-ema-decay', '0.5', '--recovery-interval', '1', '--channels-last',
                '--checkpoint-hist', '4')
    assert_joint(run)
    betas = [*(batch.result['beta'] for batch in run.batches[1:]), run.beta]  # after each of the steps
    expected = betas[0]
    for beta in betas[1:]:
        expected = expected.lerp(beta, 0.5)
    averaged = run.checkpoint['task_state_ema']['instance_loss']['beta']
    torch.testing.assert_close(averaged, expected)
    assert not torch.equal(averaged, run.beta) and not torch.equal(averaged, START)
    ema, plain = weights(run, 'state_dict_ema'), weights(run)
    assert ema.keys() == plain.keys()
    assert not torch.equal(ema['trunk.conv1.0.weight'], plain['trunk.conv1.0.weight'])
    with torch.serialization.safe_globals([argparse.Namespace]):
        recovered = torch.load(run.folder / 'recovery-0-2.pth.tar', weights_only=True)
    assert torch.equal(recovered['task_state']['instance_loss']['beta'], betas[2])
    weight = run.checkpoint['state_dict']['trunk.layer1.0.conv1.weight']
    for tensor in (weight, *(batch.images for batch in run.batches)):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize(('opt', 'lr', 'setting'), [
    ('momentum', '0.1', ('nesterov', False)), ('muon', '1e-2', ('ns_steps', 5)),
    ('lookahead_sgd', '0.1', ('lookahead_k', 6))])
def test_optimizers(train, opt, lr, setting):
    run = train('--opt', opt, '--lr', lr, '--epochs', '2', '-b', '6')
    assert_joint(run)
    own = run.groups[-1]
    assert own.keys() == run.groups[0].keys() and own[setting[0]] == setting[1]
    state = run.state_of(own['params'][0])
    kept = [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert kept and all(v.shape == (1,) for v in kept)
    assert own.get('lookahead_step', 8) == 8 and opt.startswith('lookahead') == ('lookahead_slow_buff' in state)


def test_classification_only(train):
    run = train('--mg-classif-weight', '1')
    assert ids(run) == order() and 'task_state' not in run.checkpoint and 'train_instance_loss' not in run.rows[0]


def test_trunk_that_is_not_registered_yet(train):
    assert_plain_keys(train(model=('--model', 'multigrain_test_efficientnet')), model='multigrain_test_efficientnet')


@pytest.mark.parametrize(('flags', 'factor', 'own'), [
    (('--sched', 'step', '--decay-epochs', '1', '--decay-rate', '0.1', '--epochs', '3'), 0.01, 0.1),
    (('--sched', 'cosine', '--epochs', '2', '--mg-beta-lr', '0.01'), 0.5, 0.01)])
def test_schedules(train, flags, factor, own):
    run = train(*flags)
    assert_joint(run)
    *groups, last = run.groups
    assert last['initial_lr'] == own and last['lr'] == pytest.approx(own * factor)
    for group in groups:
        assert group['lr'] == pytest.approx(0.1 * factor)
    assert run.rows[-1]['lr'] == pytest.approx(0.1 * factor)  # the network's, in summary.csv and in the log
    shown = [line.split('LR: ')[1].split()[0] for line in run.log if line.startswith('Train: ')]
    assert shown[0] == '1.000e-01' and shown[-1] == f'{0.1 * factor:.3e}'


def test_own_learning_rate_moves_the_boundary(train):
    one = '-b', '24', '--momentum', '0', '--opt', 'momentum'
    moved = [(train(*one, *flags).beta - START).item() for flags in ((), ('--mg-beta-lr', '0.02'))]
    assert moved[1] == pytest.approx(0.2 * moved[0], rel=1e-3) and moved[0] != 0
    assert torch.equal(train('--mg-beta-lr', '0').beta, START)


def test_initial_checkpoint(train, tmp_path):
    torch.manual_seed(5)
    plain = timm.create_model('test_resnet', num_classes=3)
    torch.save({'state_dict': plain.state_dict()}, tmp_path / 'plain.pth')
    # --lr 0 is none at all: train.py computes one from --lr-base then
    run = train(
        '--initial-checkpoint', tmp_path / 'plain.pth', '--lr', '0', '--lr-base', '0', '--mg-beta-lr', '0.1')
    assert_joint(run)
    stored = run.checkpoint['state_dict']
    for name, parameter in plain.named_parameters():
        assert torch.equal(stored[f'head.{name}' if name.startswith('fc.') else f'trunk.{name}'], parameter), name


def test_epoch_length_and_lighting(train):
    run = train('--mg-epoch-len-factor', '2', '--opt', 'adamw', '--lr', '1e-3', '--mg-lighting', '0.1')
    assert_joint(run)
    assert [step.std for step in run.loader.dataset.transform.transforms if isinstance(step, Lighting)] == [0.1]
    assert len(run.loader) == len(run.batches) == 4 and ids(run) == order(epoch_len_factor=2)
    assert run.state_of(run.groups[-1]['params'][0])['step'] == 4


@pytest.mark.parametrize('loss', ['triplet', 'pml:TripletMarginLoss'])
def test_instance_losses(train, loss):
    if loss.startswith('pml:'):
        pytest.importorskip('pytorch_metric_learning')
    default, run = train(), train('--mg-instance-loss', loss)
    row = run.rows[0]
    assert row['train_loss'] == pytest.approx(
        0.5 * row['train_classification_loss'] + 0.5 * row['train_instance_loss'], rel=1e-4)
    assert 'train_beta' not in row and 'beta' not in run.checkpoint['task_state']['instance_loss']
    assert row['train_instance_loss'] != pytest.approx(default.rows[0]['train_instance_loss'], rel=1e-3)
    assert len(run.groups) == len(default.groups) - 1
    assert_plain_keys(run)
    assert not torch.equal(*(r.checkpoint['state_dict']['trunk.conv1.0.weight'] for r in (run, default)))


def test_class_names_are_written(train, images, tmp_path):
    """In the order of the classifier's rows, where they are those of all rows."""
    copied = tmp_path / 'copied'
    shutil.copytree(images, copied)
    for folder in copied.iterdir():
        for old, new in (('0', 'b10'), ('1', 'b2'), ('2', 'Äpfel')):
            (folder / old).rename(folder / new)
    run = train('--data-dir', copied)
    assert read_class_names(run.folder) == ['b2', 'b10', 'Äpfel']
    assert read_class_names(train('--data-dir', copied, '--num-classes', '7').folder) is None
    (copied / 'validation' / 'b10').rename(copied / 'validation' / 'b1')
    log = train('--data-dir', copied).log
    assert any(line.startswith('The classes of the validation set (3) are not those of the training') for line in log)


def test_instances(train, images, tmp_path):
    """class/instance/image for training, and a validation of class/image; classes and instances in the targets."""
    nested = tmp_path / 'nested'
    shutil.copytree(images / 'validation', nested / 'validation')
    rows = []
    for i, path in enumerate(sorted((images / 'train').rglob('*.png'))):
        target = nested / 'train' / path.parent.name / f'thing{i % 3}' / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        rows.append(f'{target.relative_to(nested / "train")},{path.parent.name},{i // 5}')
    (tmp_path / 'list.csv').write_text('\n'.join(rows))
    for way in ('folder', 'class', tmp_path / 'list.csv'):
        run = train('--data-dir', nested, '--mg-instances', way, '--mg-repeats', '2', '-b', '8')
        if way == 'class':  # as timm counts them, by the last folder
            assert read_class_names(run.folder) == ['thing0', 'thing1', 'thing2']
        else:
            assert_joint(run)
            assert read_class_names(run.folder) == ['0', '1', '2'] and run.rows[0]['eval_loss'] > 0
        seen = torch.cat([batch.targets for batch in run.batches]).view(-1, 2, 2)
        assert torch.equal(seen[:, 0], seen[:, 1])
        held = run.loader.dataset
        assert set(map(tuple, seen[:, 0].tolist())) == {
            (label, int(i)) for (_, label), i in zip(held.reader.samples, held.instances, strict=True)}
        for weight in ('0', '1') if way == 'folder' else ():
            other = train('--data-dir', nested, '--mg-instances', way, '--mg-repeats', '2', '-b', '8',
                          '--mg-classif-weight', weight)
            assert ids(other) == ids(run) and ('train_instance_loss' in other.rows[0]) == (weight == '0')
    assert len(held.instances) == IMAGES


@pytest.mark.parametrize('flags', [
    (), ('--no-prefetcher', '-j', '1', '-vb', '4', '--mg-classif-weight', '1'), ('--torchcompile', 'eager'),
    ('--amp', '--amp-dtype', 'bfloat16')])
def test_figures_of_retrieval(train, images, flags):
    run = train('--mg-eval', *flags)
    expected = figures_of(load(run.checkpoint), images / 'validation', 32)
    found = {name: run.rows[0][f'eval_{name}'] for name in expected}
    if '--amp' in flags:
        assert all(0 < value <= 100 for value in found.values())
    else:
        assert found == pytest.approx(expected)
    if not flags:  # beside them, nothing changes
        assert {k: v for k, v in run.rows[0].items() if k[5:] not in expected} == train().rows[0]


@pytest.mark.parametrize('flags', [(), ('--mg-fast-loader', '-j', '1'), ('--train-img-sizes', '32', '48')])
def test_unreadable_images(script, train, images, tmp_path, capsys, flags):
    if '--train-img-sizes' in flags and 'train_img_sizes' not in script.read_text().replace('-', '_'):
        pytest.skip('this train.py has no scheduled sizes')
    copied = tmp_path / 'copied'
    shutil.copytree(images, copied)
    broken = order()[0]
    file = copied / 'train' / f'{broken // 8}' / f'{broken % 8}.png'
    file.write_bytes(b'no image')
    run = train('--data-dir', copied, *flags)
    assert ids(run) == [(broken + 1) % IMAGES if i == broken else i for i in order()[:len(ids(run))]]
    if '-j' not in flags:
        assert any(line.startswith(f'Skipped image {broken} ({file}), the next one') for line in run.log)
    assert f'1 of 24 training images cannot be read: {file}' in run.log
    with pytest.raises(SystemExit) as stopped:
        train('--data-dir', copied, '--mg-strict', *flags)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith('timm_multigrain: error: ')]
    assert stopped.value.code == 2 and len(error) == 1 and f'{file}) cannot be read' in error[0]


def test_files_are_found_and_decoded_as_by_commands(train, images, tmp_path, monkeypatch):
    made, create_loader = [], TrainPlugin.create_loader
    monkeypatch.setattr(
        TrainPlugin, 'create_loader', lambda *args, **kwargs: made.append(create_loader(*args, **kwargs)) or made[-1])
    copied = tmp_path / 'copied'
    shutil.copytree(images, copied)
    for split in ('train', 'validation'):
        (copied / split / 'x').mkdir()
        for i in range(2):
            Image.open(images / split / '1' / f'{i}.png').save(copied / split / 'x' / f'{i}.webp')
    run = train('--data-dir', copied, '--num-classes', '4')
    assert read_class_names(run.folder) == ['0', '1', '2', 'x'] and len(run.loader.dataset) == IMAGES + 2
    assert len(train('--data-dir', copied, '--mg-decode', 'timm').loader.dataset) == IMAGES
    assert [loader.dataset.decode for loader in made] == ['multigrain'] * 2 + ['timm'] * 2


_AUTO = '--device-modules', 'timm_multigrain.auto'


@pytest.mark.parametrize(('content', 'message'), [
    (None, 'cannot be read: '), (b'lr: [', 'cannot be read: '), (b'lr: \xff', 'cannot be read: '),
    (b'a: ' + b'[' * 5000, 'cannot be read: '), (b'- lr\n- 0.1', 'does not map names'),
    (b'1: 2', 'does not map names')])
def test_configs_that_are_none(train, capsys, tmp_path, content, message):
    path = tmp_path / 'c.yaml'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        train('-c', path)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f'--config {path}' in error and message in error
    assert error.startswith('timm_multigrain: error: ') and error.count('\n') == 1


@pytest.mark.parametrize('auto', [False, True])
def test_yaml(train, tmp_path, auto):
    config, options = tmp_path / 'settings.yaml', dict(
        mg_repeats=2, mg_classif_weight=0.3, mg_fast_loader=True, mg_beta_init=1.2,
        mg_instance_loss_kwargs=dict(margin=0.1))
    by_timm = dict(device_modules=['timm_multigrain.auto'], model_kwargs=dict(trunk='test_resnet', **options))
    config.write_text(yaml.safe_dump(by_timm if auto else options))
    run = train('-c', config, **(dict(model=MODEL[:2], start=plainly) if auto else {}))
    assert_joint(run, weight=0.3)
    assert isinstance(run.loader.dataset.transform, TensorTransform)
    assert ids(run) == order(repeats=2)
    assert run.task.get_trainable_module().instance_loss.margin == 0.1
    if not auto:
        assert_joint(train('-c', config, '--mg-classif-weight', '0.8'), weight=0.8)


def test_auto_beside_the_launcher(train):
    run = train(*_AUTO, '--mg-repeats', '2')
    assert_joint(run)
    assert ids(run) == order(repeats=2)
    assert all(line.count('CE: ') == 1 for line in run.log if line.startswith('Train: '))


def test_auto_refuses(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(*_AUTO, '--model-kwargs', 'trunk=test_resnet', 'mg_repeat=2', start=plainly)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        'timm_multigrain: error: mg_repeat is not an option: did you mean mg_repeats?\n')
    with pytest.raises(SystemExit) as stopped:  # the program that runs is pytest
        importlib.import_module('timm_multigrain.auto')
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith('timm_multigrain: error: timm_multigrain.auto is for train.py')


@pytest.mark.parametrize(('flags', 'message'), [
    ('--mixup 0.2', '--mixup (0.2) does not go with MultiGrain training: a mixture of two images is a copy of neither'),
    ('--mg-instances folder', '24 of 24 images, such as 0/0.png, are not in folders class/instance'),
    ('--model-kwargs mg_repeats=2', 'give --mg-repeats here'), ('--mg-epoch-len-factor 0.1', 'no full batch of 12'),
    ('--resume missing.pth', 'file not found'), (f'--resume {"x" * 5000}', '--resume xxx'),
    ('--num-classes 2', 'the training set has 3 classes and the model 2: give --num-classes 3'),
    ('--model multigrain_resnet19', 'cannot be created: Unknown model (multigrain_resnet19)'),
    ('--model resnet19', '--model resnet19 cannot be created: Unknown model (resnet19)'),
    ('--model-kwargs trunk=test_resnet colour=red', "unexpected keyword argument 'colour'"),
    ('--model-kwargs trunk', '--model-kwargs or the like is not NAME=VALUE'),
    ('--mg-instance-loss-kwargs alpha', 'or the like is not NAME=VALUE'),
    ('--initial-checkpoint missing.pth', 'multigrain cannot be created: --initial-checkpoint missing.pth not found'),
    pytest.param('--device cuda', '--device cuda: torch finds no GPU', marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason='there is a GPU')),
    ('--data-dir nowhere', 'the images cannot be opened: nowhere not found'),
    ('--opt nope', '--opt nope cannot be created: Optimizer nope not found'),
    ('--model multigrain_test_vit --model-kwargs img_size=33', 'divisible by patch size'),
    ('--no-aug', 'All copies of an image in the first batch are the same, pixel for pixel')])
def test_refuses(train, capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stopped:
        train(*flags.split())
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith('timm_multigrain: error: ')]
    assert stopped.value.code == 2 and len(error) == 1 and message in error[0]
    assert not list(tmp_path.glob('*/*.pth.tar'))


def test_refuses_to_resume_what_does_not_fit(train, capsys):
    """Found by torch, whose errors have several lines."""
    joint, plain = ['--mg-beta-init', 'auto'], ['--mg-classif-weight', '1', '--mg-repeats', '1']
    for before, flags, message in ((joint, ['--mg-beta-init', '1.2'], 'different number of parameter groups'),
                                   (joint, [*joint, '--num-classes', '4'], 'size mismatch for head.fc.weight'),
                                   (plain, [*plain, '--num-classes', '4'], 'size mismatch for head.fc.weight')):
        checkpoint = train(*before).folder / 'last.pth.tar'
        with pytest.raises(SystemExit) as stopped:
            train('--epochs', '2', '--resume', checkpoint, *flags)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith('timm_multigrain: error: ')]
        assert stopped.value.code == 2 and len(error) == 1, error
        assert f'--resume {checkpoint} does not suit' in error[0] and message in error[0]


def test_nothing_changes_without_the_objective(train):
    flags = '--model-ema', '--grad-accum-steps', '2'
    run = train('--mg-repeats', '1', '--mg-classif-weight', '1', *flags)
    plain = train(*flags, start=plainly)
    assert not run.batches and run.rows == plain.rows and 'task_state' not in run.checkpoint
    for key in ('state_dict', 'optimizer', 'state_dict_ema'):
        torch.testing.assert_close(run.checkpoint[key], plain.checkpoint[key], rtol=0, atol=0)
    assert not torch.equal(*(r.checkpoint['state_dict']['head.fc.weight'] for r in (run, train(*flags))))


_OTHER_SCRIPT = '''
import sys

import helper
import timm

if __name__ == '__main__':
    model = timm.create_model('multigrain_resnet18', num_classes=3)
    pool = timm.create_model('test_resnet', global_pool='gem').global_pool
    print(helper.NAME, sys.argv, __name__, type(model).__name__, pool.pool_type)
'''


@pytest.mark.slow
@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
def test_validate(folder, images, tmp_path):
    """timm's validate.py on what its train.py has saved."""
    run = training(folder / 'train.py', images, tmp_path / 'run', '-vb', '6', model=RESNET18)
    assert_joint(run, model='multigrain_resnet18')
    done = python(
        '-m', 'timm_multigrain', folder / 'validate.py', *RESNET18, '--num-classes', '3', '--img-size', '32', '-b', '6',
        '--checkpoint', run.folder / 'last.pth.tar', '--data-dir', images, '-j', '0', '--device', 'cpu', '--crop-pct',
        '0.875', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.split('--result\n')[1])
    assert result['top1'] == pytest.approx(run.rows[0]['eval_top1'], abs=1e-3)
    loss = re.search(r'Loss: +([0-9.]+) ', done.stderr).group(1)
    assert float(loss) == pytest.approx(run.rows[0]['eval_loss'], abs=1e-3)


def test_a_script_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['nowhere.py'])
    assert 'nowhere.py: file not found' in capsys.readouterr().err


@pytest.mark.slow
def test_other_scripts(tmp_path):
    folder = tmp_path / 'checkout'
    (folder / 'timm').mkdir(parents=True)
    (folder / 'timm' / '__init__.py').write_text('raise ImportError("the timm of the checkout")')
    (folder / 'helper.py').write_text('NAME = "beside the script"')
    (folder / 'other.py').write_text(_OTHER_SCRIPT)
    done = python('-m', 'timm_multigrain', 'other.py', '--flag', 'x', cwd=folder, PYTHONPATH='')
    assert done.returncode == 0, done.stderr
    assert done.stdout == "beside the script ['other.py', '--flag', 'x'] __main__ MultiGrain gem\n"
