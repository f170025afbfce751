"""The launcher's options, what train.py's own flags may not be combined with, and the sentences that say so."""
import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from timm_multigrain.train.launcher import launch
from timm_multigrain.train.options import TrainOptions, add_options, conflict

STANDIN = Path(__file__).with_name('standin_train.py')


def _parse(*flags):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return TrainOptions.from_mapping(vars(parser.parse_args(flags)))


def test_defaults():
    options = _parse()
    assert options == TrainOptions()
    assert options.joint and not options.plain and options.create_loss().follows
    assert _parse('--mg-repeats', '1', '--mg-classif-weight', '1').plain
    for extra in (['--mg-lighting', '.1'], ['--mg-epoch-len-factor', '2'], ['--mg-fast-loader'],
                  ['--mg-instances', 'class'], ['--mg-eval']):
        assert not _parse('--mg-repeats', '1', '--mg-classif-weight', '1', *extra).plain


def test_every_flag_reaches_its_field():
    options = _parse(
        '--mg-repeats', '4', '--mg-classif-weight', '0.25', '--mg-instance-loss', 'margin', '--mg-margin', '0.3',
        '--mg-beta-init', '1.1', '--mg-beta-lr', '0.01', '--mg-sampling', 'batch', '--mg-gather',
        '--mg-freeze-bn', '--mg-start-weight', '2', '--mg-epoch-len-factor', '2', '--mg-lighting', '0.1',
        '--mg-fast-loader', '--mg-jpeg', '0.5', '--mg-instances', 'folder', '--mg-decode', 'timm', '--mg-strict',
        '--mg-eval', '--mg-instance-loss-kwargs', 'margin=0.4')
    assert asdict(options) == {
        'repeats': 4, 'classif_weight': 0.25, 'instance_loss': 'margin', 'margin': 0.3, 'beta_init': 1.1,
        'beta_lr': 0.01, 'sampling': 'batch', 'gather': True, 'freeze_bn': True, 'start_weight': 2.,
        'epoch_len_factor': 2., 'lighting': 0.1, 'jpeg': 0.5, 'fast_loader': True, 'instances': 'folder',
        'decode': 'timm', 'strict': True, 'eval': True, 'instance_loss_kwargs': {'margin': 0.4}}
    assert options.create_loss().margin == 0.4
    assert all(asdict(options)[f.name] != f.default for f in fields(options) if f.name != 'instance_loss')
    assert 'repeats=4' in str(options) and 'gather=True' in str(options)


@pytest.mark.parametrize('values, message', [
    ({'mg_repeat': 2}, 'mg_repeat is not an option: did you mean mg_repeats'),
    ({'mg_repeats': 2.5}, 'mg_repeats has to be an integer, not 2.5'),
    ({'mg_repeats': 0}, '--mg-repeats 0: give at least 1'),
    ({'mg_classif_weight': float('nan')}, 'mg_classif_weight has to be a number, not nan'),
    ({'mg_gather': 1}, 'mg_gather has to be true or false, not 1'),
    ({'mg_sampling': 'hard'}, '--mg-sampling hard: give row, batch or uniform'),
    ({'mg_margin': -1}, '--mg-margin -1.0: give at least 0'),
    ({'mg_beta_init': 'high'}, "mg_beta_init has to be a number, not 'high'"),
    ({'mg_beta_init': 3}, '--mg-beta-init 3.0: give auto, or a number: distances'),
    ({'mg_beta_lr': 0.1}, '--mg-beta-lr 0.1: beta is a parameter only with --mg-beta-init'),
    ({'mg_beta_lr': -1}, '--mg-beta-lr -1.0'),
    ({'mg_epoch_len_factor': 0}, '--mg-epoch-len-factor 0.0: give more than 0'),
    ({'mg_instances': 'nowhere.csv'}, '--mg-instances nowhere.csv: file not found; give copy, folder, class or a CSV'),
    ({'mg_decode': 'pillow'}, '--mg-decode pillow: give one of multigrain, timm'),
    ({'mg_repeats': 1}, 'leaves the instance loss without positives'),
    ({'mg_instance_loss': 'triplet', 'mg_beta_init': 1}, 'belongs to the margin loss'),
    ({'mg_instance_loss': 'tripletloss'}, "unknown instance loss 'tripletloss'"),
    ({'mg_instance_loss_kwargs': {'slack': 1}}, "unexpected keyword argument 'slack'"),
    ({'mg_instance_loss_kwargs': 'slack'}, 'has to be an object'),
])
def test_bad_values_are_refused_in_one_sentence(values, message):
    with pytest.raises(ValueError) as info:
        TrainOptions.from_mapping(values)
    assert message in str(info.value) and '\n' not in str(info.value)


