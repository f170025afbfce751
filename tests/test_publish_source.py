"""What `timm-multigrain publish` takes as a model: folders, checkpoints of train.py, registered tags."""
import argparse
import json

import timm
import torch

from timm_multigrain.cli.main import main
from timm_multigrain.hub import save_pretrained

from .tiny import figure, image_for, tiny_model


def _checkpoint(path, weights, ema=None, **args):
    args = argparse.Namespace(**{
        'model': 'multigrain', 'num_classes': None, 'gp': None, 'pretrained': False, 'img_size': 96, 'crop_pct': 0.9,
        'model_kwargs': {'trunk': 'test_resnet', 'gem_p': 2, 'mg_repeats': 3, 'pretrained_trunk': True}, **args})
    state = {f'_orig_mod.{k}': v for k, v in weights.state_dict().items()}
    torch.save({'epoch': 4, 'arch': args.model, 'args': args, 'state_dict': state, 'optimizer': {}, 'version': 2,
                **({'state_dict_ema': ema.state_dict()} if ema is not None else {})}, path)
    return str(path)


@torch.inference_mode()
def test_checkpoints_of_train(hub, tmp_path, capsys):
    model, ema = tiny_model(0, gem_p=2), tiny_model(1, gem_p=2)
    path = _checkpoint(tmp_path / 'last.pth.tar', model, ema)
    assert main(['publish', path, 'me/ema', '--license', 'mit']) == 0
    assert f'Publishing {path}' in capsys.readouterr().out
    assert main(['publish', path, 'me/model', '--license', 'mit', '--no-ema']) == 0
    for name, expected in (('me/model', model), ('me/ema', ema)):
        loaded = timm.create_model(f'hf-hub:{name}', pretrained=True).eval()
        assert torch.equal(loaded(image_for(model)), expected(image_for(model))) and loaded.gem_p == 2
        assert loaded.num_classes == 3 and loaded.pretrained_cfg['input_size'] == (3, 96, 96)
        assert loaded.pretrained_cfg['crop_pct'] == 0.9
    assert '3 x 96 x 96' in hub.repos['me/model'].files()['README.md'].decode()


def test_license_of_checkpoints(hub, tmp_path, capsys):
    model = timm.create_model('multigrain_resnet18', num_classes=2)
    small = {'model': 'multigrain_resnet18', 'model_kwargs': {}}
    assert main(['publish', _checkpoint(tmp_path / 'a.pth.tar', model, **small), 'me/a']) == 2
    assert 'license of the weights is not known' in capsys.readouterr().err
    model = timm.create_model('multigrain_resnet50', num_classes=2)
    large = {'model': 'multigrain_resnet50', 'model_kwargs': {}}
    # from scratch under the name that has official weights, and tuned from these
    assert main(['publish', _checkpoint(tmp_path / 'b.pth.tar', model, **large), 'me/b']) == 2
    assert 'license of the weights is not known' in capsys.readouterr().err and not hub.repos
    tuned = _checkpoint(tmp_path / 'c.pth.tar', model, pretrained=True, **large)
    assert main(['publish', tuned, 'me/c', '--dry-run', str(tmp_path / 'c')]) == 0
    assert 'cc-by-nc-4.0' in capsys.readouterr().out
    cfg = json.loads((tmp_path / 'c' / 'config.json').read_text())['pretrained_cfg']
    assert cfg['license'] == 'cc-by-nc-4.0' and cfg['description'] is None and 'tag' not in cfg


def test_command_with_card_and_figures(hub, tmp_path):
    path = save_pretrained(tiny_model(), tmp_path / 'model', label_names=['a', 'b', 'c'])
    (path / 'README.md').write_text('---\nlanguage: en\n---\n# My model\n\nTrained on my holiday pictures.\n')
    (tmp_path / 'results.json').write_text(json.dumps([figure(71.5)]))
    assert main(['publish', str(path), 'me/model', '--license', 'mit', '--metrics', str(tmp_path / 'results.json'),
                 '--description', 'Boats and cars.', '--private']) == 0
    card = hub.repos['me/model'].files()['README.md'].decode()
    assert 'Trained on my holiday pictures.' in card and 'language: en' in card and 'Boats and cars.' in card
    assert '| classes | 3: a, b, c |' in card
    assert '| classification | ImageNet-1k | top1 | 71.5 | 224 | 3 |' in card and hub.repos['me/model'].private
    loaded = timm.create_model('hf-hub:me/model', pretrained=True)
    assert loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert loaded.pretrained_cfg['description'] == 'Boats and cars.'
