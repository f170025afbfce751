"""Network, rights and disk that fail while a model is published: one sentence, and nothing half-done is left."""
import pytest
from huggingface_hub import HfApi

from timm_multigrain.cli.main import main
from timm_multigrain.hub import publish, save_pretrained

from .hub_server import Fault
from .tiny import tiny_model


@pytest.mark.parametrize('fault, error, created', [
    (Fault('GET', 'api/models', 503), r'could not be looked up: the Hub has trouble \(503: out of order\)', False),
    (Fault('POST', 'create', 403, 'no rights'), r'created: the token may not write there \(403: no rights', False),
    (Fault('POST', 'create', 402, 'pay'), r'could not be created: the Hub refuses the request \(402: pay\)', False),
    (Fault('POST', 'create', cut='answer'), 'me/model could not be created: the connection to .* failed', True),
    (Fault('POST', 'validate-yaml', cut='request'), 'me/model could not be uploaded: the connection to', True),
    (Fault('POST', 'preupload', 404), r'me/model could not be uploaded: not found', True),
    (Fault('PUT', 'objects', 429), r'could not be uploaded: too many requests \(429', True),
    (Fault('POST', 'commit', 412), r'could not be uploaded: someone else changed it meanwhile \(412', True),
    (Fault('POST', 'commit', 500), r'could not be uploaded: the Hub has trouble \(500', True),
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


def test_an_existing_repository_is_left_as_it_was(hub):
    publish(tiny_model(0), 'me/model', license='mit')
    before = hub.repos['me/model'].files()
    hub.faults.append(Fault('PUT', 'objects', cut='request'))
    with pytest.raises(RuntimeError, match=r'me/model could not be uploaded: the connection'):
        publish(tiny_model(1), 'me/model')
    assert hub.repos['me/model'].files() == before


def test_a_repository_made_by_another_meanwhile_is_left(hub, monkeypatch):
    create_repo = HfApi.create_repo

    def late(api, repo_id, **kwargs):
        hub.add_repo(repo_id)
        return create_repo(api, repo_id, **kwargs)
    monkeypatch.setattr(HfApi, 'create_repo', late)
    with pytest.raises(RuntimeError, match=r'could not be created: someone else changed it meanwhile \(409'):
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
    with pytest.raises(RuntimeError, match=r'someone else changed it meanwhile \(412.*run the same again'):
        publish(tiny_model(1), 'me/model')
    assert repo.files()['README.md'] == b'edited'


@pytest.mark.parametrize('name, error', [
    ('me/a--b', 'Cannot have -- or'), ('a/b/c', 'in the form')])
def test_impossible_names(hub, name, error, tmp_path):
    for more in ({}, {'dry_run': tmp_path / 'dry'}):
        with pytest.raises(ValueError, match=rf'{name} cannot be published: .*{error}.*: name it USER/NAME'):
            publish(tiny_model(), name, license='mit', **more)
    assert not hub.requests and not (tmp_path / 'dry').exists()


def test_tokens_and_rights(hub, monkeypatch):
    with pytest.raises(RuntimeError, match=r"you/model could not be created: .*\(403: You don't have the rights"):
        publish(tiny_model(), 'you/model', license='mit')
    monkeypatch.setenv('HF_TOKEN', 'me-read')
    with pytest.raises(RuntimeError, match=r'the token may not write there \(403.*a token that may write there'):
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
