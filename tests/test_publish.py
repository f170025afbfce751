"""Publishing and loading over HTTP, a Hub on loopback: models come back bit by bit, faults leave nothing behind."""
import json
import math

import pytest
import timm
import torch
from huggingface_hub import HfApi

from timm_multigrain.cli.main import main
from timm_multigrain.hub import publish, save_pretrained

from .hub_server import Fault
from .test_models_open import train_checkpoint
from .tiny import figure, image_for, tiny_model

FILES = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}


@pytest.mark.parametrize('kwargs', [
    dict(per_channel_p=True, learn_p=True, num_classes=7), dict(in_chans=5, whitening=97, num_classes=0)])
@torch.inference_mode()
def test_a_published_model_comes_back_bit_by_bit(hub, kwargs):
    model = tiny_model(**kwargs)
    done = publish(model, 'me/model', license='mit')
    loaded = timm.create_model('hf-hub:me/model', pretrained=True).eval()
    x, own = image_for(model), model.state_dict()
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.embed(x), model.embed(x))
    assert loaded.gem_p == model.gem_p and loaded.whitened == model.whitened
    assert all(torch.equal(own[name], value) for name, value in loaded.state_dict().items())
    files = hub.repos['me/model'].files()
    assert set(files) == FILES
    assert done.url == f'{hub.endpoint}/me/model' and done.commit == hub.repos['me/model'].refs['main']
    assert done.commit in str(done) and 'mit' in str(done)
    config = json.loads(files['config.json'], parse_constant=pytest.fail)
    assert config['model_args']['trunk'] == 'test_resnet' and config['pretrained_cfg']['license'] == 'mit'


def test_checks_come_before_the_repository(hub, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError('not the same outputs')
    with monkeypatch.context() as patch:
        patch.setattr('timm_multigrain.models.save._load_back', fails)
        with pytest.raises(RuntimeError, match='not the same outputs'):
            publish(tiny_model(), 'me/model', license='mit')
    for model, error in (
            (timm.create_model('test_resnet'), 'ResNet is not a MultiGrain: .*push_to_hf_hub'),
            (_with_nan(tiny_model()), 'head.fc.weight of the model holds NaN')):
        with pytest.raises(ValueError, match=error):
            publish(model, 'me/model', license='mit')
    with pytest.raises(ValueError, match=r'license of the weights is not known: give it \(--license\)'):
        publish(tiny_model(), 'me/model')
    with pytest.raises(ValueError, match=r'figures\[0\] lacks dataset'):
        publish(tiny_model(), 'me/model', license='mit', metrics=[{'task': 'classification'}])
    with pytest.raises(ValueError, match="license 'other' needs its name"):
        publish(tiny_model(), 'me/model', license='other')
    assert not hub.repos and ('POST', '/api/repos/create') not in hub.requests


def _with_nan(model):
    with torch.no_grad():
        model.head.fc.weight[1, 2] = math.nan
    return model


def test_license(hub, tmp_path):
    official = tiny_model()
    official.pretrained_cfg.update(license='cc-by-nc-4.0', tag='fb_p3_l05_in1k', notes=['theirs'])
    done = publish(official, 'me/official', dry_run=tmp_path / 'official')
    assert done.license == 'cc-by-nc-4.0' and 'the one that the configuration of the model names' in str(done)
    done = publish(official, 'me/own', license='mit', dry_run=tmp_path / 'own')
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


def test_dry_run(hub, tmp_path):
    done = publish(tiny_model(), 'me/model', license='mit', dry_run=tmp_path / 'out', metrics=[figure(12.5)])
    assert not hub.requests and done.url is None and done.commit is None
    assert {p.name for p in (tmp_path / 'out').iterdir()} == FILES - {'.gitattributes'}
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


# --- the command


@torch.inference_mode()
def test_checkpoints_of_train(hub, tmp_path, capsys):
    model, ema = tiny_model(0, gem_p=2), tiny_model(1, gem_p=2)
    kwargs = {'trunk': 'test_resnet', 'gem_p': 2, 'mg_repeats': 3, 'pretrained_trunk': True}
    path = str(train_checkpoint(tmp_path / 'last.pth.tar', model, ema=ema, img_size=96, crop_pct=0.9,
                                model_kwargs=kwargs))
    assert main(['publish', path, 'me/ema', '--license', 'mit']) == 0
    assert f'Publishing {path}' in capsys.readouterr().out
    assert main(['publish', path, 'me/model', '--license', 'mit', '--no-ema']) == 0
    for name, expected in (('me/model', model), ('me/ema', ema)):
        loaded = timm.create_model(f'hf-hub:{name}', pretrained=True).eval()
        assert torch.equal(loaded(image_for(model)), expected(image_for(model))) and loaded.gem_p == 2
        cfg = loaded.pretrained_cfg
        assert (loaded.num_classes, cfg['input_size'], cfg['crop_pct']) == (3, (3, 96, 96), 0.9)
    assert '3 x 96 x 96' in hub.repos['me/model'].files()['README.md'].decode()


def test_license_of_checkpoints(hub, tmp_path, capsys):
    small, large = (timm.create_model(f'multigrain_resnet{depth}', num_classes=2) for depth in (18, 50))
    # from scratch, also under the name that has official weights, and tuned from these
    for model, name in ((small, 'multigrain_resnet18'), (large, 'multigrain_resnet50')):
        assert main(['publish', str(train_checkpoint(tmp_path / 'a.pth.tar', model, name)), 'me/a']) == 2
        assert 'license of the weights is not known' in capsys.readouterr().err and not hub.repos
    tuned = train_checkpoint(tmp_path / 'c.pth.tar', large, 'multigrain_resnet50', pretrained=True)
    assert main(['publish', str(tuned), 'me/c', '--dry-run', str(tmp_path / 'c')]) == 0
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
    for text in ('Trained on my holiday pictures.', 'language: en', 'Boats and cars.', '| classes | 3: a, b, c |',
                 '| classification | ImageNet-1k | top1 | 71.5 | 224 | 3 |'):
        assert text in card
    assert hub.repos['me/model'].private
    cfg = timm.create_model('hf-hub:me/model', pretrained=True).pretrained_cfg
    assert (cfg['label_names'], cfg['description']) == (['a', 'b', 'c'], 'Boats and cars.')


# --- faults


@pytest.mark.parametrize('fault, error, created', [
    (Fault('POST', 'create', 402, 'pay'), '402 Payment Required', False),
    (Fault('POST', 'create', cut='answer'), 'me/model could not be created: the connection to .* failed', True),
    (Fault('POST', 'preupload', 404), 'me/model could not be uploaded: .*404 Not Found', True),
    (Fault('POST', 'commit', cut='request'), 'me/model could not be uploaded: the connection to .* failed', True),
])
def test_faults_leave_no_repository_behind(hub, tmp_path, fault, error, created, monkeypatch):
    scratch = tmp_path / 'tmp'
    scratch.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(scratch))
    hub.faults.append(fault)
    with pytest.raises((RuntimeError, FileNotFoundError), match=error) as caught:
        publish(tiny_model(), 'me/model', license='mit')
    assert '\n' not in str(caught.value) and not hub.repos and not list(scratch.iterdir())
    assert ('The repository that was created for it was deleted again.' in str(caught.value)) == created
    assert (('DELETE', '/api/repos/delete') in hub.requests) == created
    hub.faults.clear()
    assert publish(tiny_model(), 'me/model', license='mit').commit == hub.repos['me/model'].refs['main']


