"""Publishing and loading over HTTP, against a Hub on loopback: every model comes back bit by bit."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from safetensors.torch import load

import timm_multigrain
from timm_multigrain.hub import publish, save_pretrained

from .hub_server import environment
from .tiny import figure, image_for, tiny_model

FILES = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}


@pytest.mark.parametrize('kwargs', [
    dict(gem_p=math.inf), dict(per_channel_p=True, learn_p=True, num_classes=7),
    dict(in_chans=5, whitening=97, num_classes=0), dict(global_pool='rmac')])
@torch.inference_mode()
def test_a_published_model_comes_back_bit_by_bit(hub, kwargs):
    model = tiny_model(**kwargs)
    done = publish(model, 'me/model', license='mit')
    loaded = timm.create_model('hf-hub:me/model', pretrained=True).eval()
    x = image_for(model)
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.embed(x), model.embed(x))
    assert loaded.gem_p == model.gem_p and loaded.whitened == model.whitened
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in loaded.state_dict().items())
    files = hub.repos['me/model'].files()
    assert set(files) == FILES
    assert done.url == f'{hub.endpoint}/me/model' and done.commit == hub.repos['me/model'].refs['main']
    assert done.commit in str(done) and 'mit' in str(done)
    config = json.loads(files['config.json'], parse_constant=pytest.fail)
    assert config['model_args']['trunk'] == 'test_resnet' and config['pretrained_cfg']['license'] == 'mit'


@torch.inference_mode()
def test_a_model_made_by_its_class_comes_back(hub):
    model = timm_multigrain.MultiGrain('test_convnext', num_classes=4, gem_p=2, whitening=20).train()
    publish(model, 'model', license='mit', label_names=list('abcd'))  # a name without owner is one's own
    assert model.training
    loaded = timm.create_model('hf-hub:me/model', pretrained=True).eval()
    assert torch.equal(loaded(image_for(model)), model.eval()(image_for(model)))
    assert loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c', 'd']


@pytest.mark.slow
def test_other_processes_publish_and_load(hub, tmp_path):
    path = save_pretrained(tiny_model(gem_p=3.25), tmp_path / 'model')
    env = environment(hub, tmp_path / 'other')
    command = [sys.executable, '-m', 'timm_multigrain', 'publish', str(path), 'lab/model', '--license', 'cc-by-4.0']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'Published {hub.endpoint}/lab/model' in done.stdout and 'cc-by-4.0' in done.stdout
    snippet = re.search(r'```python\n(.*?)```', hub.repos['lab/model'].files()['README.md'].decode(), re.DOTALL)[1]
    assert snippet.startswith('import timm_multigrain')
    check = '\nprint(model.gem_p, tuple(logits.shape), tuple(descriptor.shape), float(descriptor.norm()))'
    done = subprocess.run([sys.executable, '-c', snippet + check], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    p, *shapes, norm = done.stdout.split(maxsplit=5)
    assert (p, ' '.join(shapes)) == ('3.25', '(1, 3) (1, 96)') and abs(float(norm) - 1) < 1e-5


def test_checks_come_before_the_repository(hub, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError('not the same outputs')
    with monkeypatch.context() as patch:
        patch.setattr('timm_multigrain.models.save._check_saved', fails)
        with pytest.raises(RuntimeError, match='not the same outputs'):
            publish(tiny_model(), 'me/model', license='mit')
    for model, error in (
            (timm.create_model('test_resnet'), 'ResNet is not a MultiGrain: .*push_to_hf_hub'),
            (_with_nan(tiny_model()), 'head.fc.weight of the model holds NaN')):
        with pytest.raises(ValueError, match=error):
            publish(model, 'me/model', license='mit')
    with pytest.raises(ValueError, match=r'license of the weights is not known: give it \(--license\)'):
        publish(tiny_model(), 'me/model')
    with pytest.raises(ValueError, match='figure 1 lacks dataset'):
        publish(tiny_model(), 'me/model', license='mit', metrics=[{'task': 'classification'}])
    with pytest.raises(ValueError, match="license 'other' needs its name"):
        publish(tiny_model(), 'me/model', license='other')
    assert not hub.repos and ('POST', '/api/repos/create') not in hub.requests


def _with_nan(model):
    with torch.no_grad():
        model.head.fc.weight[1, 2] = math.nan
    return model


def test_license(hub):
    official = tiny_model()
    official.pretrained_cfg.update(license='cc-by-nc-4.0', tag='fb_p3_l05_in1k', notes=['theirs'])
    done = publish(official, 'me/official', dry_run=hub_dir(hub, 'official'))
    assert done.license == 'cc-by-nc-4.0' and 'the one that the configuration of the model names' in str(done)
    done = publish(official, 'me/own', license='mit', dry_run=hub_dir(hub, 'own'))
    assert done.license == 'mit' and not done.notes
    cfg = timm.create_model(f'local-dir:{done.directory}').pretrained_cfg  # nothing of the official weights in it
    assert cfg['license'] == 'mit' and not {'tag', 'notes', 'description'} & set(cfg)
    model = tiny_model()
    assert publish(model, 'me/model', license='cc-by-4.0').license == 'cc-by-4.0'
    assert publish(model, 'me/model').license == 'cc-by-4.0'  # the card on the Hub is ours and says so
    loaded = timm.create_model('hf-hub:me/model', pretrained=True)
    assert loaded.pretrained_cfg['license'] == 'cc-by-4.0'
    assert publish(loaded, 'me/model', license='mit').license == 'mit'
    with pytest.raises(ValueError, match=r'card says mit and the configuration of the model cc-by-4\.0'):
        publish(loaded, 'me/model')
    # what timm's own upload writes unasked is nobody's decision
    hub.add_repo('me/timm', {'README.md': b'---\nlicense: apache-2.0\n---\n# by timm'})
    with pytest.raises(ValueError, match='license of the weights is not known'):
        publish(model, 'me/timm')
    publish(model, 'me/other', license='other', license_name='house rules', license_link='https://example.org/rules')
    publish(model, 'me/other')
    card = hub.repos['me/other'].files()['README.md'].decode()
    assert 'license_name: house rules' in card and '[house rules](https://example.org/rules)' in card


def hub_dir(hub, name):
    """A folder beside the cache of the server's client."""
    from huggingface_hub import constants
    return Path(constants.HF_HUB_CACHE).parent / name


