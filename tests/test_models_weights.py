"""Weights of every origin: the original's reference numbers, names, sources, and files that cannot be used."""
import json
import math
import random
import re
from pathlib import Path
from types import MappingProxyType

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save
from timm.models import get_pretrained_cfg

from timm_multigrain import checkpoint_filter_fn, l2_normalize, publish
from timm_multigrain.models.weights import (
    UnreadableWeightsError,
    load_starting_weights,
    model_state,
    read_checkpoint,
    recognize_model,
)

from . import original
from .hub_server import Fault
from .original import close, container, refused, write
from .tiny import tiny_model

NAME = 'multigrain_resnet18'
BY_HAND = 'give the file: pretrained_cfg_overlay=dict(file=PATH)'


@pytest.fixture(scope='module')
def reference(golden):
    return load_file(golden / 'forward.safetensors')


def load(name=NAME, overlay=MappingProxyType({}), **kwargs):
    """A model whose weights come from `url`, `file`, `state_dict` or `hf_hub_id`."""
    source = {key: kwargs.pop(key) for key in ('url', 'file', 'state_dict', 'hf_hub_id') if key in kwargs}
    source = {key: value if isinstance(value, dict) else str(value) for key, value in source.items()}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={**source, **overlay}, **kwargs).eval()


# --- the original's reference numbers


@pytest.fixture(scope='module', params=['resnet18', 'resnet50', pytest.param('senet154', marks=pytest.mark.slow)])
def network(request):
    return request.param, load(f'multigrain_{request.param}', state_dict=original.state_dict(request.param))


@torch.inference_mode()
def test_forward(network, reference):
    network, model = network
    compared = 0
    for height, width, batch in [(96, 96, 2), (64, 128, 2), (224, 160, 1), (97, 131, 1), (96, 128, 1)]:
        key = f'{network}.{height}x{width}.p3.0.'
        if key + 'logits' not in reference:
            continue
        compared += 1
        x = original.image(height, width, batch)
        features = model.forward_features(x)
        close(model.forward_head(features, pre_logits=True), reference[key + 'embedding'])
        close(model(x), reference[key + 'logits'])
        if key + 'normalized' in reference:
            close(model.embed(x), reference[key + 'normalized'])
        if f'{network}.{height}x{width}.features' in reference:
            close(features[:1], reference[f'{network}.{height}x{width}.features'])
    assert compared >= 2
    if network != 'senet154':
        images = [original.image(96, 96, 2)[0], original.image(64, 128, 2)[1]]
        close(model.embed(images), l2_normalize(reference[f'{network}.list.embedding']))


