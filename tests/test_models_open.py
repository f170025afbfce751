"""Models by folder, file and name: as they were trained, and nothing that a file names is followed."""
import argparse
import dataclasses
import hashlib
import json
import random
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from timm_multigrain import save_pretrained
from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.labels import write_class_names
from timm_multigrain.index.model import label_names_of
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.open import open_model, weights_sha256
from timm_multigrain.models.weights import UnreadableWeightsError
from timm_multigrain.train.options import TrainOptions, resume_problem

from . import original
from .original import close, container, refused, write
from .test_files import ODD, change_tree
from .tiny import image_for, tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(tiny_model(), tmp_path / 'model')


def test_folder(folder):
    model = tiny_model()
    for name in (folder, str(folder), f'local-dir:{folder}'):
        opened = open_model(name)
        assert not opened.training and torch.equal(opened(image_for(model)), model(image_for(model)))
        assert weights_sha256(opened) == weights_sha256(model)


@pytest.fixture
def offline(monkeypatch):
    """No connection, no download: whatever tries fails the test."""
    asked = []

    def fail(*args, **kwargs):
        asked.append((args, kwargs))
        raise AssertionError('the network was asked')
    for name in ('socket.socket.connect', 'socket.getaddrinfo', 'huggingface_hub.hf_hub_download',
                 'timm.models._hub.hf_hub_download', 'timm.models._builder.load_state_dict_from_url'):
        monkeypatch.setattr(name, fail)
    yield
    assert not asked


def train_checkpoint(path, model, name='multigrain', ema=None, **args):
    """What timm's train.py saves."""
    args = argparse.Namespace(**{'model': name, 'num_classes': model.num_classes, 'gp': None, 'pretrained': False,
                                 'model_kwargs': {}, **args})
    torch.save({'args': args, 'state_dict': model.state_dict(), 'epoch': 3,
                **({} if ema is None else {'state_dict_ema': ema.state_dict()})}, path)
    return path


