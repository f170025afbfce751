"""The web app over HTTP: what it answers, and what it refuses: other files, other sites, large and broken uploads."""
import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import urllib.parse
import zlib
from pathlib import Path

import pytest
from PIL import Image

from timm_multigrain.app.answers import Answers
from timm_multigrain.cli.main import main
from timm_multigrain.images.sources import UnreadableImage

from .copies_folder import make_index, make_pictures

gradio = pytest.importorskip('gradio')
import httpx  # noqa: E402
from starlette.responses import Response  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from timm_multigrain.app.app import _box, launch_app  # noqa: E402
from timm_multigrain.app.guard import Guard, keep_newest  # noqa: E402

MAX_UPLOAD = 400_000
MAX_TEMPORARY = 1_500_000


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp('app') / 'pictures', 8)
    return make_index(folder, folder.parent / 'index')


@contextlib.contextmanager
def running(index, **options):
    app = launch_app(index, block=False, port=free_port(), max_upload=MAX_UPLOAD, max_pixels=1_000_000,
                     max_temporary=MAX_TEMPORARY, **options)
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
    with running(index, allow_hosts=['photos.example.org']) as address:
        yield address


@pytest.fixture(scope='module')
def client(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def upload(client, content):
    return client.post('/gradio_api/upload', files={'files': ('a.png', content)})


def search(client, path, **file):
    """Outcome of the app's search: 'complete' or 'error', and what it says."""
    data = [{'path': path, 'meta': {'_type': 'gradio.FileData'}, **file}, [], 4, '']
    answer = client.post('/gradio_api/call/search', json={'data': data})
    if answer.status_code != 200:
        return str(answer.status_code), answer.text
    text = client.get(f'/gradio_api/call/search/{answer.json()["event_id"]}').text
    return text.split('event: ')[-1].split('\n')[0], text


def test_search_finds_the_picture_itself(client, index):
    picture = Path(index.path_of(3))
    outcome, text = search(client, upload(client, picture.read_bytes()).json()[0])
    assert outcome == 'complete', text
    answer = json.loads(text.split('data: ')[-1])
    captions = [item['caption'] for item in answer[1]]
    assert len(captions) == 4 and captions[0].startswith('1.000  ')
    assert picture.name in captions[0] and str(picture.parent) not in text
    assert {entry['label'] for entry in answer[0]['value']['confidences']} <= {'boat', 'car', '<b>tree</b>'}


def test_pages_allow_nothing_from_elsewhere(client):
    page = client.get('/')
    policy = page.headers['Content-Security-Policy']
    assert page.status_code == 200 and "default-src 'self'" in policy and 'http' not in policy
    assert "frame-ancestors 'none'" in policy and page.headers['X-Frame-Options'] == 'DENY'
    assert page.headers['X-Content-Type-Options'] == 'nosniff' and page.headers['Referrer-Policy'] == 'no-referrer'
    assert 'fonts.googleapis' not in page.text and 'cdnjs' not in page.text
    config = client.get('/config').json()
    assert config['analytics_enabled'] is False and not config.get('is_space')
    assert client.get('/docs').status_code == 404


def test_no_other_file_is_served(client, index, tmp_path):
    (tmp_path / 'secret.txt').write_text('secret')
    paths = ['/etc/passwd', str(tmp_path / 'secret.txt'), index.path_of(0), str(index.path / 'index.sqlite'),
             f'{index.path}/../index/vectors.1.bin', 'setup.cfg', '../../etc/passwd', '%2e%2e/%2e%2e/etc/passwd',
             __file__, str(Path(gradio.__file__).parent / 'package.json')]
    assert all(Path(path).is_file() for path in paths[:5])
    for path in paths:
        for route in ('/gradio_api/file=', '/file=', '/gradio_api/file/', '/static/', '/assets/', '/theme.css/'):
            assert client.get(route + urllib.parse.quote(path, safe='/%')).status_code >= 400, (route, path)
    for path in paths[:5]:
        outcome, text = search(client, path)
        assert outcome != 'complete' and 'secret' not in text and 'root:' not in text, path


def test_no_address_is_fetched(client, monkeypatch):
    """Also if gradio took this computer for a public one, to which its own check lets it go."""
    monkeypatch.setattr('gradio.processing_utils.PUBLIC_HOSTNAME_WHITELIST', ['127.0.0.1'])
    with socket.create_server(('127.0.0.1', 0)) as other:
        other.settimeout(1)
        address = f'http://127.0.0.1:{other.getsockname()[1]}/a.png'
        for route in ('/gradio_api/file=', '/gradio_api/proxy=', '/file='):
            assert client.get(route + address).status_code in (403, 404)
        assert search(client, address, url=address)[0] == '403'
        file = {'path': address, 'url': address, 'meta': {'_type': 'gradio.FileData'}}
        for data in ([None, [], file, ''], [None, [], 4, {'a': [file]}], [file, [], 4, '']):  # where none belongs, too
            for body in ({'data': data, 'fn_index': 2, 'session_hash': 'a'}, {'data': data}, dict(enumerate(data))):
                for route in ('queue/join', 'run/search', 'call/v2/search', 'call/upload'):
                    text = json.dumps(body).replace('http', '\\u0068ttp')
                    assert client.post(f'/gradio_api/{route}', content=text, headers={
                        'Content-Type': 'application/json'}).status_code == 403
        with contextlib.suppress(TimeoutError):
            pytest.fail(f'{other.accept()} asked')


def test_only_its_own_names_reach_it(client, url):
    """A page of another site whose name was made to lead here sends that name as Host."""
    own = url.removeprefix('http://')
    port = own.partition(':')[2]
    for host in (own, f'LOCALHOST:{port}', '127.0.0.1', 'photos.example.org:8443'):
        assert client.get('/config', headers={'Host': host}).status_code == 200
    for host in ('evil.example', f'evil.example:{port}', f'127.0.0.1.evil.example:{port}', '192.0.2.1', '[::2]:1', '',
                 '0.0.0.0'):
        for path in ('/', '/config', '/gradio_api/info', '/static/img/logo.svg', '/nothing'):
            answer = client.get(path, headers={'Host': host})
            assert answer.status_code == 421 and 'pictures' not in answer.text, (host, path)
    assert client.get('/config', headers={'X-Forwarded-Host': 'evil.example'}).status_code == 421
    answer = client.post('/gradio_api/queue/join', content=b'x' * 500_000, headers={'Host': 'evil.example'})
    assert answer.status_code == 421 and '--allow-host NAME' in answer.text
    with contextlib.closing(http.client.HTTPConnection(own, timeout=30)) as raw:
        raw.putrequest('GET', '/config', skip_host=True)
        for host in (own, 'evil.example'):
            raw.putheader('Host', host)
        raw.endheaders()
        assert raw.getresponse().status == 400  # uvicorn's own, of two
    upgrade = {'Connection': 'Upgrade', 'Upgrade': 'websocket', 'Sec-WebSocket-Version': '13',
               'Sec-WebSocket-Key': 'a' * 24, 'Host': 'evil.example'}
    assert client.get('/config', headers=upgrade).status_code in (403, 421)


def test_other_sites_may_not_use_it(client, url):
    def ask(**headers):
        # a connection of its own: that of a refused request is closed
        query = {'data': [None, [], 4, '']}
        return httpx.post(f'{url}/gradio_api/call/search', json=query, headers=headers).status_code

    assert ask() == ask(Origin=url) == ask(Host='photos.example.org', Origin='https://photos.example.org') == 200
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:1', f'{url}.evil.example', 'http://['):
        assert ask(Origin=origin) == 403, origin


def test_guard_counts_bodies_without_length(tmp_path):
    messages = [{'type': 'http.request', 'body': b'x' * 60, 'more_body': True}] * 2
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    async def receive():
        return messages.pop()

    scope = {'type': 'http', 'method': 'GET', 'path': '/', 'headers': [(b'host', b'a')]}
    asyncio.run(Guard(app, ['a'], str(tmp_path), 100, 1000, 3)(scope, receive, None))
    assert [message['type'] for message in received] == ['http.request', 'http.disconnect']


def test_large_uploads_are_refused(client, url):
    assert upload(client, os.urandom(MAX_UPLOAD + 1000)).status_code >= 400
    answer = client.post('/gradio_api/upload', content=b'x' * (MAX_UPLOAD + (20 << 20)))
    assert answer.status_code == 413 and 'larger than this app takes' in answer.text
    host, port = url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=30) as raw:  # a body that does not say how long it is
        raw.sendall(b'POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n'
                    b'Content-Type: multipart/form-data; boundary=b\r\n\r\n')
        answer = b''
        with contextlib.suppress(OSError):
            for _ in range(200):
                raw.sendall(b'4000\r\n' + b'x' * 0x4000 + b'\r\n')
            answer = raw.recv(100)
    assert not answer.startswith(b'HTTP/1.1 200')