def test_rebuilt_inputs_are_the_reference_ones(shared_golden):
    for name, expected in load_file(shared_golden / 'forward_inputs.safetensors').items():
        height, width = map(int, name.removeprefix('input.').split('x'))
        torch.testing.assert_close(original.image(height, width, len(expected)), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize('p', [1.0, 1.7, math.inf])
@torch.inference_mode()
def test_exponent_of_the_checkpoint(reference, p):
    stored = torch.nn.Parameter(torch.tensor(p)) if p > 3 else torch.tensor(p)
    model = load('multigrain_resnet50', state_dict={**original.state_dict('resnet50'), 'pool.p': stored})
    x = original.image(96, 96, 2)
    assert model.gem_p == torch.tensor(p).item()
    close(model(x), reference[f'resnet50.96x96.p{p}.logits'])
    close(model.forward_head(model.forward_features(x), pre_logits=True), reference[f'resnet50.96x96.p{p}.embedding'])


@torch.inference_mode()
def test_whitened(reference):
    for network in ('resnet18', 'resnet50'):
        model = load(f'multigrain_{network}', state_dict=original.state_dict(network, whitened=True, p=1.7))
        x, embedding = original.image(96, 96, 2), reference[f'{network}.whitened.embedding']
        close(model.forward_head(model.forward_features(x), pre_logits=True), embedding)
        close(model(x), reference[f'{network}.whitened.logits'])
        close(model.embed(x, dim=64), l2_normalize(embedding[:, :64]))
        assert model.whitened and model.head_hidden_size == model.embed_dim == embedding.shape[1]


def test_cross_entropy_and_its_gradient_with_respect_to_p(reference):
    model = load(state_dict=original.state_dict('resnet18'), learn_p=True)
    loss = torch.nn.functional.cross_entropy(model(original.image(96, 96, 2)), torch.tensor([3, 700]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), reference['resnet18.cross_entropy_p3.0'], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        model.head.pool.p.grad, reference['resnet18.cross_entropy_grad_p'].reshape(1), rtol=1e-3, atol=1e-6)


# --- names, prefixes, exponents, classes


def test_prefixes_and_containers():
    trunk = timm.create_model('resnet10t', num_classes=7)
    model, ours = (timm.create_model('multigrain', trunk='resnet10t', num_classes=7, gem_p=2) for _ in range(2))
    for prefix in ('', 'module.', '_orig_mod.', 'module._orig_mod.module.'):
        for source in (trunk, ours):
            model.load_state_dict({f'{prefix}{k}': v for k, v in source.state_dict().items()})
            inner = source.trunk if source is ours else source
            assert torch.equal(model.trunk.layer2[0].conv1.weight, inner.layer2[0].conv1.weight)
            assert torch.equal(model.head.fc.weight, source.get_classifier().weight) and model.gem_p == 2
    state = original.state_dict('resnet18')
    plain = checkpoint_filter_fn(state, timm.create_model(NAME))
    for checkpoint in (
            container(state), {f'module.{k}': v for k, v in state.items()},
            {k.replace('features.', 'features.module.'): v for k, v in state.items()}):
        converted = checkpoint_filter_fn(checkpoint, timm.create_model(NAME))
        assert converted.keys() == plain.keys() and all(torch.equal(v, plain[k]) for k, v in converted.items())
    averaged = {'state_dict': {'a': torch.zeros(1)}, 'state_dict_ema': {'module.a': torch.ones(1)}}
    assert (model_state(averaged)['a'], model_state(averaged, ema=False)['a']) == (1, 0)


def test_files_of_the_original_saver(golden):
    for name in ('joint', 'whitened'):  # written by torch 1.0: an 8-channel toy network
        checkpoint = read_checkpoint(golden / f'tiny_container_{name}.pth')
        assert set(checkpoint) == ({'model_state'} if name == 'whitened' else set(container({})))
        model = timm.create_model(NAME, num_classes=5)
        state = checkpoint_filter_fn(checkpoint, model)
        assert {k.split('.')[0] for k in state} == {'trunk', 'head'}
        assert model.whitened == ('head.whitening.proj' in state) == (name == 'whitened')


@torch.inference_mode()
def test_trunk_weights_of_timm(tmp_path):
    torch.manual_seed(0)
    trunk = timm.create_model('resnet18').eval()
    model, x = load(state_dict=trunk.state_dict(), gem_p=1), original.image(64, 64)
    torch.testing.assert_close(model(x), trunk(x))
    # DenseNet's names begin with features. and end in classifier.weight, as the original's do
    dense = timm.create_model('densenet121', num_classes=4)
    path = write(tmp_path / 'w.pth', dense.state_dict())
    model = timm.create_model('multigrain', trunk='densenet121', num_classes=4, checkpoint_path=path)
    assert torch.equal(model.trunk.features.conv0.weight, dense.features.conv0.weight)
    assert torch.equal(model.head.fc.weight, dense.classifier.weight)
    with pytest.raises(RuntimeError, match='size mismatch'):  # as timm's own models answer
        timm.create_model('multigrain', trunk='densenet121', num_classes=6, checkpoint_path=path)
    with pytest.raises(ValueError, match=r"neither a MultiGrain one nor weights of the trunk 'densenet121'"):
        model.load_state_dict({'blocks.0.weight': torch.zeros(1)})


def test_part_of_a_state_dict_loads_as_torch_does():
    model = timm.create_model('multigrain', trunk='resnet10t', num_classes=2)
    head = {'head.fc.bias': torch.tensor([3., 4.])}
    found = model.load_state_dict(head, strict=False)
    assert found == torch.nn.Module.load_state_dict(model, head, strict=False)
    assert 'head.fc.weight' in found.missing_keys and model.head.fc.bias.tolist() == [3, 4]
    found = model.load_state_dict({'trunk.bn1.bias': torch.ones(64), 'head.unknown': torch.ones(1)}, strict=False)
    assert found.unexpected_keys == ['head.unknown'] and model.trunk.bn1.bias.sum() == 64
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({'head.fc.bias': torch.zeros(2)})


def test_starting_weights_of_other_classes(caplog, tmp_path):
    """What train.py starts from may be of other classes; what validate.py tests may not."""
    caplog.set_level('INFO')
    kwargs = dict(trunk='resnet10t')
    sources = [timm.create_model('resnet10t', num_classes=9),
               timm.create_model('multigrain', num_classes=9, gem_p=2.5, **kwargs),
               timm.create_model('multigrain', num_classes=0, **kwargs)]
    for number, source in enumerate(sources):
        path = write(tmp_path / f'{number}.pth', source.state_dict())
        model = timm.create_model('multigrain', num_classes=4, **kwargs)
        fresh = model.head.fc.weight.clone()
        load_starting_weights(model, path)
        assert torch.equal(model.head.fc.weight, fresh)
        assert torch.equal(model.trunk.conv1[0].weight, (source.trunk if number else source).conv1[0].weight)
        assert f'{"no" if number == 2 else 9} classes, the model 4: its classifier starts anew' in caplog.text
        caplog.clear()
        if number < 2:
            with pytest.raises(RuntimeError, match=r'size mismatch for head\.fc\.weight'):
                timm.create_model('multigrain', num_classes=4, checkpoint_path=path, **kwargs)
            model = timm.create_model('multigrain', num_classes=9, **kwargs)
            load_starting_weights(model, path)  # of as many classes it is taken
            assert torch.equal(model.head.fc.weight, source.get_classifier().weight)
            assert 'anew' not in caplog.text and model.gem_p == (3, 2.5)[number]


def test_exponents_of_every_form():
    state = original.state_dict('resnet18')
    for p in (torch.tensor(2), torch.tensor([2.0])):
        assert load(state_dict={**state, 'pool.p': p}).gem_p == 2
    given = {**state, 'pool.p': torch.tensor(2.5)}
    assert load(state_dict=given, gem_p=4).gem_p == load(state_dict=given, global_pool='gem4').gem_p == 4
    learned = load(state_dict=given, gem_p=4, learn_p=True)
    assert learned.gem_p == 2.5 and isinstance(learned.head.pool.p, torch.nn.Parameter)
    assert load(state_dict=given, per_channel_p=True).gem_p == [2.5] * 512
    with pytest.raises(RuntimeError, match=r'head\.pool\.p: A learnable or per-channel p has to be finite'):
        load(state_dict={**state, 'pool.p': torch.tensor(math.inf)}, learn_p=True)
    each = timm.create_model(NAME, per_channel_p=True)
    each.head.pool.p.data.copy_(torch.linspace(1, 4, 512))
    assert load(state_dict=each.state_dict(), per_channel_p=True).gem_p == torch.linspace(1, 4, 512).tolist()
    with refused(ValueError, "'head.pool.p' is (512,) in them and (1,) in the model"):
        load(state_dict=each.state_dict())


@torch.inference_mode()
def test_other_classes_channels_and_maps(tmp_path, reference):
    path = write(tmp_path / 'checkpoint_120.pth', container(original.state_dict('resnet18')))
    x = original.image(96, 96, 2)
    grey = load(file=path, num_classes=7, in_chans=1)
    assert grey(x[:, :1]).shape == (2, 7)
    stem = original.state_dict('resnet18')['features.conv1.weight']
    torch.testing.assert_close(grey.trunk.conv1.weight, stem.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert load(file=path, features_only=True, out_indices=(3,))(x)[0].shape == (2, 256, 6, 6)
    for classes in (None, 5):  # what train.py does with --pretrained-path
        model = load(file=path, num_classes=classes, overlay=dict(num_classes=-1))
        assert model(x).shape == (2, classes or 1000) and model.pretrained_cfg['file'] == str(path)
        close(model.forward_head(model.forward_features(x), True), reference['resnet18.96x96.p3.0.embedding'])


@pytest.mark.slow
def test_every_network_is_recognized(shared_golden):
    for name in ('resnet18', 'resnet50', 'senet154', 'pnasnet5large'):
        state = {k: torch.empty(shape, device='meta') for k, shape in original.shapes(name).items()}
        assert recognize_model(model_state(container(state))) == f'multigrain_{name}'
    for name in ('resnet34', 'resnet101', 'resnet152'):
        with torch.device('meta'):
            trunk = timm.create_model(name)
        state = {f'features.{k}': v for k, v in trunk.state_dict().items() if not k.startswith('fc.')}
        state.update({'pool.p': torch.tensor(3.0), 'classifier.weight': trunk.fc.weight})
        assert recognize_model(model_state({f'module.{k}': v for k, v in state.items()})) == f'multigrain_{name}'
    keys = json.loads((shared_golden / 'checkpoint_keys_nasnetamobile.json').read_text())['without_whitening']
    state = {k: torch.empty(shape, device='meta') for k, (shape, _) in keys.items()}
    assert recognize_model(model_state(state)) == 'multigrain_nasnetamobile'
    with pytest.raises(ValueError, match=r'trunk of the checkpoint .* matches none of multigrain_resnet50'):
        recognize_model(timm.create_model('multigrain', trunk='resnet10t').state_dict())


# --- sources: tags, addresses, the Hub


def test_tags_of_the_official_weights():
    tags = [name for name in timm.list_models('multigrain*', pretrained=True) if get_pretrained_cfg(name).url]
    assert len(tags) == 8
    default = [name for name in tags if get_pretrained_cfg(name.split('.')[0]).tag == name.split('.')[1]]
    assert sorted(default) == [
        'multigrain_nasnetamobile.fb_p17_350_in1k', 'multigrain_pnasnet5large.fb_p17_500_in1k',
        'multigrain_resnet50.fb_p3_l05_aa_in1k', 'multigrain_senet154.fb_p16_400_in1k']
    for name in tags:
        cfg, arch = get_pretrained_cfg(name), name.split('.')[0]
        trunk = get_pretrained_cfg({'senet154': 'legacy_senet154'}.get(arch[11:], arch[11:]))
        size = re.search(r'p\d\d_(\d+)_', name)  # of the test that p was fine-tuned for
        folder = 'finetuned_models' if size else 'multigrain_models'
        assert re.fullmatch(rf'https://dl\.fbaipublicfiles\.com/multigrain/{folder}/\w+(-\w+)?(\.\d)?\.pth', cfg.url)
        assert cfg.test_input_size == (size and (3, int(size[1]), int(size[1])))
        assert (cfg.crop_pct, cfg.interpolation, cfg.classifier) == (224 / 256, 'bilinear', 'head.fc')
        assert (cfg.mean, cfg.std) == (((0.5,) * 3,) * 2 if 'nasnet' in arch else (
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert cfg.input_size == trunk.input_size and 'top-1' in cfg.description
        assert cfg.first_conv == f'trunk.{trunk.first_conv}' and cfg.paper_ids == 'arXiv:1902.05509'
    for name in [*timm.list_models('multigrain*'), *tags]:  # not free software
        assert get_pretrained_cfg(name).license == ('cc-by-nc-4.0' if get_pretrained_cfg(name).url else None)


@torch.inference_mode()
def test_by_address(server, tmp_path):
    model, x = timm.create_model(NAME, num_classes=3, gem_p=2.5).eval(), torch.randn(1, 3, 64, 64)
    wrapped = write(tmp_path / 'm', {'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}})
    files = {'model.safetensors': save(model.state_dict()), 'model_best.pth.tar': wrapped.read_bytes()}
    for name, content in files.items():
        url = server.add(f'any/{name}', content)
        for _ in range(2):  # from the server, then from the cache
            again = load(url=url, overlay=dict(num_classes=3))
            assert torch.equal(again(x), model(x)) and again.gem_p == 2.5 and again.pretrained_cfg['url'] == url
        assert (tmp_path / 'torch' / 'hub' / 'checkpoints' / name).exists()
        load(url=url, overlay=dict(num_classes=3), cache_dir=str(tmp_path / 'mine'))
        assert (tmp_path / 'mine' / name).exists()
    assert len(server.requests) == 4 and not {'file', 'state_dict'} & set(again.pretrained_cfg)


@torch.inference_mode()
def test_weights_from_the_hub(hub, tmp_path):
    model, x = timm.create_model(NAME, num_classes=3, gem_p=2.5).eval(), torch.randn(1, 3, 64, 64)
    config = {'architecture': NAME, 'num_classes': 3, 'model_args': {'trunk': 'resnet18'},
              'pretrained_cfg': {'input_size': [3, 224, 224], 'hf_hub_filename': 'pytorch_model.bin'}}
    hub.add_repo('me/safe', {'model.safetensors': save(model.state_dict())})
    hub.add_repo('me/pickled', {'pytorch_model.bin': write(tmp_path / 'p', model.state_dict()).read_bytes(),
                                'config.json': json.dumps(config).encode()})
    kwargs = dict(num_classes=3, overlay=dict(num_classes=3), cache_dir=str(tmp_path / 'cache'))
    for hub_id in ('me/safe', 'me/safe@main'):
        again = load(hf_hub_id=hub_id, **kwargs)
        assert torch.equal(again(x), model(x)) and again.pretrained_cfg['hf_hub_id'] == hub_id
    # a repository cannot choose for its users
    with refused(ValueError, 'me/pickled names pytorch_model.bin', "hf_hub_filename='pytorch_model.bin'"):
        timm.create_model('hf-hub:me/pickled', pretrained=True)
    assert not any(path.endswith('.bin') for _, path in hub.requests)
    chosen = load('hf-hub:me/pickled', overlay=dict(hf_hub_filename='pytorch_model.bin'))
    assert torch.equal(chosen(x), model(x)) and chosen.pretrained_cfg['source'] == 'hf-hub'
    for name, problem in (('me/nothing', '404'), ('me/pickled', '404'), ('me/safe@v9', '404'), ('me/a--b', ' -- ')):
        with refused((FileNotFoundError, ValueError), f'model.safetensors of {name} could not be downloaded', problem):
            load(hf_hub_id=name, **kwargs)


@pytest.mark.parametrize('links', [True, False])
def test_a_damaged_copy_of_the_hub_is_downloaded_again(hub, monkeypatch, links):
    if not links and not hasattr(constants, 'HF_HUB_DISABLE_SYMLINKS'):
        pytest.skip('this huggingface_hub always makes links here')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS', not links, raising=False)
    publish(tiny_model(), 'me/model', license='mit')
    content = hub.repos['me/model'].files()['model.safetensors']
    other = bytearray(content)
    other[-5] ^= 1  # still a safetensors file, with another number in it
    own = tiny_model().state_dict()
    timm.create_model('hf-hub:me/model', pretrained=True)
    path = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors'))
    for damaged in (bytes(other), content[:-7], b''):
        assert path.is_symlink() == links
        path.write_bytes(damaged)
        loaded = timm.create_model('hf-hub:me/model', pretrained=True).state_dict()
        assert all(torch.equal(own[name], value) for name, value in loaded.items()) and path.read_bytes() == content
    requests = len(hub.requests)
    timm.create_model('hf-hub:me/model', pretrained=True)
    assert not any(method == 'GET' for method, _ in hub.requests[requests:])  # from the cache
    path.write_bytes(other)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with refused(RuntimeError, 'could not be downloaded: ', 'offline mode is enabled'):
        timm.create_model('hf-hub:me/model', pretrained=True)


@pytest.mark.parametrize('fault, error', [
    (Fault('HEAD', 'model.safe', 503), '503 Service Unavailable'),
    (Fault('GET', 'model.safe', 403), '403 Forbidden'),
    (Fault('HEAD', 'model.safe', 401), '401 Unauthorized'),
    (Fault('GET', 'model.safe', cut='request'), 'the connection to http://127.0.0.1')])
def test_faults_of_the_hub(hub, fault, error):
    hub.add_repo('me/model', {'model.safetensors': b'damaged each time'})
    with refused(RuntimeError, 'model.safetensors of me/model cannot be read as weights'):
        load(hf_hub_id='me/model')
    hub.faults.append(fault)
    with refused(RuntimeError, 'model.safetensors of me/model could not be downloaded: ', error):
        load(hf_hub_id='me/model')


def test_addresses_that_cannot_be_used(server, tmp_path):
    missing = f'{server.add("page.pth", b"<!DOCTYPE html><html>Sign in")}.none'
    with refused(FileNotFoundError, f'{missing} could not be', 'HTTP Error 404', 'check the address', BY_HAND):
        load(url=missing)
    with refused(RuntimeError, 'HTTP Error 503', BY_HAND):
        load(url=server.add('busy.pth', status=503))
    with refused(RuntimeError, 'http://127.0.0.1:1/a.pth could', 'refused', 'the network', BY_HAND):
        load(url='http://127.0.0.1:1/a.pth')
    body = write(tmp_path / 'w', container(original.state_dict('resnet18'))).read_bytes()
    with refused(RuntimeError, f'cut after {len(body) // 2} of {len(body)} bytes', BY_HAND):
        load(url=server.add('cut.pth', body, cuts=1))
    # without a length that would show the cut: found when it is read, downloaded once more, and not kept
    server.add('cut.pth', body, cuts=2, announced=False)
    for path, cause in (('cut.pth', 'it is cut off'), ('page.pth', 'it is a web page')):
        url = missing.replace('page.pth.none', path)
        with refused(RuntimeError, f'{path} (from {url}) cannot be read as weights: {cause}', 'download it again'):
            load(url=url)
    assert not list((tmp_path / 'torch/hub/checkpoints').iterdir())
    assert load(url=url.replace('page', 'cut')).gem_p == 3  # nothing is left to break this one


# --- files


def test_cut_files_and_files_of_other_content(tmp_path):
    path = tmp_path / 'w.pth'
    with refused(FileNotFoundError, f'{path} does not exist: check the path'):
        load(file=path)
    with refused(RuntimeError, 'cannot be read as weights: [Errno 21] Is a directory'):
        load(file=tmp_path)
    for zipped in (False, True):
        whole = write(path, container(tiny_model().state_dict()), zipped).read_bytes()
        for length in (0, 1, 10, 200, 5_000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with refused(RuntimeError, f'{path} cannot be read as weights: ', '; save, copy or download it again.'):
                load(file=path)
            assert path.exists()  # only the cache is ours to clean
    for content, cause in (([1, 2], 'a list'), (torch.zeros(3), 'a Tensor'), ({}, 'a dict'),
                           ({'epoch': 3}, "only entries such as ['epoch']"), ({'model_state': None}, 'only entries')):
        with refused(ValueError, f'{path}: The checkpoint has no weights, {cause}'):
            load(file=write(path, content))
    garbage = tmp_path / 'g.safetensors'
    for body in (b'garbage' * 10, save({'a': torch.zeros(9)})[:-4], b''):
        garbage.write_bytes(body)
        with refused(RuntimeError, f'{garbage} cannot be read as weights: '):
            load(file=garbage)
    path.write_bytes(save({'a': torch.ones(9)}))  # safetensors under another name
    assert read_checkpoint(path)['a'].sum() == 9


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_damaged_bytes_give_one_sentence(tmp_path, golden):
    whole = (golden / 'tiny_container_joint.pth').read_bytes()
    path, refusals = tmp_path / 'w.pth', []
    for seed in range(200):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path, 'w.pth')
        except UnreadableWeightsError as e:
            refusals.append(str(e))
    assert len(refusals) > 50  # most of the rest differ in the value of a weight
    assert all(re.fullmatch(r'w\.pth cannot be read as weights: .+; save, copy or download .*\.', r) for r in refusals)
    assert not any('weights_only' in text for text in refusals)


def test_weights_of_another_network(tmp_path):
    path = write(tmp_path / 'w.pth', container(original.state_dict('resnet18')))
    for classes in (1000, 7):  # timm loads what fits where the classes differ
        with refused(ValueError, f'{path}: the weights are not those of resnet34: ',
                     "'trunk.layer1.2.conv1.weight' is missing in them", 'take the model that the weights are of'):
            load('multigrain_resnet34', file=path, num_classes=classes)
    write(path, timm.create_model('convnext_atto').state_dict())
    with refused(ValueError, f'{path}: The checkpoint is neither a MultiGrain one nor weights of', 'conv1.weight'):
        load(file=path)
    with refused(ValueError, "'surprise' does not belong"):
        load(state_dict={**original.state_dict('resnet18'), 'surprise': torch.zeros(1)})
    state = original.state_dict('resnet18')
    state['features.conv1.weight'] = state['features.conv1.weight'][:, :2]
    with pytest.raises(RuntimeError, match=r'trunk\.conv1 .*inconsistent with input_size'):  # timm's to say
        load(file=write(path, state))


def test_wrong_number_of_classes(tmp_path):
    state = original.state_dict('resnet18')
    state.update({k: state[k][:10] for k in ('classifier.weight', 'classifier.bias')})
    path = write(tmp_path / 'ten.pth', container(state))
    with refused(ValueError, f'{path}: ', "'head.fc.weight' is (10, 512) in them", 'num_classes=10 to take theirs'):
        load(file=path)
    assert torch.equal(load(file=path, overlay=dict(num_classes=10)).head.fc.weight, state['classifier.weight'])
    write(path, timm.create_model(NAME, num_classes=0).state_dict())
    with refused(ValueError, "'head.fc.weight' is missing in them", 'add num_classes=-1'):
        load(file=path)
    assert load(file=path, overlay=dict(num_classes=-1), num_classes=4).num_classes == 4


@pytest.mark.parametrize('key, value, message', [
    ('features.layer2.0.bn1.weight', math.nan, "'trunk.layer2.0.bn1.weight' in the checkpoint holds NaN or infinity"),
    ('classifier.bias', -math.inf, "'head.fc.bias' in the checkpoint holds NaN or infinity"),
    ('pool.p', math.nan, 'exponent p in the checkpoint is nan'),
    ('pool.p', 0.0, 'exponent p in the checkpoint is 0.0: only p > 0')])
def test_weights_that_are_not_finite(key, value, message):
    state = {k: v.clone() for k, v in original.state_dict('resnet18').items()}
    state[key].view(-1)[-1] = value
    with refused(ValueError, 'The given state_dict: ', message):
        load(state_dict=state)


def test_errors_of_the_model_are_not_said_to_be_the_files(golden):
    with pytest.raises(ValueError, match=r"^Unknown global_pool 'nothing'"):
        load(file=golden / 'tiny_container_joint.pth', global_pool='nothing')
    with pytest.raises(RuntimeError, match=r'^No pretrained weights exist for multigrain_resnet18'):
        timm.create_model(NAME, pretrained=True)