def trained(name, **kwargs):
    """A timm model with weights and statistics unlike those that it starts with."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith('running_mean'):
                value.normal_(std=0.1)
    return model


# --- timm models as they were trained


@pytest.mark.parametrize('name, kwargs, pool, p', [
    ('test_resnet', dict(global_pool='gem4'), 'gem', 4), ('test_resnet', dict(global_pool='rmac'), 'rmac', None),
    ('test_resnet', dict(global_pool='max'), 'trunk', None), ('test_convnext', {}, 'trunk', None),
    ('test_convnext', dict(global_pool='gem2'), 'trunk', None), ('test_vit2', dict(global_pool='map'), 'trunk', None),
    ('test_efficientnet', dict(global_pool='gem_learn', bn_eps=0.1), 'gem', 3.5), ('test_vit', {}, 'trunk', None)])
def test_timm_models_keep_pooling_and_classifier(tmp_path, offline, name, kwargs, pool, p):
    plain = trained(name, num_classes=4, **kwargs)
    if p == 3.5:
        next(m for m in plain.modules() if hasattr(m, 'set_p')).set_p(p)
    path = train_checkpoint(tmp_path / 'last.pth.tar', plain, name, gp=kwargs.get('global_pool'),
                            bn_eps=kwargs.get('bn_eps'))
    timm.models.save_for_hf(plain, str(tmp_path / 'hub'), safe_serialization=True)
    x = torch.randn(2, 3, *((160, 160) if 'vit' in name else (64, 64)))
    with torch.no_grad():
        logits, embedding = plain(x), plain.forward_head(plain.forward_features(x), pre_logits=True)
    for opened in (open_model(path), open_model(tmp_path / 'hub'), open_model(f'local-dir:{tmp_path / "hub"}')):
        assert isinstance(opened, MultiGrain) and (opened.global_pool, opened.gem_p, opened.num_classes) == (pool, p, 4)
        with torch.no_grad():
            torch.testing.assert_close(opened(x), logits, rtol=1e-6, atol=1e-6)
            unit = embedding / (embedding.norm(dim=1, keepdim=True) + 1e-6)
            torch.testing.assert_close(opened.embed(x), unit, rtol=1e-6, atol=1e-6)
    again = open_model(save_pretrained(open_model(path), tmp_path / 'saved'))
    assert weights_sha256(again) == weights_sha256(open_model(path))


def test_a_timm_folder_keeps_its_data_configuration(tmp_path):
    data = dict(mean=[.1, .2, .3], std=[.4, .5, .6], input_size=(3, 96, 96), crop_pct=0.8, interpolation='nearest')
    timm.models.save_for_hf(trained('test_resnet', num_classes=2), str(tmp_path / 'hub'), safe_serialization=True,
                            data_config=data, model_config={'label_names': ['a', 'b']})
    cfg = open_model(tmp_path / 'hub').pretrained_cfg
    assert {key: cfg[key] for key in data} == data and cfg['label_names'] == ['a', 'b'] and cfg['num_classes'] == 2


DISTILLED = 'deit_tiny_distilled_patch16_224'


def test_a_classifier_of_another_kind_is_said(tmp_path):
    plain = trained(DISTILLED, num_classes=4, depth=1, embed_dim=32, num_heads=2, img_size=32)  # has two of them
    timm.models.save_for_hf(plain, str(tmp_path), safe_serialization=True)
    with pytest.warns(UserWarning, match='does not classify by a linear layer.*without its classifier'):
        opened = open_model(tmp_path)
    assert (opened.global_pool, opened.num_classes) == ('trunk', 0)
    assert plain.state_dict().keys() - opened.trunk.state_dict().keys() == {
        f'{head}.{name}' for head in ('head', 'head_dist') for name in ('weight', 'bias')}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_model(save_pretrained(opened, tmp_path / 'saved')).global_pool == 'trunk'


def test_timm_names(monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kwargs: (
        asked.append((name, pretrained)), create(name, pretrained=False, **kwargs))[1])
    monkeypatch.setattr('timm_multigrain.models.open.check_reachable', lambda *args: None)
    model = open_model('test_resnet.r160_in1k')
    assert isinstance(model, MultiGrain) and (model.num_classes, model.global_pool) == (1000, 'trunk')
    assert asked[0] == ('test_resnet.r160_in1k', True) and not any(pretrained for _, pretrained in asked[1:])
    assert model.pretrained_cfg['tag'] == 'r160_in1k' and model.pretrained_cfg['license']
    assert open_model('test_resnet', pretrained=False, pool='gem', p=2.5).gem_p == 2.5
    assert open_model('multigrain_test_resnet', pretrained=False).gem_p == 3  # registered on the way


def test_names_of_classes(tmp_path):
    imagenet = open_model('test_resnet.r160_in1k', pretrained=False)
    imagenet.pretrained_cfg['tag'] = 'r160_in1k'
    assert label_names_of(imagenet)[0] == 'tench, Tinca tinca' and len(label_names_of(imagenet)) == 1000
    assert label_names_of(open_model(save_pretrained(imagenet, tmp_path / 'model')))[999].startswith('toilet tissue')
    other = train_checkpoint(tmp_path / 'other', trained('test_resnet'), 'test_resnet')  # 1000 classes of any kind
    assert label_names_of(open_model(other)) is None
    model = tiny_model()
    model.pretrained_cfg['label_names'] = {'0': 'boat', '2': 'tree'}
    assert label_names_of(model) == ['boat', '1', 'tree']


def test_names_of_classes_travel_from_training(tmp_path, noise_folder):
    args = dict(model_kwargs=dict(trunk='test_resnet'), img_size=32)
    path = train_checkpoint(tmp_path / 'last.pth.tar', tiny_model(), **args)
    assert 'label_names' not in open_model(path).pretrained_cfg
    write_class_names(tmp_path, ['boat', 'car'])
    assert 'label_names' not in open_model(path).pretrained_cfg  # of another training
    write_class_names(tmp_path, ['boat', 'car', 'tree'])
    assert open_model(path).pretrained_cfg['label_names'] == ['boat', 'car', 'tree']
    for command in (['whiten', str(path), str(noise_folder / 'train'), '-o', f'{tmp_path}/white', '--workers', '0',
                     '--shrinkage', '0.5'],
                    ['publish', f'{tmp_path}/white', 'me/x', '--license', 'mit', '--dry-run', f'{tmp_path}/pub']):
        assert main(command) == 0
    assert open_model(tmp_path / 'pub').pretrained_cfg['label_names'] == ['boat', 'car', 'tree']


# --- data configuration: one for a checkpoint and the folder published from it


def test_what_a_checkpoint_was_trained_with(tmp_path):
    model = tiny_model(gem_p=2)
    given = dict(mean=[0., 0., 0.], std=[1., 1., 1.], crop_pct=1.0, img_size=64, interpolation='bicubic')
    path = train_checkpoint(tmp_path / 'last.pth.tar', model, model_kwargs=dict(trunk='test_resnet', gem_p=2), **given)
    opened = open_model(path)
    expected = Protocol(64, 'longer-side', mean=(0,) * 3, std=(1,) * 3, crop_pct=1, interpolation='bicubic')
    assert Protocol.for_model(opened) == expected
    again = open_model(save_pretrained(opened, tmp_path / 'saved'))
    assert Protocol.for_model(again) == expected and 'test_input_size' not in again.pretrained_cfg
    assert main(['publish', str(path), 'me/model', '--license', 'mit', '--dry-run', str(tmp_path / 'published')]) == 0
    published = open_model(tmp_path / 'published')
    assert Protocol.for_model(published) == expected
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    a, b = (m.embed(Protocol.for_model(m).normalize(Protocol.for_model(m).pixels(image))[None])
            for m in (opened, published))
    assert (a * b).sum() > 1 - 1e-6


def test_validate_counts_as_timms_validate_py(tmp_path, noise_folder, capsys):
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=3, global_pool='gem4').eval()
    args = dict(mean=[0.2] * 3, std=[0.3] * 3, crop_pct=0.6, img_size=48, interpolation='bicubic', gp='gem4')
    path = train_checkpoint(tmp_path / 'last.pth.tar', model, 'test_resnet', **args)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(args, model=model))
    dataset = timm.data.ImageDataset(str(noise_folder / 'train'), transform=transform)
    with torch.no_grad():
        logits = torch.stack([model(image[None])[0] for image, _ in dataset])
    targets = torch.tensor([target for _, target in dataset])
    right = (logits.argmax(1) == targets).float().mean()
    assert main(['validate', str(path), str(noise_folder), '--split', 'train', '--workers', '0', '--json',
                 str(tmp_path / 'figures.json')]) == 0
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures[0]['metric'] == 'top1' and figures[0]['value'] == pytest.approx(100 * right.item()) and 0 < right < 1


# --- names and contents of files that are not to be trusted


def test_no_name_in_a_file_reaches_the_network(tmp_path, offline):
    folder = save_pretrained(tiny_model(), tmp_path / 'model')
    config = json.loads((folder / 'config.json').read_text())
    for args in (dict(trunk='hf-hub:me/other'), dict(trunk='local-dir:/etc'), dict(trunk='../other'), dict(trunk=3),
                 dict(pretrained_trunk=True), dict(pretrained_trunk='a1_in1k'), dict(checkpoint_path='/etc/passwd'),
                 dict(pretrained_cfg_overlay={'hf_hub_id': 'me/other'}), dict(cache_dir='/tmp'), [1]):
        args = {**config['model_args'], **args} if isinstance(args, dict) else args
        (folder / 'config.json').write_text(json.dumps({**config, 'model_args': args}))
        with pytest.raises(ValueError, match=r'config\.json: .*(followed|arguments of the model)'):
            open_model(folder)
        if isinstance(args, dict):
            with pytest.raises((ValueError, TypeError)):
                timm.create_model(f'local-dir:{folder}', pretrained=True)
    for architecture in ('hf-hub:me/other', f'local-dir:{folder}', 'nothing', 7, None, ['resnet18']):
        (folder / 'config.json').write_text(json.dumps({**config, 'architecture': architecture}))
        with pytest.raises(ValueError, match='is not a model of timm'):
            open_model(folder)
    (folder / 'config.json').write_text(json.dumps(
        {**config, 'pretrained_cfg': {**config['pretrained_cfg'], 'hf_hub_id': 'me/other', 'source': 'hf-hub',
                                      'url': 'https://example.org/x.pth'}}))
    assert torch.equal(open_model(folder)(image_for(tiny_model())), tiny_model()(image_for(tiny_model())))
    for name, kwargs in (
            ('hf-hub:me/other', {}), (f'local-dir:{folder}', {}), ('multigrain', dict(trunk='hf-hub:me/other')),
            ('multigrain', dict(trunk='test_resnet', checkpoint_path='/etc/passwd'))):
        path = train_checkpoint(tmp_path / 'last.pth.tar', tiny_model(), name, model_kwargs=kwargs)
        with pytest.raises(ValueError, match=r'last\.pth\.tar: .*followed'):
            open_model(path)
    path = train_checkpoint(
        tmp_path / 'last.pth.tar', tiny_model(), model_kwargs=dict(trunk='test_resnet', pretrained_trunk=True))
    assert open_model(path).num_classes == 3


def test_repositories_that_the_user_names_and_no_others(hub, tmp_path):
    plain = trained('test_resnet', num_classes=4, global_pool='gem4')
    timm.models.save_for_hf(plain, str(tmp_path / 'plain'), safe_serialization=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / 'plain').iterdir()}
    hub.add_repo('me/plain', files)
    opened = open_model('hf-hub:me/plain')
    assert (opened.gem_p, opened.num_classes, opened.trunk_name) == (4, 4, 'test_resnet')
    assert torch.equal(opened.head.fc.weight, plain.get_classifier().weight)
    config = {'architecture': 'multigrain', 'num_classes': 0, 'pretrained_cfg': {'num_classes': 0}}
    for name, args in (('me/trunk', dict(trunk='hf-hub:me/plain')), ('me/start', dict(pretrained_trunk='r160_in1k'))):
        hub.add_repo(name, {**files, 'config.json': json.dumps({**config, 'model_args': args}).encode()})
        hub.requests.clear()
        with pytest.raises(ValueError, match='followed'):
            open_model(f'hf-hub:{name}')
        assert hub.requests and all(name in address for _, address in hub.requests)


def test_a_name_that_the_user_gives_is_followed(tmp_path):
    folder = save_pretrained(tiny_model(gem_p=2), tmp_path / 'model')
    path = train_checkpoint(tmp_path / 'last.pth.tar', tiny_model(1, gem_p=2), f'local-dir:{folder}')
    opened = open_model(path, architecture=f'local-dir:{folder}')
    assert weights_sha256(opened) == weights_sha256(tiny_model(1, gem_p=2))
    bare = tmp_path / 'bare.pth'
    torch.save(trained('test_resnet').state_dict(), bare)
    assert open_model(bare, architecture='test_resnet').num_classes == 1000
    with pytest.raises(ValueError, match=r'bare\.pth: .*name the model that it is of'):
        open_model(bare)


def test_a_trunk_from_elsewhere_is_recorded_by_its_architecture(tmp_path, offline):
    plain = trained('test_resnet', num_classes=4)
    timm.models.save_for_hf(plain, str(tmp_path / 'plain'), safe_serialization=True)
    model = MultiGrain(f'local-dir:{tmp_path / "plain"}', num_classes=2, pretrained_trunk=True)
    assert model.trunk_name == 'test_resnet'
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.trunk.state_dict().items())
    assert open_model(save_pretrained(model, tmp_path / 'saved')).trunk_name == 'test_resnet'


def test_programs_and_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')

    program, evil = tmp_path / 'program.pth', tmp_path / 'evil.pth'
    torch.jit.script(torch.nn.Linear(2, 2)).save(program)
    torch.save({'state_dict': {}, 'args': Evil()}, evil)
    for path, cause in ((program, 'it is a TorchScript program'), (evil, 'it asks to run Python code')):
        for read in (lambda path: open_model(path), lambda path: open_model(path, architecture='test_resnet'),
                     lambda path: timm.create_model('multigrain_resnet18', pretrained=True,
                                                    pretrained_cfg_overlay=dict(file=str(path)))):
            with pytest.raises(UnreadableWeightsError, match=cause):
                read(path)
        args = argparse.Namespace(resume=str(path), model='multigrain_resnet18')
        assert cause in resume_problem(args, TrainOptions())
    assert not (tmp_path / 'executed').exists()


def test_the_state_of_a_training_that_is_something_else(tmp_path):
    path = tmp_path / 'last.pth.tar'
    for state in ('x', ['instance_loss'], {'instance_loss': 3}, {'instance_loss': ['beta']}, None):
        torch.save({'state_dict': {}, 'task_state': state}, path)
        problem = resume_problem(argparse.Namespace(resume=str(path), model='x'), TrainOptions())
        lost = isinstance(state, dict)
        assert ('was trained with the instance loss another one' if lost else 'without an instance loss') in problem


@pytest.mark.filterwarnings('ignore')
def test_odd_files_are_refused_in_a_sentence(tmp_path, offline):
    saved = save_pretrained(tiny_model(), tmp_path / 'model', label_names=['a', 'b', 'c'])
    config, state = json.loads((saved / 'config.json').read_text()), tiny_model().state_dict()
    args = dict(
        model='multigrain', model_kwargs={'trunk': 'test_resnet', 'gem_p': 2.}, num_classes=3, gp='gem', mean=[.5],
        img_size=64, input_size=None, in_chans=None, crop_pct=0.9, std=[.2] * 3, interpolation='', pretrained=True)
    value, chance, opened = state['head.fc.weight'], random.Random(0), []
    odd = [*ODD, value[:1], value.to(torch.complex64), value.to(torch.int8), value.to_sparse(), value.flatten()]
    for number in range(80):
        if number % 2:
            path = saved
            (saved / 'config.json').write_text(json.dumps(change_tree(config, chance)))
        else:
            path, part = tmp_path / 'last.pth.tar', ('args', 'state_dict')[number // 2 % 2]
            tree = {'args': args, 'state_dict': dict(state), 'state_dict_ema': None}
            tree[part] = change_tree(tree[part], chance, odd)
            given = tree['args'] if chance.random() < 0.1 else argparse.Namespace(**tree['args'])
            torch.save({**tree, 'args': given}, path)
        try:
            Protocol.for_model(open_model(path))
            opened.append(number)
        except (ValueError, FileNotFoundError, RuntimeError) as e:
            assert str(e) and '\n' not in str(e), repr(e)
    assert 5 < len(opened) < 50


# --- the original's files, and what becomes of any file by `timm-multigrain convert`


def convert(source, folder, *more):
    assert main(['convert', str(source), '-o', str(folder), *more]) == 0
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return model, json.loads((folder / 'config.json').read_text())


@torch.inference_mode()
def test_a_file_of_ones_own(tmp_path, capsys, golden):
    path = write(tmp_path / 'checkpoint_120.pth', container(original.state_dict('resnet18')))
    model, config = convert(path, tmp_path / 'model')
    printed = capsys.readouterr().out
    assert f'multigrain_resnet18 in {tmp_path / "model"}: 123 tensors, 11,689,512 parameters' in printed
    for name in ('config.json', 'model.safetensors'):
        assert f'sha256 {hashlib.sha256((tmp_path / "model" / name).read_bytes()).hexdigest()}  {name}' in printed
    expected = load_file(golden / 'forward.safetensors')['resnet18.96x96.p3.0.logits']
    close(model(original.image(96, 96, 2)), expected)
    assert config['architecture'] == 'multigrain_resnet18' and config['num_classes'] == 1000
    assert config['pretrained_cfg']['crop_pct'] == 0.875 and config['pretrained_cfg']['interpolation'] == 'bilinear'
    # whose weights they are is not known, even where the model's default tag has a license
    assert not {'license', 'description', 'origin_url', 'tag', 'notes', 'url', 'file'} & set(config['pretrained_cfg'])


def test_the_authors_file_by_tag_and_name(tmp_path, server, monkeypatch):
    tag = 'multigrain_resnet50.fb_p3_l05_in1k'
    path = write(tmp_path / 'joint_3B_0.5.pth', container(original.state_dict('resnet50', p=1.7)))
    url = server.add('multigrain_models/joint_3B_0.5.pth', path.read_bytes())
    cfg = dataclasses.replace(timm.models.get_pretrained_cfg(tag), url=url)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, tag, cfg)
    hashes = set()
    for source in (tag, path):
        model, config = convert(source, tmp_path / 'model')
        hashes.add(config['weights_sha256'])
        stored = config['pretrained_cfg']
        for key in ('license', 'description', 'origin_url', 'paper_ids', 'tag', 'interpolation', 'crop_pct'):
            assert stored[key] == getattr(cfg, key)
        assert stored['mean'] == list(cfg.mean) and stored['notes'] == list(cfg.notes) and 'url' not in stored
        assert model.gem_p == torch.tensor(1.7).item() and model.pretrained_cfg['license'] == 'cc-by-nc-4.0'
    assert len(hashes) == len(server.requests) == 1
    other = write(tmp_path / 'joint_3B_0.5.pth', original.state_dict('resnet18'))  # the same name on another network
    model, config = convert(other, tmp_path / 'model')
    assert config['architecture'] == 'multigrain_resnet18' and 'license' not in config['pretrained_cfg']


def test_whitened_file_by_address_with_other_classes(tmp_path, server):
    state = original.state_dict('resnet18', whitened=True, p=1.7)
    state.update({k: state[k][:10] for k in ('classifier.weight', 'classifier.bias')})
    url = server.add('any/checkpoint_0.pth', write(tmp_path / 'w', {'model_state': state}, zipped=True).read_bytes())
    model, _ = convert(url, tmp_path / 'model')
    assert model.whitened and model.num_classes == 10 and model.embed_dim == 513
    assert model.gem_p == torch.tensor(1.7).item() and torch.equal(model.head.fc.weight, state['classifier.weight'])
    assert not (tmp_path / 'torch').exists()  # another address may end in the same name: nothing is kept of it
    with refused(FileNotFoundError, f'{url}.none could not be downloaded', 'HTTP Error 404', 'and give the file.'):
        open_model(f'{url}.none')
    state['classifier.bias'] = torch.full((10,), np.nan)
    bad = server.add('nan.pth', write(tmp_path / 'w', state).read_bytes())
    with refused(ValueError, f"{bad}: ", "'head.fc.bias' in the checkpoint holds NaN"):
        open_model(bad)


def test_sscd(tmp_path):
    """A ResNet of torchvision, GeM, a linear layer, L2; in the files all below `backbone`."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=512).eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(('running_mean', 'fc.bias')):
                value.normal_()
    torch.save({f'backbone.{k}': v for k, v in network.state_dict().items()}, tmp_path / 'sscd.torchvision.pt')
    x = torch.randn(2, 3, 96, 64)
    body = torch.nn.Sequential(*list(network.children())[:-2])
    assert main(['convert', str(tmp_path / 'sscd.torchvision.pt'), '-o', str(tmp_path / 'sscd')]) == 0
    with torch.no_grad():
        pooled = body(x).flatten(2).clamp(min=1e-6).pow(3).mean(2).pow(1 / 3)
        expected = torch.nn.functional.normalize(network.fc(pooled))
        for source in (tmp_path / 'sscd.torchvision.pt', tmp_path / 'sscd'):
            opened = open_model(source)
            torch.testing.assert_close(opened.embed(x), expected, rtol=1e-5, atol=1e-6)
    cfg = opened.pretrained_cfg
    assert (opened.num_classes, opened.gem_p, cfg['input_size'], cfg['crop_pct']) == (0, 3, (3, 288, 288), 1)
    network.fc = torch.nn.Linear(512, 10)
    torch.save({f'backbone.{k}': v for k, v in network.state_dict().items()}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='matches none of'):
        open_model(tmp_path / 'other.pt')


