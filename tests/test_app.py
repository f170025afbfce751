"""The web app over HTTP: what it answers, and what it refuses: other files, other sites, large and broken pictures."""
import asyncio
import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.app.answers import Answers
from timm_multigrain.cli.main import main

from .copies_folder import make_index, make_pictures
from .pictures import png_header

gradio = pytest.importorskip('gradio')
import httpx  # noqa: E402

from timm_multigrain.app.app import launch_app  # noqa: E402
from timm_multigrain.app.guard import Guard  # noqa: E402

MAX_UPLOAD = 400_000
ASK = '/gradio_api/component_server'


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp('app') / 'pictures'
    make_pictures(folder / '2019', 8)
    return make_index(folder, folder.parent / 'index')


@contextlib.contextmanager
def running(index, **options):
    app = launch_app(index, block=False, port=free_port(), max_upload=MAX_UPLOAD, **options)
    try:
        yield app.local_url.rstrip('/')
    finally:
        app.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def url(index):
    """Reached by another name, without a password: of files it tells their names below the indexed folder only."""
    with running(index, allow_hosts=['photos.example.org']) as address:
        yield address


@pytest.fixture(scope='module')
def client(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(client, name, question, path=ASK, **options):
    """Answer to a question as the page asks it."""
    number, = (one['id'] for one in client.get('/config').json()['components'] if one['type'] == 'html')
    return client.post(path, json={'data': question, 'component_id': number, 'fn_name': name, 'session_hash': 'a'},
                       **options)


def about(picture=None, row=None, part=None, k=4, class_name='', category=''):
    picture = base64.b64encode(picture).decode('ascii') if isinstance(picture, bytes) else picture
    return {'picture': picture, 'row': row, 'part': part, 'k': k, 'class_name': class_name,
            'category': category}


def drawn(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix('data:image/jpeg;base64,'))))


def test_search_and_look(client, index):
    picture = Path(index.path_of(3))
    answer = ask(client, 'search', about(picture.read_bytes()))
    first = answer.json()['hits'][0]
    assert len(answer.json()['hits']) == 4
    assert (first['score'], first['name'], first['row']) == ('1.000', f'2019/{picture.name}', 3)
    assert first['size'].startswith('96 × 96, ') and str(picture.parent.parent) not in answer.text
    assert '%' in answer.json()['classes'] and drawn(answer.json()['picture']).size == (96, 96)
    difference = np.asarray(drawn(first['picture']), float) - np.asarray(Image.open(picture).convert('RGB'), float)
    assert np.abs(difference).mean() < 8
    assert ask(client, 'search', about(row=3)).json() == answer.json()
    look = ask(client, 'look', {'row': 3})
    assert look.json()['file'] == first['name'] and str(picture.parent.parent) not in look.text
    assert 'where files are' in ask(client, 'copies', {}).json()['error']


def test_answers(index, tmp_path):
    answers = Answers(index)
    wanted = answers.class_names[0]
    rows = [row for row in range(len(index)) if index.records(row).classes[0][0] == wanted]
    assert {hit['row'] for hit in answers.search(about(row=2, k=50, class_name=wanted))['hits']} == set(rows)
    assert len(answers.search(about(row=2, k=-5))['hits']) == 1
    assert len(answers.search(about(row=2, k=10 ** 9))['hits']) == len(index)
    corner = Image.open(index.path_of(2)).convert('RGB').crop((24, 0, 72, 48))
    buffer = io.BytesIO()
    corner.save(buffer, 'PNG')
    part, alone = answers.search(about(row=2, part=[0.25, 0, 0.5, 0.5])), answers.search(about(buffer.getvalue()))
    assert part['hits'] == alone['hits'] != answers.search(about(row=2))['hits']
    assert answers.look({'row': 2})['file'] == index.path_of(2)
    assert index.name_of('/elsewhere/x.jpg') == 'x.jpg' and answers._drawn(
        replace(index.records(2), path='/elsewhere/x.jpg'), 100) == ''
    page = copies_when_ready(lambda: answers.copies({}))['page']
    assert '1 group of identical files' in page and index.path_of(0) in page and '<a ' not in page
    assert answers.copies({})['page'] is page


def copies_when_ready(ask_again):
    while 'state' in (answer := ask_again()):
        time.sleep(0.1)
    return answer


def test_copies_that_cannot_be_compared(index, monkeypatch):
    answers, tried = Answers(index), []
    monkeypatch.setattr('timm_multigrain.app.answers.find_copies', lambda *args, **options: tried.append(0) or 1 / 0)
    for times in (1, 2):  # asked again, it tries again
        assert copies_when_ready(lambda: answers.copies({})) == {'error': 'division by zero'} and len(tried) == times


def test_a_port_that_is_taken(index, url, capsys):
    assert main(['app', str(index.path), '--port', url.rpartition(':')[2]]) == 2
    assert f'port {url.rpartition(":")[2]}: it is taken' in capsys.readouterr().err


