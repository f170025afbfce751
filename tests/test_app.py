"""The web app over HTTP: what it answers, and what it refuses: other files, other sites, large and broken uploads."""
import asyncio
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import pytest
from PIL import Image

from timm_multigrain.app.answers import Answers
from timm_multigrain.cli.main import main
from timm_multigrain.images.sources import UnreadableImage

from .copies_folder import make_index, make_pictures

gradio = pytest.importorskip('gradio')
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


def ask(url, data=None, headers=None, method=None):
    """Status, body and headers of a request."""
    request = urllib.request.Request(url, data=data, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as e:
        return e.code, e.read(), e.headers


def multipart(content, headers=None):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head + content + b'\r\n--b--\r\n', {'Content-Type': 'multipart/form-data; boundary=b', **(headers or {})}


def upload(url, content):
    return ask(f'{url}/gradio_api/upload', *multipart(content))


def search(url, file):
    """Outcome of the app's search: 'complete' or 'error', and what it says."""
    data = [file, [], 4, '']
    status, body, _ = ask(f'{url}/gradio_api/call/search', json.dumps({'data': data}).encode(),
                          {'Content-Type': 'application/json'})
    if status != 200:
        return str(status), body.decode()
    event = json.loads(body)['event_id']
    text = ask(f'{url}/gradio_api/call/search/{event}')[1].decode()
    return text.split('event: ')[-1].split('\n')[0], text


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def test_search_finds_the_picture_itself(url, index):
    status, body, _ = upload(url, Path(index.path_of(3)).read_bytes())
    assert status == 200
    outcome, text = search(url, {'path': json.loads(body)[0], 'meta': {'_type': 'gradio.FileData'}})
    assert outcome == 'complete', text
    answer = json.loads(text.split('data: ')[-1])
    captions = [item['caption'] for item in answer[1]]
    assert len(captions) == 4 and captions[0].startswith('1.000  ')
    name = Path(index.path_of(3)).name
    assert name in captions[0] and str(Path(index.path_of(3)).parent) not in text
    assert {entry['label'] for entry in answer[0]['value']['confidences']} <= {'boat', 'car', '<b>tree</b>'}


def test_pages_allow_nothing_from_elsewhere(url):
    status, page, headers = ask(f'{url}/')
    policy = headers['Content-Security-Policy']
    assert status == 200 and "default-src 'self'" in policy and 'http' not in policy
    assert "frame-ancestors 'none'" in policy and headers['X-Frame-Options'] == 'DENY'
    assert headers['X-Content-Type-Options'] == 'nosniff' and headers['Referrer-Policy'] == 'no-referrer'
    assert b'fonts.googleapis' not in page and b'cdnjs' not in page
    config = json.loads(ask(f'{url}/config')[1])
    assert config['analytics_enabled'] is False and not config.get('is_space')
    assert ask(f'{url}/docs')[0] == 404


def test_no_other_file_is_served(url, index, tmp_path):
    (tmp_path / 'secret.txt').write_text('secret')
    paths = ['/etc/passwd', str(tmp_path / 'secret.txt'), index.path_of(0), str(index.path / 'index.sqlite'),
             f'{index.path}/../index/vectors.1.bin', 'setup.cfg', '../../etc/passwd', '%2e%2e/%2e%2e/etc/passwd',
             __file__, str(Path(gradio.__file__).parent / 'package.json')]
    assert all(Path(path).is_file() for path in paths[:5])
    for path in paths:
        for route in ('/gradio_api/file=', '/file=', '/gradio_api/file/', '/static/', '/assets/', '/theme.css/'):
            status, body, _ = ask(f'{url}{route}{urllib.request.quote(path, safe="/%")}')
            assert status >= 400, (route, path, body[:80])
    for path in paths[:5]:
        outcome, text = search(url, {'path': path, 'meta': {'_type': 'gradio.FileData'}})
        assert outcome != 'complete' and 'secret' not in text and 'root:' not in text, path


def test_no_address_is_fetched(url, monkeypatch):
    """Also if gradio took this computer for a public one, to which its own check lets it go."""
    monkeypatch.setattr('gradio.processing_utils.PUBLIC_HOSTNAME_WHITELIST', ['127.0.0.1'])
    with socket.create_server(('127.0.0.1', 0)) as other:
        other.settimeout(1)
        address = f'http://127.0.0.1:{other.getsockname()[1]}/a.png'
        for route in (f'/gradio_api/file={address}', f'/gradio_api/proxy={address}', f'/file={address}'):
            assert ask(url + route)[0] in (403, 404)
        file = {'path': address, 'url': address, 'meta': {'_type': 'gradio.FileData'}}
        assert search(url, file)[0] == '403'
        for data in ([None, [], file, ''], [None, [], 4, {'a': [file]}], [file, [], 4, '']):  # where none belongs, too
            for body in ({'data': data, 'fn_index': 2, 'session_hash': 'a'}, {'data': data}, dict(enumerate(data))):
                for route in ('queue/join', 'run/search', 'call/v2/search', 'call/upload'):
                    text = json.dumps(body).replace('http', '\\u0068ttp').encode()
                    assert ask(f'{url}/gradio_api/{route}', text, {'Content-Type': 'application/json'})[0] == 403
        with contextlib.suppress(TimeoutError):
            pytest.fail(f'{other.accept()} asked')


def forged(url, method='GET', path='/config', body=None, **headers):
    connection = http.client.HTTPConnection(*url.removeprefix('http://').split(':'), timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in headers.items():
            for one in value if isinstance(value, list) else [value]:
                connection.putheader(name.replace('_', '-'), one)
        if body is not None:
            connection.putheader('Content-Length', str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_only_its_own_names_reach_it(url):
    """A page of another site whose name was made to lead here sends that name as Host."""
    own = url.removeprefix('http://')
    port = own.partition(':')[2]
    assert forged(url, Host=own)[0] == 200 and forged(url, Host=f'LOCALHOST:{port}')[0] == 200
    assert forged(url, Host='127.0.0.1')[0] == 200 and forged(url, Host='photos.example.org:8443')[0] == 200
    for host in ('evil.example', f'evil.example:{port}', f'127.0.0.1.evil.example:{port}', '192.0.2.1', '[::2]:1', '',
                 '0.0.0.0', [own, 'evil.example']):
        for path in ('/', '/config', '/gradio_api/info', '/static/img/logo.svg', '/nothing'):
            status, body = forged(url, path=path, Host=host)
            assert status in (400, 421) and b'pictures' not in body, (host, path)  # 400: uvicorn's own, of two
    assert forged(url, Host=own, X_Forwarded_Host='evil.example')[0] == 421
    status, body = forged(url, Host='evil.example')
    assert status == 421 and b'--allow-host NAME' in body
    assert forged(url, 'POST', '/gradio_api/queue/join', b'x' * 500_000, Host='evil.example')[0] == 421
    upgrade = dict(Connection='Upgrade', Upgrade='websocket', Sec_WebSocket_Version='13', Sec_WebSocket_Key='a' * 24)
    assert forged(url, Host='evil.example', **upgrade)[0] in (403, 421)


def test_other_sites_may_not_use_it(url):
    own = url.removeprefix('http://')
    send = dict(method='POST', path='/gradio_api/call/search', body=b'{"data": [null, [], 4, ""]}', Host=own,
                Content_Type='application/json')
    assert forged(url, **send, Origin=url)[0] == 200 and forged(url, **send)[0] == 200
    other_port = 'http://127.0.0.1:1'
    for origin in ('http://evil.example', 'null', other_port, f'{url}.evil.example', 'http://['):
        assert forged(url, **send, Origin=origin)[0] == 403, origin
    proxied = {**send, 'Host': 'photos.example.org'}
    assert forged(url, **proxied, Origin='https://photos.example.org')[0] == 200


def test_large_uploads_are_refused(url):
    noise = png(Image.effect_noise((900, 900), 80))
    assert len(noise) > MAX_UPLOAD
    assert upload(url, noise)[0] >= 400
    status, body, _ = ask(f'{url}/gradio_api/upload', b'x' * (MAX_UPLOAD + (20 << 20)))
    assert status == 413 and b'larger than this app takes' in body
    host, port = url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=30) as raw:  # a body that does not say how long it is
        raw.sendall(b'POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n'
                    b'Content-Type: multipart/form-data; boundary=b\r\n\r\n')
        answer = b''
        try:
            for _ in range(200):
                raw.sendall(b'4000\r\n' + b'x' * 0x4000 + b'\r\n')
            answer = raw.recv(100)
        except OSError:
            pass
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
def test_broken_pictures_are_refused_in_a_sentence(url, index, tmp_path, content, says):
    status, body, _ = upload(url, content)
    if status == 200:
        outcome, _ = search(url, {'path': json.loads(body)[0], 'meta': {'_type': 'gradio.FileData'}})
        assert outcome == 'error'
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
    assert [member.caption[:5] for member in answers.members(group)] == ['KEEP ', '1.000']
    assert answers.name(index.path_of(0)) == Path(index.path_of(0)).name
    assert answers.name('/elsewhere/x\n.jpg') == 'x\\n.jpg'
    assert answers.thumbnail('/elsewhere/x.jpg').getpixel((5, 5)) == (128, 128, 128)


def guarded(folder, app, **options):
    options = dict(hosts=['a'], uploads=str(folder), max_bytes=8 << 20, max_total=1000, max_files=3) | options
    return Guard(app, **options)


def test_guard_counts_bodies_without_length(tmp_path):
    messages = [{'type': 'http.request', 'body': b'x' * 60, 'more_body': True}] * 2
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    async def receive():
        return messages.pop()

    scope = {'type': 'http', 'method': 'GET', 'path': '/', 'headers': [(b'host', b'a')]}
    asyncio.run(guarded(tmp_path, app, max_bytes=100)(scope, receive, None))
    assert [message['type'] for message in received] == ['http.request', 'http.disconnect']


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

    client = TestClient(guarded(tmp_path / 'UP', echo), base_url='http://a')
    answer = client.post('/gradio_api/call/search', content=body)
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


def test_uploads_have_a_quota(url):
    """Of seven uploads of 300 kB the folder holds as many as 1.5 MB allow."""
    paths = []
    for seed in range(7):
        status, body, _ = upload(url, bytes([seed]) * 300_000)
        paths += json.loads(body)
        assert status == 200 and os.path.exists(paths[-1])
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
            url = f'http://127.0.0.1:{port}'
            picture = Path(index.path_of(3)).read_bytes()
            assert upload(url, picture)[0] == 401 and ask(f'{url}/config')[0] == 401
            login = f'{url}/login', urllib.parse.urlencode({'username': 'me', 'password': 'wrong'}).encode()
            assert ask(*login)[0] == 400
            _, _, headers = ask(login[0], urllib.parse.urlencode({'username': 'me', 'password': password}).encode())
            cookie = {'Cookie': '; '.join(c.partition(';')[0] for c in headers.get_all('Set-Cookie'))}
            status, body, _ = ask(f'{url}/gradio_api/upload', *multipart(picture, cookie))
            assert status == 200
            path = Path(json.loads(body)[0])
            data = json.dumps({'data': [{'path': str(path), 'meta': {'_type': 'gradio.FileData'}}, [], 4, '']}).encode()
            call = f'{url}/gradio_api/call/search'
            event = json.loads(ask(call, data, {**cookie, 'Content-Type': 'application/json'})[1])
            text = ask(f'{call}/{event["event_id"]}', headers=cookie)[1].decode()
            assert 'event: complete' in text
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
    """What gradio is asked for, by the command with its options."""
    asked = {}

    class Recorder:
        local_url = ''

        def queue(self, **options):
            return self

        def launch(self, **options):
            asked.update(options)

        def block_thread(self):
            pass

    monkeypatch.setattr('timm_multigrain.app.app._build', lambda *a, **k: Recorder())
    monkeypatch.setattr('timm_multigrain.app.app.os.umask', lambda mask: None)
    assert main(['app', str(index.path), *options]) == 0
    assert asked['server_name'] == host and asked['share'] is False and asked['allowed_paths'] is None
    assert ('everybody who can reach' in capsys.readouterr().err) == warned
