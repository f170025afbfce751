"""The recipes: that a train.py takes them, and that timm makes of resnet50_paper what the original trained with.

TIMM_SCRIPTS names folders with a train.py, separated as in PATH; without it the stand-in beside this file is asked.
"""
import argparse
import json
import math
import os
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AutoAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn
from torchvision import transforms as T

from timm_multigrain.cli.main import main
from timm_multigrain.data.transforms import Lighting, insert_lighting
from timm_multigrain.train import launcher
from timm_multigrain.train.options import PREFIX, TrainOptions, add_options, conflict

NAMES = ['finetune', 'resnet50_autoaugment', 'resnet50_modern', 'resnet50_paper']
PAPER = ['resnet50_paper', 'resnet50_autoaugment']
SCRIPTS = [Path(folder) / 'train.py' for folder in os.environ.get('TIMM_SCRIPTS', '').split(os.pathsep) if folder]
SCRIPTS = SCRIPTS or [Path(__file__).with_name('standin_train.py')]

NULLABLE = {'aa', 'color_jitter'}


def _path(name):
    return files('timm_multigrain.recipes') / f'{name}.yaml'


def _recipe(name):
    return yaml.safe_load(_path(name).read_text(encoding='ascii'))


def _of_type(value, kind):
    # YAML values go past argparse's conversion, so 1e-4, which YAML reads as text, would reach timm as text
    if isinstance(kind, list):
        return isinstance(value, list) and all(_of_type(v, kind[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _type_of_action(action):
    if isinstance(action, argparse._StoreTrueAction):
        return bool
    if isinstance(action.default, dict):
        return dict
    return [action.type] if action.nargs == '+' else action.type


# --- what train.py takes

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.parent.name)
def test_script_takes_recipe(script, name, monkeypatch):
    module, recipe = _load(script, monkeypatch), _recipe(name)
    actions = {action.dest: action for action in module.parser._actions}
    for key in recipe.keys() - {PREFIX + field.name for field in fields(TrainOptions)}:
        assert (recipe[key] is None and key in NULLABLE) or _of_type(recipe[key], _type_of_action(actions[key])), key
    add_options(module.parser)
    monkeypatch.setattr(sys, 'argv', ['train.py', '-c', str(_path(name)), '--data-dir', 'images', '--num-classes', '7'])
    args, _ = module._parse_args()
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert (args.data_dir, args.num_classes) == ('images', 7)
    options = TrainOptions.from_mapping(vars(args))
    assert options == TrainOptions.from_mapping(recipe) and conflict(args, options) is None
    repeats = 2 if name == 'finetune' else 3
    assert (options.repeats, options.classif_weight, options.instance_loss) == (repeats, 0.5, 'margin')
    loss = options.create_loss()
    assert loss.margin == 0.2
    if name in PAPER:
        assert loss.beta.item() == pytest.approx(1.2) and not loss.follows


def _load(script, monkeypatch):
    monkeypatch.setitem(sys.modules, script.stem, None)  # load_script enters it there; this takes it out again
    return launcher.load_script(script)


# --- the recipes of the paper

@pytest.mark.parametrize('name', PAPER)
def test_paper_objective_and_batch(name):
    recipe = _recipe(name)
    options = TrainOptions.from_mapping(recipe)
    assert (options.sampling, options.gather, options.beta_lr, options.epoch_len_factor) == ('batch', False, None, 2)
    assert recipe['batch_size'] * 8 == 512 and recipe['smoothing'] == 0
    assert 'lr_base' not in recipe


def test_autoaugment_differs_in_augmentation_only():
    paper, autoaugment = _recipe('resnet50_paper'), _recipe('resnet50_autoaugment')
    assert paper.keys() == autoaugment.keys()
    assert {k for k in paper if paper[k] != autoaugment[k]} == {'aa', 'color_jitter', 'mg_lighting'}


@pytest.mark.parametrize('name', PAPER)
def test_paper_schedule(name):
    args = SimpleNamespace(**_recipe(name))
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = create_optimizer_v2([parameter], **optimizer_kwargs(args))
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    rates = []
    for epoch in range(num_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step_update(10 * (epoch + 1))
        scheduler.step(epoch + 1)
    assert rates == pytest.approx([0.2] * 31 + [0.02] * 30 + [0.002] * 30 + [0.0002] * 29)


@pytest.mark.parametrize('name', PAPER)
def test_paper_optimizer(name):
    args = SimpleNamespace(**_recipe(name))
    model = timm.create_model('multigrain_resnet18', num_classes=3, **args.model_kwargs)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD
    decay = {}
    for group in optimizer.param_groups:
        assert (group['lr'], group['momentum'], group['nesterov'], group['dampening']) == (0.2, 0.9, False, 0)
        decay.update((p, group['weight_decay']) for p in group['params'])
    batch_norm = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert batch_norm and all(decay[p] == 1e-4 for m in batch_norm for p in (m.weight, m.bias))
    assert {decay[p] for p in model.parameters()} == {1e-4}


@pytest.mark.parametrize('name', PAPER)
def test_paper_model(name):
    recipe = _recipe(name)
    model = timm.create_model(recipe['model'], pretrained=False, **recipe['model_kwargs'])
    assert model.gem_p == 3 and model.trunk_name == 'resnet50'
    last = [block.bn3.weight for stage in (1, 2, 3, 4) for block in getattr(model.trunk, f'layer{stage}')]
    assert len(last) == 16 and all((weight == 1).all() for weight in last)


def test_paper_augmentation():
    recipe = _recipe('resnet50_paper')
    dataset = SimpleNamespace(transform=_train_transform(recipe))
    insert_lighting(dataset, Lighting(recipe['mg_lighting']))
    crop, flip, jitter, to_tensor, lighting = dataset.transform.transforms
    _check_crop(crop, flip)
    assert isinstance(jitter, T.ColorJitter) and jitter.hue is None
    for factor in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert factor == pytest.approx((0.7, 1.3))
    assert lighting.std == 0.1
    assert isinstance(to_tensor, MaybePILToTensor)


def test_autoaugment_policy(golden):
    """timm's sub-policies are the original implementation's, which lacks one of the published ones that come twice."""
    original = json.loads((golden / 'resize.json').read_text())['recipes']['autoaugment']['sub_policies']
    found = [[(op.name.lower().removesuffix('original'), op.prob, op.magnitude) for op in pair]
             for pair in _train_transform(_recipe('resnet50_autoaugment')).transforms[2].policy]
    expected = [[(row[f'op{i}'].replace('_', ''), row[f'prob{i}'], row[f'level{i}']) for i in (1, 2)]
                for row in original]
    assert sorted(found) == sorted([*expected, [('equalize', 0.8, 8), ('equalize', 0.6, 3)]])


def test_autoaugment_augmentation():
    crop, flip, policy, to_tensor = _train_transform(_recipe('resnet50_autoaugment')).transforms
    _check_crop(crop, flip)
    assert isinstance(policy, AutoAugment) and len(policy.policy) == 25
    assert {op.kwargs['resample'] for sub_policy in policy.policy for op in sub_policy} == {Image.BILINEAR}
    assert {op.kwargs['fillcolor'] for sub_policy in policy.policy for op in sub_policy} == {(124, 116, 104)}
    assert isinstance(to_tensor, MaybePILToTensor)


def _train_transform(recipe):
    size = recipe['img_size']
    names = {'scale': 'scale', 'ratio': 'ratio', 'hflip': 'hflip', 'vflip': 'vflip', 'color_jitter': 'color_jitter',
             'aa': 'auto_augment', 'train_interpolation': 'interpolation', 'reprob': 're_prob'}
    given = {argument: recipe[key] for key, argument in names.items()}
    return create_transform((3, size, size), is_training=True, use_prefetcher=True, **given)


def _check_crop(crop, flip):
    assert isinstance(crop, RandomResizedCropAndInterpolation) and crop.size == (224, 224)
    assert crop.interpolation is T.InterpolationMode.BILINEAR
    assert crop.scale == (0.08, 1) and crop.ratio == (3 / 4, 4 / 3)
    assert isinstance(flip, T.RandomHorizontalFlip) and flip.p == 0.5


# --- the other recipes

def test_modern_has_the_samples_of_the_paper():
    modern, paper = _recipe('resnet50_modern'), _recipe('resnet50_paper')
    assert modern['epochs'] * modern['mg_epoch_len_factor'] == paper['epochs'] * paper['mg_epoch_len_factor']
    rate = modern['lr_base'] * 8 * modern['batch_size'] / modern['lr_base_size']
    assert math.isclose(rate, 0.375) and '0.375 on 8 GPUs' in _path('resnet50_modern').read_text()
    assert 'lr' not in modern


# --- command and package

def test_command_prints_the_file(capfdbinary):
    assert main(['recipe', 'resnet50_paper']) == 0
    assert capfdbinary.readouterr().out == _path('resnet50_paper').read_bytes()


def test_command_lists_recipes(capsys):
    assert main(['recipe']) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, NAMES, strict=True):
        assert line.split()[0] == name
        assert line.endswith(_path(name).read_text().splitlines()[0].removeprefix('# '))


def test_unknown_recipe(capsys):
    assert main(['recipe', 'resnet50_papr']) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert "recipe 'resnet50_papr' not found: did you mean resnet50_paper" in err
    assert main(['recipe', 'zzz']) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in NAMES)