@pytest.mark.parametrize('name, question, says', [
    ('search', about(), 'Give a picture'), ('search', about(row=-1), 'not in the index'),
    ('search', about(row=10 ** 9), 'not in the index'), ('search', about('/etc/passwd'), 'cannot be used|padding'),
    ('search', about(row='/etc/passwd'), 'has to be'), ('search', about(row=True), 'has to be'),
    ('search', {}, 'lacks'), ('search', [], 'has to be'), ('search', about(row=0, class_name='dragon'), 'dragon'),
    ('search', about(row=0, part=[0, 0, 0.04, 1]), '4 × 96 pixels: draw a larger one'),
    ('search', about(row=0, part=[0, 0, 1]), 'left, top, width'),
    ('search', about(row=0, part=[2, 2, 1, 1]), 'has nothing of the picture'),
    ('look', {'row': -3}, 'not in the index'), ('look', {'row': '../x'}, 'has to be'), ('look', 'x', 'has to be')])
def test_odd_questions_are_answered_in_a_sentence(client, name, question, says):
    answer = ask(client, name, question).json()
    assert set(answer) == {'error'} and re.search(says, answer['error']), answer


def test_pages_allow_nothing_from_elsewhere(client):
    page = client.get('/')
    policy = page.headers['Content-Security-Policy']
    assert page.status_code == 200 and "default-src 'self'" in policy and 'http' not in policy
    assert "frame-ancestors 'none'" in policy and page.headers['X-Frame-Options'] == 'DENY'
    assert page.headers['X-Content-Type-Options'] == 'nosniff' and page.headers['Referrer-Policy'] == 'no-referrer'
    assert 'fonts.googleapis' not in page.text and 'cdnjs' not in page.text
    config = client.get('/config').json()
    assert config['analytics_enabled'] is False and not config.get('is_space')


def test_no_other_file_is_served(client, index, tmp_path):
    (tmp_path / 'secret.txt').write_text('secret')
    paths = ['/etc/passwd', str(tmp_path / 'secret.txt'), index.path_of(0), str(index.path / 'index.sqlite'),
             f'{index.path}/../index/vectors.1.bin', 'setup.cfg', '../../etc/passwd', '%2e%2e/%2e%2e/etc/passwd',
             __file__, str(Path(gradio.__file__).parent / 'package.json')]
    assert all(Path(path).is_file() for path in paths[:5])
    for path in paths:
        for route in ('/gradio_api/file=', '/file=', '/gradio_api/file/', '/static/', '/assets/', '/theme.css/'):
            assert client.get(route + urllib.parse.quote(path, safe='/%')).status_code >= 400, (route, path)


def test_nothing_else_of_gradio_is_reached(client):
    """Neither what takes files, fetches addresses or runs functions, nor the documentation."""
    app = gradio.routes.App.create_app(gradio.Blocks())
    paths = {route.path for route in app.routes if hasattr(route, 'path')} | {
        f'/gradio_api/{name}' for name in ('upload', 'file=x', 'proxy=http://a', 'queue/join', 'call/search', 'info')}
    own = {'/', '/config', '/config/', '/theme.css', '/favicon.ico', '/manifest.json', '/login', '/login/',
           '/static/{path:path}', '/assets/{path:path}', ASK, f'{ASK}/'}
    assert len(paths - own) > 8
    for path in paths - own:
        for method in ('GET', 'POST'):
            assert client.request(method, path).status_code in (404, 413), path
    assert client.put('/config').status_code == 404
    assert ask(client, 'look', {'row': 3}, path='/gradio_api/upload').status_code == 404
    form = client.post(ASK, data={'fn_name': 'look'}, files={'files': ('a.png', b'x')})
    assert form.status_code == 415


def test_only_its_own_names_reach_it(client, url):
    """A page of another site whose name was made to lead here sends that name as Host."""
    own = url.removeprefix('http://')
    port = own.partition(':')[2]
    for host in (own, f'LOCALHOST:{port}', '127.0.0.1', 'photos.example.org:8443'):
        assert client.get('/config', headers={'Host': host}).status_code == 200
    for host in ('evil.example', f'evil.example:{port}', f'127.0.0.1.evil.example:{port}', '192.0.2.1', '[::2]:1', '',
                 '0.0.0.0'):
        for path in ('/', '/config', '/static/img/logo.svg', '/nothing'):
            answer = client.get(path, headers={'Host': host})
            assert answer.status_code == 421 and 'pictures' not in answer.text, (host, path)
    assert client.get('/config', headers={'X-Forwarded-Host': 'evil.example'}).status_code == 421
    answer = client.post(ASK, content=b'x' * 500_000, headers={'Host': 'evil.example'})
    assert answer.status_code == 421 and '--allow-host NAME' in answer.text


