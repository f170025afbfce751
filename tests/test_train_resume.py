"""Trainings in processes of their own: one that is resumed, which is exact or refused at once, and two of torchrun."""
import argparse
from pathlib import Path

import pytest
import timm
import torch

import timm_multigrain  # noqa: F401 - registers the models
from timm_multigrain.task import MultiGrainTask
from timm_multigrain.train.options import TrainOptions, resume_problem

from .test_train_evaluation import figures_of, load
from .test_train_launcher import SCRIPTS, arguments, finished, python


def _checkpoint(path, joint=True, **changes):
    model = timm.create_model('multigrain', trunk='resnet10t', num_classes=3)
    task = MultiGrainTask(model, classif_weight=0.5 if joint else 1.0, instance_loss=changes.pop('loss', 'margin'))
    args = argparse.Namespace(model='multigrain', mg_instance_loss='margin')
    torch.save({'epoch': 0, 'arch': 'multigrain', 'args': args, **task.get_checkpoint_state(), **changes}, path)
    return str(path)


def _problem(path, model='multigrain', **options):
    return resume_problem(argparse.Namespace(resume=path, model=model), TrainOptions(**options))


def test_what_can_be_resumed(tmp_path):
    joint, classes = _checkpoint(tmp_path / 'j.pth'), _checkpoint(tmp_path / 'c.pth', joint=False)
    assert _problem(joint) is None and _problem(joint, instance_loss_kwargs={'margin': 0.3}) is None
    assert _problem(classes, classif_weight=1) is None
    assert resume_problem(argparse.Namespace(resume=''), TrainOptions()) is None
    (tmp_path / 'text.pth').write_text('no checkpoint')
    torch.save({'conv1.weight': torch.zeros(2)}, tmp_path / 'weights.pth')
    torch.save({'state_dict': print}, tmp_path / 'code.pth')
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(Path(joint).read_bytes()[:5000])
    cases = [
        (str(tmp_path / 'text.pth'), {}, 'cannot be read as weights'),
        (str(truncated), {}, 'cannot be read as weights'),
        (str(tmp_path / 'code.pth'), {}, 'cannot be read as weights'),
        (str(tmp_path / 'weights.pth'), {}, 'weights but not the state of a training'),
        (classes, {}, 'without an instance loss'),
        (joint, {'classif_weight': 1}, 'with an instance loss'),
        (joint, {'model': 'resnet50'}, 'checkpoint of multigrain, and --model is resnet50'),
        (joint, {'instance_loss': 'triplet'}, 'trained with the instance loss margin, and --mg-instance-loss is trip'),
    ]
    for path, changes, message in cases:
        text = _problem(path, **changes)
        assert message in text and '\n' not in text, (path, text)


_SPAWN = '''
import multiprocessing

multiprocessing.set_start_method('spawn')
'''


def _run(script, noise_folder, folder, *flags, launcher=()):
    """A training of a tiny model: rows of its summary.csv, its last checkpoint and its log."""
    done = python('-m', *launcher, 'timm_multigrain', script, *arguments(noise_folder, folder, *flags),
                  cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return *finished(folder), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_resumed_equals_uninterrupted(script, noise_folder, tmp_path):
    """The workers of the resumed run are spawned, which import the launcher anew; those of the other are forked."""
    (tmp_path / 'spawned.py').write_text(_SPAWN)
    flags = ['--epochs', 3, '--opt', 'adamw', '--lr', 0.003, '--warmup-epochs', 1, '--no-aug', '--model-ema',
             '--model-ema-decay', 0.9, '-j', 1, '--device-modules', 'tests.same_copies']
    _, whole, _ = _run(script, noise_folder, tmp_path / 'whole', *flags)
    _, resumed, _ = _run(script, noise_folder, tmp_path / 'resumed', *flags, 'spawned', '--resume',
                         tmp_path / 'whole' / 'checkpoint-1.pth.tar')
    assert whole['epoch'] == resumed['epoch'] == 2 and not (tmp_path / 'resumed' / 'checkpoint-1.pth.tar').exists()
    assert whole['task_state']['instance_loss']['beta'] > 0
    for key in ('state_dict', 'state_dict_ema'):
        assert whole[key].keys() == resumed[key].keys()
        for name, value in whole[key].items():
            assert (value.double() - resumed[key][name].double()).abs().max().item() == 0.0, (key, name)
    for key in ('task_state', 'task_state_ema'):
        assert torch.equal(whole[key]['instance_loss']['beta'], resumed[key]['instance_loss']['beta'])
    assert not torch.equal(*(whole[key]['instance_loss']['beta'] for key in ('task_state', 'task_state_ema')))


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_two_processes_train_one_model(script, noise_folder, tmp_path):
    rows, checkpoint, log = _run(
        script, noise_folder, tmp_path / 'run', '--img-size', 64, '-b', 9, '--epochs', 2, '--lr', 0.01,
        '--mg-sampling', 'uniform', '--mg-gather', '--mg-eval', '--model-ema', '--grad-accum-steps', 2,
        launcher=['torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m'])
    model = timm.create_model('multigrain', trunk='test_resnet', num_classes=3)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    # 36 images, shared out: one step of 2 accumulated batches of 9 a process and epoch; one process logs
    assert log.count('Train: 1 [') == 1 and len(rows) == 2
    assert log.count('MultiGrain: repeats=3') == 1
    assert rows[-1]['train_instance_loss'] > 0
    # 3 images of 3 copies in a batch, the negatives of an anchor are the others of both processes
    assert rows[-1]['train_effective_negatives'] == pytest.approx(15)
    assert checkpoint['task_state']['instance_loss']['beta'].item() != pytest.approx(1.2, abs=1e-7)
    averaged = load({'state_dict': checkpoint['state_dict_ema']})  # which is validated last
    for name, value in figures_of(averaged, noise_folder / 'validation', 64).items():
        assert rows[-1][f'eval_{name}'] == pytest.approx(value)
