"""Network, rights and disk that fail while a model is published: one sentence, and nothing half-done is left."""
import pytest
import timm
from huggingface_hub import HfApi

from timm_multigrain.cli.main import main
from timm_multigrain.hub import publish, save_pretrained

from .hub_server import Fault
from .tiny import tiny_model


@pytest.mark.parametrize('fault, error, created', [
    (Fault('GET', 'whoami', 401), r'cannot be published: the Hub does not accept the token \(401\): log in', False),
    (Fault('GET', 'api/models', 503), r'could not be looked up: the Hub has trouble \(503: out of order\)', False),
    (Fault('POST', 'validate-yaml', cut='request'), 'the card of me/model was not accepted: the connection to', False),
    (Fault('POST', 'create', 403, 'no rights'), r'could not be created: the token may not do that \(403: no r', False),
    (Fault('POST', 'create', 402, 'pay'), r'could not be created: the Hub refuses the request \(402: pay\)', False),
    (Fault('POST', 'create', cut='answer'), 'me/model could not be created: the connection to .* failed', True),
    (Fault('POST', 'create', corrupt=True), 'me/model could not be created: ', True),
    (Fault('POST', 'preupload', 404), r'model.safetensors could not be uploaded to me/model: there is no such', True),
    (Fault('POST', 'batch', 503), r'model.safetensors could not be uploaded .* the Hub has trouble \(503', True),
    (Fault('PUT', 'objects', 403), r'model.safetensors could not be uploaded .* the token may not do that', True),
    (Fault('PUT', 'objects', cut='request'), 'model.safetensors could not be uploaded to me/model: the conn', True),
    (Fault('POST', 'commit', 500), r'README.md could not be committed to me/model: the Hub has trouble \(500', True),
    (Fault('POST', 'commit', 401), r'could not be committed to me/model: the Hub does not accept the token', True),
    (Fault('POST', 'commit', cut='request'), 'could not be committed to me/model: the connection to .* failed', True),
])
def test_faults_leave_no_repository_behind(hub, tmp_path, fault, error, created, monkeypatch):
    scratch = tmp_path / 'tmp'
    scratch.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(scratch))
    hub.faults.append(fault)
    with pytest.raises((RuntimeError, FileNotFoundError, ValueError), match=error) as caught:
        publish(tiny_model(), 'me/model', license='mit')
    assert '\n' not in str(caught.value) and not hub.repos and not list(scratch.iterdir())
    assert ('The repository that was created for it was deleted again.' in str(caught.value)) == created
    assert (('DELETE', '/api/repos/delete') in hub.requests) == created
    hub.faults.clear()
    assert publish(tiny_model(), 'me/model', license='mit').commit == hub.repos['me/model'].refs['main']


def test_an_existing_repository_is_left_as_it_was(hub):
    publish(tiny_model(0), 'me/model', license='mit')
    before = hub.repos['me/model'].files()
    hub.faults.append(Fault('PUT', 'objects', cut='request'))
    with pytest.raises(RuntimeError, match=r'uploaded to me/model: the connection .* me/model is as it was'):
        publish(tiny_model(1), 'me/model')
    with pytest.raises(RuntimeError, match='The branch tuned that was created for it was deleted again'):
        publish(tiny_model(1), 'me/model', revision='tuned')
    assert hub.repos['me/model'].files() == before and set(hub.repos['me/model'].refs) == {'main'}


def test_a_commit_whose_answer_is_lost(hub):
    hub.faults.append(Fault('POST', '/commit/', cut='answer', times=1))
    done = publish(tiny_model(), 'me/model', license='mit')
    assert done.commit == hub.repos['me/model'].refs['main'] and 'everything has arrived' in str(done)
    timm.create_model('hf-hub:me/model', pretrained=True)


def test_a_repository_that_cannot_be_deleted_is_named(hub):
    hub.faults += [Fault('PUT', 'objects', 503), Fault('DELETE', 'repos', 403)]
    with pytest.raises(RuntimeError, match=f'{hub.endpoint}/me/model was left behind empty .*delete it'):
        publish(tiny_model(), 'me/model', license='mit')


def test_a_repository_that_others_have_filled_is_not_deleted(hub, monkeypatch):
    def fill(api, repo_id, *args, **kwargs):
        hub.repos[repo_id].commit('main', {'data.csv': (b'1,2', False)})
        raise RuntimeError('broken')
    monkeypatch.setattr(HfApi, 'create_commit', fill)
    with pytest.raises(RuntimeError, match=f'broken {hub.endpoint}/me/model holds files and is left as it is'):
        publish(tiny_model(), 'me/model', license='mit')
    assert hub.repos['me/model'].files() == {'data.csv': b'1,2'}


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
    with pytest.raises(RuntimeError, match=r'someone else changed it meanwhile \(412.*run the same again'):
        publish(tiny_model(1), 'me/model')
    assert repo.files()['README.md'] == b'edited'


def test_files_that_do_not_arrive(hub):
    hub.add_repo('me/model', {'.gitignore': b'model.safetensors'})
    with pytest.raises(RuntimeError, match=r'model.safetensors did not arrive in me/model .*\.gitignore'):
        publish(tiny_model(), 'me/model', license='mit')


@pytest.mark.parametrize('name, error', [
    ('me/a--b', 'Cannot have -- or'), ('a/b/c', 'in the form'), ('me/-x', 'alphanumeric'), ('me/ x', 'alphanumeric')])
def test_impossible_names(hub, name, error, tmp_path):
    for more in ({}, {'dry_run': tmp_path / 'dry'}):
        with pytest.raises(ValueError, match=rf'{name} cannot be published: .*{error}.*: name it USER/NAME'):
            publish(tiny_model(), name, license='mit', **more)
    assert not hub.requests and not (tmp_path / 'dry').exists()


def test_tokens_and_rights(hub, monkeypatch):
    with pytest.raises(RuntimeError, match=r"you/model could not be created: .*\(403: You don't have the rights"):
        publish(tiny_model(), 'you/model', license='mit')
    monkeypatch.setenv('HF_TOKEN', 'me-read')
    with pytest.raises(RuntimeError, match='the token of me may only read: make one with write access'):
        publish(tiny_model(), 'me/model', license='mit')
    monkeypatch.setenv('HF_TOKEN', 'nobody-write')
    with pytest.raises(RuntimeError, match=r'the Hub does not accept the token \(401'):
        publish(tiny_model(), 'me/model', license='mit')
    assert not hub.repos


def test_unreachable_and_offline(hub, monkeypatch, tmp_path, capsys):
    path = save_pretrained(tiny_model(), tmp_path / 'model')
    hub.shutdown()
    hub.server_close()
    assert main(['publish', str(path), 'me/model', '--license', 'mit']) == 2
    message = capsys.readouterr().err
    assert f'me/model cannot be published: the connection to {hub.endpoint} failed' in message
    assert 'check the network, HTTPS_PROXY and HF_ENDPOINT' in message and message.count('\n') == 1
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='offline mode is on: unset HF_HUB_OFFLINE'):
        publish(tiny_model(), 'me/model', license='mit')


def test_full_disk(hub, tmp_path, monkeypatch):
    resource = pytest.importorskip('resource')
    scratch = tmp_path / 'tmp'
    scratch.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(scratch))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond: the write itself fails
    try:
        for more in ({}, {'dry_run': tmp_path / 'dry'}):
            with pytest.raises(OSError, match=r'model.safetensors could not be written to .*; free space there'):
                publish(tiny_model(), 'me/model', license='mit', **more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not hub.repos and not list(scratch.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {'tmp', 'home'}