def test_other_sites_may_not_use_it(client, url):
    def asked(**headers):
        with httpx.Client(base_url=url, timeout=60) as other:  # the connection of a refused request is closed
            return ask(other, 'look', {'row': 0}, headers=headers).status_code

    assert asked() == asked(Origin=url) == 200
    assert asked(Host='photos.example.org', Origin='https://photos.example.org') == 200
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:1', f'{url}.evil.example', 'http://['):
        assert asked(Origin=origin) == 403, origin


def test_guard_counts_bodies_without_length():
    messages = [{'type': 'http.request', 'body': b'x' * 60, 'more_body': True}] * 2
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    async def receive():
        return messages.pop()

    scope = {'type': 'http', 'method': 'POST', 'path': ASK,
             'headers': [(b'host', b'a'), (b'content-type', b'application/json')]}
    asyncio.run(Guard(app, ['a'], 100)(scope, receive, None))
    assert [message['type'] for message in received] == ['http.request', 'http.disconnect']


def test_large_pictures_are_refused(client):
    largest = b'x' * MAX_UPLOAD
    assert 'cannot be used' in ask(client, 'search', about(largest)).json()['error']
    answer = ask(client, 'search', about(largest + bytes(100_000)))
    assert answer.status_code == 413 and 'larger than this app takes' in answer.text
    assert client.post('/login', content=b'x' * 100_000).status_code == 413


@pytest.mark.parametrize('content, says', [
    (b'', 'not an image'), (b'no picture', 'not an image'),
    (png_header(8000, 8000), '8000 x 8000 pixels are more than 50000000'), (png_header(30_000, 30_000), 'pixels'),
    (png_header(500, 500), 'truncated')])
def test_broken_pictures_are_refused_in_a_sentence(client, content, says):
    error = ask(client, 'search', about(content)).json()['error']
    assert error.startswith('This picture cannot be used: ') and says in error


def test_a_password_no_files_and_sigterm(index, tmp_path):
    """As a user starts it: pictures and places only after the login, and nothing is ever in a temporary file."""
    port, password = free_port(), 'sécret:1'
    command = [sys.executable, '-m', 'timm_multigrain', 'app', str(index.path), '--port', str(port), '--auth', 'me']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, 'TMPDIR': str(tmp_path), 'MULTIGRAIN_PASSWORD': password}) as process:
        try:
            assert f'http://127.0.0.1:{port}' in process.stdout.readline()
            with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=60) as client:
                body = {'data': {'row': 3}, 'component_id': 1, 'fn_name': 'look', 'session_hash': 'a'}
                assert client.post(ASK, json=body).status_code == client.get('/config').status_code == 401
                assert client.post('/login', data={'username': 'me', 'password': 'wrong'}).status_code == 400
                client.post('/login', data={'username': 'me', 'password': password})
                assert ask(client, 'look', {'row': 3}).json()['file'] == index.path_of(3)
                assert ask(client, 'search', about(Path(index.path_of(3)).read_bytes())).json()['hits']
                assert index.path_of(0) in copies_when_ready(lambda: ask(client, 'copies', {}).json())['page']
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            assert 'Traceback' not in process.stderr.read()
            assert not [path for path in tmp_path.rglob('*') if not path.is_dir()]
        finally:
            process.kill()


@pytest.mark.parametrize('options, says', [
    (['--auth', ''], 'neither may be empty'), (['--auth', 'me'], 'MULTIGRAIN_PASSWORD'),
    (['--auth', ':x'], 'USER:PASS'), (['--auth', 'm\ne:x'], 'USER:PASS'),
    (['--max-upload', 'nan'], 'megabytes'), (['--max-upload', '-1'], 'megabytes'), (['--port', '0'], '1 to 65535')])
def test_wrong_options(index, capsys, monkeypatch, options, says):
    monkeypatch.delenv('MULTIGRAIN_PASSWORD', raising=False)
    assert main(['app', str(index.path), *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize('options, host, warned', [
    ([], '127.0.0.1', False), (['--host', '0.0.0.0'], '0.0.0.0', True),
    (['--host', '0.0.0.0', '--auth', 'me:x'], '0.0.0.0', False)])
def test_it_listens_on_this_computer_only_or_warns(index, capsys, monkeypatch, options, host, warned):
    asked = {}
    monkeypatch.setattr(gradio.Blocks, 'launch', lambda self, **options: asked.update(options))
    monkeypatch.setattr(gradio.Blocks, 'block_thread', lambda self: None)
    monkeypatch.setattr(gradio.Blocks, 'local_url', '', raising=False)
    assert main(['app', str(index.path), *options]) == 0
    assert asked['server_name'] == host and asked['share'] is False and asked['allowed_paths'] is None
    assert ('everybody who can reach' in capsys.readouterr().err) == warned