def test_model_by_name(tmp_path, capsys):
    path = write(tmp_path / 'w.pth', timm.create_model('multigrain_efficientnet_b0', num_classes=3).state_dict())
    assert convert(path, tmp_path / 'model', '--model', 'multigrain_efficientnet_b0')[0].num_classes == 3
    with refused(ValueError, "'multigrain_resnet5' is not a registered model, did you mean multigrain_resnet50"):
        open_model(path, architecture='multigrain_resnet5')
    with refused(ValueError, f'{path}: it does not fit multigrain_resnet18: '):
        open_model(path, architecture='multigrain_resnet18')
    capsys.readouterr()
    assert main(['convert', 'nowhere/x.pth', '-o', str(tmp_path / 'other')]) == 2
    error = capsys.readouterr().err
    assert 'nowhere/x.pth is neither a folder, nor a file, nor a model of timm' in error and error.count('\n') == 1
    assert not (tmp_path / 'other').exists()


# --- names, poolings


def test_pooling_and_exponent(folder, tmp_path):
    for pool, kind, p in (('gem', 'gem', 3), ('avg', 'gem', 1), ('max', 'gem', float('inf')), ('gem4', 'gem', 4),
                          ('rmac', 'rmac', None)):
        model = open_model(folder, pool=pool)
        assert (model.global_pool, model.gem_p) == (kind, p)
        assert torch.equal(model.head.fc.weight, tiny_model().head.fc.weight)
    again = open_model(save_pretrained(model, tmp_path / 'rmac'))
    assert again.global_pool == 'rmac' and weights_sha256(again) == weights_sha256(model)
    assert open_model(folder, p=4.5).gem_p == 4.5
    whitened = save_pretrained(tiny_model(whitening=9), tmp_path / 'whitened')
    assert open_model(whitened, pool='gem', p=3).whitened
    with pytest.warns(UserWarning, match=r'whitened for p = 3\.0, not for 4'):
        open_model(whitened, p=4)
    for name, kwargs, message in (
            (folder, dict(pool='mac', p=2), 'no exponent to set'), (folder, dict(p=-1), 'p > 0'),
            (folder, dict(pool='sum'), 'Unknown global_pool'), (folder, dict(pool=''), 'gives a map'),
            (folder, dict(pretrained=False), 'holds weights'),
            (whitened, dict(pool='mac'), 'whitened for its own pooling')):
        with pytest.raises(ValueError, match=message):
            open_model(name, **kwargs)