def test_losses_of_pytorch_metric_learning():
    pytest.importorskip('pytorch_metric_learning')
    for name, message in (('pml:TripletMarginLos', 'TripletMarginLoss'), ('pml:ArcFaceLoss', 'embedding_size')):
        with pytest.raises(ValueError, match=message):
            TrainOptions(instance_loss=name)
    with pytest.raises(ValueError, match='use_triplets=False'):  # found by trying it, not after the data is read
        TrainOptions(instance_loss='pml:RankedListLoss', instance_loss_kwargs={'margin': 0.4, 'Tn': 10})
    options = _parse('--mg-instance-loss', 'pml:MultiSimilarityLoss', '--mg-instance-loss-kwargs', 'alpha=3',
                     'use_triplets=False')
    loss = options.create_loss()
    assert loss.loss.alpha == 3 and not loss.needs_triplets


def _args(**changes):
    values = dict(mixup=0., cutmix=0., cutmix_minmax=None, aug_repeats=0, aug_splits=0, jsd_loss=False, split_bn=False,
                  naflex_loader=False, kd_model_name=None, multi_label=False, torchscript=False, dataset='',
                  batch_size=12, train_batch_sizes=None)
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize('change, message', [
    ({'mixup': 0.2}, '--mixup (0.2)'),
    ({'cutmix_minmax': [0.2, 0.8]}, '--cutmix-minmax'),
    ({'aug_repeats': 3}, 'give --mg-repeats'),
    ({'aug_splits': 2}, '--aug-splits'),
    ({'naflex_loader': True}, '--naflex-loader'),
    ({'kd_model_name': 'resnet50'}, 'distillation'),
    ({'multi_label': True}, 'exactly one class'),
    ({'torchscript': True}, '--torchcompile'),
    ({'dataset': 'wds/imagenet'}, 'read as a stream'),
    ({'batch_size': 5}, 'give at least 6'),
    ({'train_batch_sizes': [12, 4]}, 'a batch size of 4 is too small'),
    ({'opt': 'adahessian'}, 'choose another optimizer'),
])
def test_flags_that_do_not_go_together(change, message):
    text = conflict(_args(**change), TrainOptions())
    assert message in text and '\n' not in text


def test_flags_that_do_go_together():
    grey = _args(input_size=[1, 32, 32])
    assert conflict(grey, TrainOptions()) is None and 'RGB' in conflict(grey, TrainOptions(lighting=0.1))
    assert conflict(_args(), TrainOptions()) is None
    assert conflict(_args(dataset='hfds/imagenet'), TrainOptions()) is None
    assert conflict(argparse.Namespace(batch_size=12), TrainOptions()) is None  # a script without those flags
    only_classes = TrainOptions(classif_weight=1)
    assert conflict(_args(batch_size=3, torchscript=True), only_classes) is None
    assert '--mg-eval' in conflict(_args(torchscript=True), TrainOptions(classif_weight=1, eval=True))
    assert 'give at least 3' in conflict(_args(batch_size=2), only_classes)


def _fails(capsys, script, *flags):
    with pytest.raises(SystemExit) as info:
        launch(str(script), list(flags))
    text = capsys.readouterr().err.strip()
    assert info.value.code == 2 and text.startswith('timm_multigrain: error: ') and '\n' not in text
    return text


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setattr('timm_multigrain.train.launcher.running', False)


def test_scripts_that_are_refused(capsys, clean, tmp_path):
    assert 'git clone' in _fails(capsys, tmp_path / 'train.py')
    text = STANDIN.read_text()
    cases = {
        'old.py': (text.replace('get_trainable_module', 'get_module'), 'older than timm 1.0.27'),
        'taskless.py': (text.replace('ClassificationTask', 'OldTask').replace('import OldTask', 'import\\\n    '
                        'ClassificationTask as OldTask'), 'does not use ClassificationTask'),
        'newer.py': ('from timm.task import NotThereYet\ndef train_one_epoch(): ...\n', 'cannot import name'),
        'loop.py': ('def train_one_epoch(loader): ...\n', 'does not use ClassificationTask, create_loader'),
    }
    for name, (source, message) in cases.items():
        (tmp_path / name).write_text(source)
        assert message in _fails(capsys, tmp_path / name), name


def test_train_one_epoch_without_the_arguments_needed(capsys, clean, tmp_path):
    (tmp_path / 'train.py').write_text(STANDIN.read_text() + '\n\ndef train_one_epoch(epoch, loader): ...\n')
    assert f'train_one_epoch of {tmp_path / "train.py"} does not take task' in _fails(capsys, tmp_path / 'train.py')