def bomb(side):
    """A PNG of a few kB that claims side x side pixels and holds none."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(100_000))) + chunk(b'IEND', b'')


@pytest.mark.parametrize('content, says', [
    (b'', 'is empty'), (b'no picture', 'not an image'), (bomb(1200), '1200 x 1200 pixels are more than 1000000'),
    (bomb(30_000), 'pixels'), (bomb(500), 'truncated')])
def test_broken_pictures_are_refused_in_a_sentence(client, index, tmp_path, content, says):
    answer = upload(client, content)
    assert answer.status_code != 200 or search(client, answer.json()[0])[0] == 'error'
    (tmp_path / 'broken.png').write_bytes(content)
    with pytest.raises(UnreadableImage, match=says) as e:
        Answers(index, 1_000_000).read(str(tmp_path / 'broken.png'))
    assert str(tmp_path) not in str(e.value) and str(e.value).startswith('This picture cannot be used')


def test_parts():
    assert _box([], (100, 80)) is None and _box([(5, 5)], (100, 80)) is None
    assert _box([(50, 60), (10, 20)], (100, 80)) == (10, 20, 40, 40)
    assert _box([(-5, 70), (200, 20)], (100, 80)) == (0, 20, 100, 50)
    with pytest.raises(ValueError, match='choose a larger one'):
        _box([(5, 5), (9, 70)], (100, 80))


def test_answers(index):
    answers = Answers(index, 1_000_000)
    image = Image.open(index.path_of(2)).convert('RGB')
    classes, hits = answers.search(image, None, 3, None)
    assert len(hits) == 3 and hits[0].caption.startswith('1.000') and '96 x 96 pixels' in hits[0].details
    assert len(classes) == 3 and sum(classes.values()) == pytest.approx(1)
    wanted = answers.class_names[0]
    _, of_class = answers.search(image, None, 50, wanted)
    rows = [row for row in range(len(index)) if index.records(row).classes[0][0] == wanted]
    assert len(of_class) == len(rows) and {hit.details.split('\n')[0] for hit in of_class} == {
        answers.name(index.path_of(row)) for row in rows}
    assert answers.search(image, (0, 0, 40, 40), 3, None)[1][0].caption != hits[0].caption
    group = answers.copies.groups[0]
    assert answers.cover(group).caption.startswith('2 identical')
    assert [member.caption[:5] for member in answers.members(group)] == ['KEEP ', 'Ident']
    assert answers.name(index.path_of(0)) == Path(index.path_of(0)).name
    assert answers.name('/elsewhere/x\n.jpg') == 'x\\n.jpg'
    assert answers.thumbnail('/elsewhere/x.jpg').getpixel((5, 5)) == (128, 128, 128)


@pytest.mark.parametrize('body, status', [
    (b'{"data": [1]}', 200), (b'', 200), (b'x=1', 400), (b'[' * 60_000, 400), (b'{"path": 3}', 403),
    (b'{"a": [{"path": "/etc/passwd"}]}', 403), (b'{"path": "UP/x"}', 200), (b'{"path": "UP/../x"}', 403),
    (b'{"path": "UP-other/x"}', 403), (b'{"path": "UP/link"}', 403), (b'{"path": "UP"}', 403),
    (b'{"path": "a.png"}', 403), ('{"path": "https://example.org"}'.encode('utf-16'), 403),
    (b'{"path": "UP/\\u0000"}', 403), (b'"' + b'x' * (2 << 20) + b'"', 413)])
def test_guard_looks_at_the_files_a_request_names(tmp_path, body, status):
    (tmp_path / 'UP').mkdir()
    (tmp_path / 'UP' / 'link').symlink_to('/etc/passwd')
    body = body.replace(b'UP', str(tmp_path / 'UP').encode())

    async def echo(scope, receive, send):
        await Response((await receive())['body'])(scope, receive, send)

    guard = Guard(echo, ['a'], str(tmp_path / 'UP'), 8 << 20, 1000, 3)
    answer = TestClient(guard, base_url='http://a').post('/gradio_api/call/search', content=body)
    assert answer.status_code == status and (answer.content == body) == (status == 200)


def test_the_oldest_files_go(tmp_path):
    def fill(*sizes):
        for i, size in enumerate(sizes):
            (tmp_path / f'{i}').mkdir(exist_ok=True)
            (tmp_path / f'{i}' / 'a.png').write_bytes(bytes(size))
            os.utime(tmp_path / f'{i}' / 'a.png', (i, i))

    fill(100, 200, 300, 400)
    keep_newest(str(tmp_path), 1000, 4)
    assert len(os.listdir(tmp_path)) == 4
    keep_newest(str(tmp_path), 899, 4)
    assert sorted(os.listdir(tmp_path)) == ['2', '3']
    fill(1, 1, 1, 1)
    keep_newest(str(tmp_path), 1000, 3)
    assert sorted(os.listdir(tmp_path)) == ['1', '2', '3']


def test_uploads_have_a_quota(client):
    """Of seven uploads of 300 kB the folder holds as many as 1.5 MB allow."""
    paths = []
    for seed in range(7):
        paths += upload(client, bytes([seed]) * 300_000).json()
        assert os.path.exists(paths[-1])
        assert sum(f.stat().st_size for f in Path(paths[0]).parents[1].rglob('*') if f.is_file()) <= MAX_TEMPORARY
    assert [os.path.exists(path) for path in paths[:2] + paths[-3:]] == [False, False, True, True, True]


def test_a_password_private_files_and_sigterm(index, tmp_path):
    """As a user starts it: pictures only after the login, temporary files that only the user reads, and none left."""
    port, password = free_port(), 'sécret:1'
    command = [sys.executable, '-m', 'timm_multigrain', 'app', str(index.path), '--port', str(port), '--auth', 'me']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, 'TMPDIR': str(tmp_path), 'MULTIGRAIN_PASSWORD': password}) as process:
        try:
            assert f'http://127.0.0.1:{port}' in process.stdout.readline()
            picture = Path(index.path_of(3)).read_bytes()
            with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=60) as client:
                assert upload(client, picture).status_code == client.get('/config').status_code == 401
                assert client.post('/login', data={'username': 'me', 'password': 'wrong'}).status_code == 400
                client.post('/login', data={'username': 'me', 'password': password})
                path = Path(upload(client, picture).json()[0])
                assert search(client, str(path))[0] == 'complete'
            folder = path.parents[1]
            files = [file for file in folder.rglob('*') if file.is_file()]
            assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(files) > 3
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            assert not os.listdir(tmp_path) and 'Traceback' not in process.stderr.read()
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
    monkeypatch.setattr('os.umask', lambda mask: None)
    assert main(['app', str(index.path), *options]) == 0
    assert asked['server_name'] == host and asked['share'] is False and asked['allowed_paths'] is None
    assert ('everybody who can reach' in capsys.readouterr().err) == warned
