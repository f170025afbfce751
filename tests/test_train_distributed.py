"""torchrun: two real processes (gloo) train one model."""
import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_multigrain  # noqa: F401 - registers the models

from .test_train_evaluation import figures_of, load

ROOT = Path(__file__).resolve().parents[1]
STANDIN = Path(__file__).with_name('standin_train.py')
SCRIPTS = [STANDIN, *(Path(f) / 'train.py' for f in os.environ.get('TIMM_SCRIPTS', '').split(os.pathsep) if f)]


def _torchrun(*command):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    return subprocess.run([*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=400)


def _flags(noise_folder, output, name):
    return [
        '--data-dir', noise_folder, '--model', 'multigrain', '--num-classes', 3, '--input-size', 3, 64, 64, '-b', 9,
        '--epochs', 2, '--lr', 0.01, '--device', 'cpu', '-j', 0, '--log-interval', 1, '--output', output,
        '--experiment', name]


def _result(output, name):
    torch.serialization.add_safe_globals([argparse.Namespace])
    checkpoint = torch.load(output / name / 'last.pth.tar', weights_only=True)
    rows = list(csv.DictReader((output / name / 'summary.csv').open()))
    return checkpoint, rows


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_two_processes_train_one_model(script, noise_folder, tmp_path):
    flags = ['--model-kwargs', 'trunk=test_resnet', '--mg-sampling', 'uniform', '--mg-gather', '--model-ema',
             '--grad-accum-steps', 2]
    done = _torchrun('-m', 'timm_multigrain', script, *_flags(noise_folder, tmp_path, 'gathered'), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint, rows = _result(tmp_path, 'gathered')
    model = timm.create_model('multigrain', trunk='test_resnet', num_classes=3)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    # 36 images, shared out: one step of 2 accumulated batches of 9 a process and epoch; one process logs
    assert done.stderr.count('Train: 1 [') == 1 and len(rows) == 2
    assert done.stderr.count('MultiGrain: repeats=3') == 1
    assert float(rows[-1]['train_instance_loss']) > 0
    # 3 images of 3 copies in a batch, the negatives of an anchor are the others of both processes
    assert float(rows[-1]['train_effective_negatives']) == pytest.approx(15)
    assert checkpoint['task_state']['instance_loss']['beta'].item() != pytest.approx(1.2, abs=1e-7)
    assert 'state_dict_ema' in checkpoint


@pytest.mark.slow
def test_the_device_module_under_torchrun(noise_folder, tmp_path):
    settings = ['--device-modules', 'timm_multigrain.auto', '--model-kwargs', 'trunk=test_resnet',
                'mg_sampling=uniform', 'mg_instances=class', 'mg_eval=True']
    script = shutil.copy(SCRIPTS[-1], tmp_path)  # out of its checkout, whose timm/ would hide the installed one
    done = _torchrun(script, *_flags(noise_folder, tmp_path, 'auto'), *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint, rows = _result(tmp_path, 'auto')
    assert 'beta' in checkpoint['task_state']['instance_loss'] and 'train_beta' in rows[0]
    for name, value in figures_of(load(checkpoint), noise_folder / 'validation', 64).items():
        assert float(rows[-1][f'eval_{name}']) == pytest.approx(value)
    assert float(rows[-1]['train_effective_negatives']) == pytest.approx(6)  # of this process, 3 of each class