def test_bad_names(tmp_path):
    (tmp_path / 'x.pth').write_bytes(b'nothing')
    for name, error, message in (
            ('resnet9000', FileNotFoundError, 'resnet9000 is neither a folder'),
            ('multigrain_resnet18', ValueError, 'names no pretrained weights: give resnet18, or a folder'),
            ('multigrain_resnet50.x', ValueError, r'names no .* weights: give multigrain_resnet50\.fb_.*, or a folder'),
            ('resnet50.x', ValueError, r'names no .* weights: give resnet50\.\w+, .*, or a folder'),
            ('vovnet39a', ValueError, 'names no pretrained weights: give a folder'),
            (tmp_path / 'x.pth', UnreadableWeightsError, 'cannot be read as weights'),
            (tmp_path, FileNotFoundError, r'has no config\.json')):
        with pytest.raises(error, match=message):
            open_model(name)


def test_weights_sha256():
    model, other = tiny_model(), tiny_model()
    assert weights_sha256(model) == weights_sha256(other)
    other.head.fc.bias.data[0] += 1e-6
    for another in (other, tiny_model(1), tiny_model(gem_p=4), tiny_model(global_pool='mac')):
        assert weights_sha256(model) != weights_sha256(another)


def test_weights_that_are_not_here_and_cannot_be_fetched(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError(-2, 'Name or service not known')

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('urllib.request.getproxies', dict)
    monkeypatch.setattr('socket.create_connection', refuse)
    monkeypatch.setattr('timm.create_model', lambda *args, **kwargs: pytest.fail('it was tried'))
    for name in ('resnet18.a1_in1k', 'hf-hub:timm/resnet18.a1_in1k'):
        with pytest.raises(RuntimeError, match=f'weights of {name} are not on this computer.*service not known'):
            open_model(name)