def test_second_publication(hub):
    publish(tiny_model(0), 'me/model', license='mit')
    repo = hub.repos['me/model']
    uploads = [r for r in hub.requests if r[0] == 'PUT']
    first = repo.refs['main']
    assert publish(tiny_model(0), 'me/model').commit == first  # nothing new, no commit
    done = publish(tiny_model(1), 'me/model')
    assert done.commit == repo.refs['main'] != first and len(repo.commits) == 3
    assert len([r for r in hub.requests if r[0] == 'PUT']) == len(uploads) + 1
    assert torch.equal(load(repo.files()['model.safetensors'])['head.fc.weight'], tiny_model(1).head.fc.weight)


@pytest.mark.parametrize('files, error', [
    ({'config.json': b'{"architecture": "resnet50"}', 'model.safetensors': b'x'}, 'holds resnet50, not a MultiGrain'),
    ({'config.json': b'{"model_type": "bert"}'}, 'holds another model, not a MultiGrain'),
    ({'config.json': b'[' * 100_000}, 'holds another model, not a MultiGrain'),
    ({'model.onnx': b'x'}, 'holds model.onnx, not a MultiGrain'),
])
def test_a_repository_of_other_content_is_refused(hub, files, error):
    repo = hub.add_repo('me/model', files)
    with pytest.raises(ValueError, match=f'me/model {error}.*: name another repository'):
        publish(tiny_model(), 'me/model', license='mit')
    assert len(repo.commits) == 1 and not hub.objects


def test_revision_private_and_pull_request(hub):
    with pytest.raises(FileNotFoundError, match='me/model was not found, so no pull request can be opened'):
        publish(tiny_model(), 'me/model', license='mit', create_pr=True)
    assert not hub.repos
    done = publish(tiny_model(0), 'me/model', license='mit', private=True)
    repo = hub.repos['me/model']
    assert repo.private
    before = repo.refs['main']
    done = publish(tiny_model(1), 'me/model', revision='tuned')
    assert repo.refs['main'] == before and done.commit == repo.refs['tuned'] and done.url.endswith('/tree/tuned')
    loaded = timm.create_model('hf-hub:me/model@tuned', pretrained=True)
    assert torch.equal(loaded.head.fc.weight, tiny_model(1).head.fc.weight) and 'hf-hub:me/model@tuned' in str(done)
    done = publish(tiny_model(2), 'me/model', create_pr=True)
    assert repo.refs['main'] == before and done.commit == repo.refs['refs/pr/1']
    assert done.url == f'{hub.endpoint}/me/model/discussions/1'
    publish(tiny_model(), 'me/public', license='mit')
    with pytest.raises(ValueError, match='me/public exists and is public, but private was asked for'):
        publish(tiny_model(), 'me/public', private=True)


def test_a_client_of_ones_own(hub, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(RuntimeError, match='a token was not found: log in with `hf auth login`'):
        publish(tiny_model(), 'you/model', license='mit')
    api = HfApi(endpoint=hub.endpoint, token='you-write')
    assert publish(tiny_model(), 'you/model', license='mit', api=api).repo_id == 'you/model'


def test_dry_run(hub, tmp_path):
    done = publish(tiny_model(), 'me/model', license='mit', dry_run=tmp_path / 'out', metrics=[figure(12.5)])
    assert not hub.requests and done.url is None and done.commit is None
    assert {p.name for p in (tmp_path / 'out').iterdir()} == FILES - {'.gitattributes'}
    assert str(tmp_path / 'out') in str(done)
    x = image_for(tiny_model())
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert torch.equal(loaded(x), tiny_model()(x))
    card = tmp_path / 'out' / 'README.md'
    card.write_text(card.read_text() + '\nMine.\n')
    publish(tiny_model(), 'me/model', dry_run=tmp_path / 'out')
    assert card.read_text().endswith('\nMine.\n') and 'value: 12.5' in card.read_text()
    publish(tiny_model(1), 'me/model', dry_run=tmp_path / 'out')  # other weights: the figure is not theirs
    assert card.read_text().endswith('\nMine.\n') and '12.5' not in card.read_text()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'photo.jpg').write_bytes(b'x')
    with pytest.raises(FileExistsError, match='is not a saved model'):
        publish(tiny_model(), 'me/model', license='mit', dry_run=tmp_path / 'mine')