def test_a_repository_made_by_another_meanwhile_is_left(hub, monkeypatch):
    create_repo = HfApi.create_repo

    def late(api, repo_id, **kwargs):
        hub.add_repo(repo_id)
        return create_repo(api, repo_id, **kwargs)
    monkeypatch.setattr(HfApi, 'create_repo', late)
    with pytest.raises(RuntimeError, match=r'could not be created: .*409 Conflict.* already created'):
        publish(tiny_model(), 'me/model', license='mit')
    assert set(hub.repos) == {'me/model'}


def test_a_commit_whose_answer_is_lost(hub):
    hub.faults.append(Fault('POST', '/commit/', cut='answer', times=1))
    with pytest.raises(RuntimeError, match=f'{hub.endpoint}/me/model holds files and is left as it is'):
        publish(tiny_model(), 'me/model', license='mit')
    commit = hub.repos['me/model'].refs['main']
    assert publish(tiny_model(), 'me/model').commit == commit  # it was there already


def test_a_repository_that_cannot_be_deleted_is_named(hub):
    hub.faults += [Fault('PUT', 'objects', 503), Fault('DELETE', 'repos', 403)]
    with pytest.raises(RuntimeError, match=f'{hub.endpoint}/me/model may be left there, empty .*delete it'):
        publish(tiny_model(), 'me/model', license='mit')


def test_an_interrupted_upload_leaves_no_repository(hub, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(HfApi, 'create_commit', interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(tiny_model(), 'me/model', license='mit')
    assert not hub.repos and ('DELETE', '/api/repos/delete') in hub.requests


def test_someone_commits_meanwhile(hub, monkeypatch):
    publish(tiny_model(0), 'me/model', license='mit')
    repo = hub.repos['me/model']
    create_commit = HfApi.create_commit

    def late(*args, **kwargs):
        repo.commit('main', {**repo.commits[repo.refs['main']], 'README.md': (b'edited', False)})
        return create_commit(*args, **kwargs)
    monkeypatch.setattr(HfApi, 'create_commit', late)
    with pytest.raises(RuntimeError, match='A commit has happened since'):
        publish(tiny_model(1), 'me/model')
    assert repo.files()['README.md'] == b'edited'


@pytest.mark.parametrize('name, error', [
    ('me/a--b', 'Cannot have -- or'), ('a/b/c', 'in the form')])
def test_impossible_names(hub, name, error, tmp_path):
    for more in ({}, {'dry_run': tmp_path / 'dry'}):
        with pytest.raises(ValueError, match=f'{name} cannot be published: .*{error}'):
            publish(tiny_model(), name, license='mit', **more)
    assert not hub.requests and not (tmp_path / 'dry').exists()


def test_tokens_and_rights(hub, monkeypatch):
    for token, message in (('me-write', "You don't have the rights"), ('you-read', '403 Forbidden.*permissions'),
                           ('nobody-write', 'cannot be published: Invalid user token'),
                           ('', 'Token is required.*hf auth login')):
        monkeypatch.setenv('HF_TOKEN', token)
        with pytest.raises(RuntimeError, match=message):
            publish(tiny_model(), 'you/model', license='mit')
    assert not hub.repos
    api = HfApi(endpoint=hub.endpoint, token='you-write')
    assert publish(tiny_model(), 'you/model', license='mit', api=api).repo_id == 'you/model'


def test_unreachable_and_offline(hub, monkeypatch, tmp_path, capsys):
    path = save_pretrained(tiny_model(), tmp_path / 'model')
    hub.shutdown()
    hub.server_close()
    assert main(['publish', str(path), 'me/model', '--license', 'mit']) == 2
    message = capsys.readouterr().err
    assert f'me/model cannot be published: the connection to {hub.endpoint} failed' in message
    assert 'check the network' in message
    assert message.count('\n') == 1
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match=r'offline mode is enabled.*unset .*HF_HUB_OFFLINE'):
        publish(tiny_model(), 'me/model', license='mit')
