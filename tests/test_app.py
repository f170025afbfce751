"""The web app over HTTP: what it answers, and what it refuses: other files, other sites, large and broken uploads."""
import contextlib
import io
import json
import socket
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest
from PIL import Image

from timm_multigrain.collection.app_answers import Answers
from timm_multigrain.collection.app_guard import Guard
from timm_multigrain.images.sources import UnreadableImage

from .copies_folder import make_index, make_pictures

gradio = pytest.importorskip('gradio')
from timm_multigrain.collection.app import _box, launch_app  # noqa: E402

MAX_UPLOAD = 400_000


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp('app') / 'pictures', 8)
    return make_index(folder, folder.parent / 'index')


@contextlib.contextmanager
def running(index, **options):
    app = launch_app(index, block=False, port=free_port(), max_upload=MAX_UPLOAD, max_pixels=1_000_000, **options)
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
    with running(index) as address:
        yield address


def ask(url, data=None, headers=None, method=None):
    """Status, body and headers of a request."""
    request = urllib.request.Request(url, data=data, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as e:
        return e.code, e.read(), e.headers


def upload(url, content, name='a.png'):
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return ask(f'{url}/gradio_api/upload', head.encode() + content + b'\r\n--b--\r\n',
               {'Content-Type': 'multipart/form-data; boundary=b'})


def search(url, file):
    """Outcome of the app's search: 'complete' or 'error', and what it says."""
    data = [file, [], 4, 'any']
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
    assert headers['X-Content-Type-Options'] == 'nosniff' and headers['Referrer-Policy'] == 'no-referrer'
    assert b'fonts.googleapis' not in page and b'cdnjs' not in page
    config = json.loads(ask(f'{url}/config')[1])
    assert config['analytics_enabled'] is False and not config.get('is_space')
    assert ask(f'{url}/docs')[0] == 404


def test_no_other_file_is_served(url, index, tmp_path):
    (tmp_path / 'secret.txt').write_text('secret')
    paths = ['/etc/passwd', str(tmp_path / 'secret.txt'), index.path_of(0), str(index.path / 'config.json'),
             f'{index.path}/../index/config.json', 'setup.cfg', '../../etc/passwd', '%2e%2e/%2e%2e/etc/passwd',
             __file__, str(Path(gradio.__file__).parent / 'package.json')]
    for path in paths:
        for route in ('/gradio_api/file=', '/file=', '/gradio_api/file/', '/static/', '/assets/', '/theme.css/'):
            status, body, _ = ask(f'{url}{route}{urllib.request.quote(path, safe="/%")}')
            assert status >= 400, (route, path, body[:80])
    for path in paths[:5]:
        outcome, text = search(url, {'path': path, 'meta': {'_type': 'gradio.FileData'}})
        assert outcome != 'complete' and 'secret' not in text and 'root:' not in text, path


def test_no_address_is_fetched(url):
    asked = []
    with socket.create_server(('127.0.0.1', 0)) as other:
        other.settimeout(1)
        address = f'http://127.0.0.1:{other.getsockname()[1]}/a.png'
        for route in (f'/gradio_api/file={address}', f'/gradio_api/proxy={address}', f'/file={address}'):
            assert ask(url + route)[0] in (403, 404)
        assert search(url, {'path': address, 'url': address, 'meta': {'_type': 'gradio.FileData'}})[0] != 'complete'
        with contextlib.suppress(TimeoutError):
            asked.append(other.accept())
    assert not asked


def test_large_uploads_are_refused(url):
    noise = png(Image.effect_noise((900, 900), 80))
    assert len(noise) > MAX_UPLOAD
    assert upload(url, noise)[0] >= 400
    status, body, _ = ask(f'{url}/gradio_api/upload', b'x' * (MAX_UPLOAD + (2 << 20)))
    assert status == 413 and b'larger than this app takes' in body
    host, port = url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=30) as raw:  # a body that does not say how long it is
        raw.sendall(b'POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n'
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
    (b'', 'is empty'), (b'no picture', 'no image'), (bomb(1200), '1200 x 1200 pixels are more than 1000000'),
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


def test_it_listens_on_this_computer_only(index, monkeypatch):
    monkeypatch.setattr('timm_multigrain.collection.app.build_app', lambda *a, **k: recorder)
    asked = {}

    class Recorder:
        def queue(self, **options):
            return self

        def launch(self, **options):
            asked.update(options)
    recorder = Recorder()
    launch_app(index, block=False)
    assert asked['server_name'] == '127.0.0.1' and asked['share'] is False and asked['allowed_paths'] is None
    launch_app(index, block=False, host='0.0.0.0')
    assert asked['server_name'] == '0.0.0.0'


def test_parts():
    assert _box([], (100, 80)) is None and _box([(5, 5)], (100, 80)) is None
    assert _box([(50, 60), (10, 20)], (100, 80)) == (10, 20, 40, 40)
    assert _box([(-5, 70), (200, 20)], (100, 80)) == (0, 20, 100, 50)
    with pytest.raises(ValueError, match='choose a larger one'):
        _box([(5, 5), (9, 70)], (100, 80))


def test_answers(index):
    answers = Answers(index, 1_000_000)
    image = Image.open(index.path_of(2)).convert('RGB')
    found = answers.search(image, None, 3, None)
    assert len(found.hits) == 3 and found.hits[0][1].startswith('1.000') and len(found.classes) == 3
    of_class = answers.class_names[0]
    assert all(record.classes[0][0] == of_class for *_, record in answers.search(image, None, 50, of_class).hits)
    part = answers.search(image, (0, 0, 40, 40), 3, None)
    assert part.hits[0][1] != found.hits[0][1]
    groups = answers.copies.groups
    assert answers.cover(groups[0])[1].startswith('2 identical') and answers.members(groups[0])[0][1].startswith('KEEP')
    assert answers.name(index.path_of(0)) == Path(index.path_of(0)).name
    assert answers.name('/elsewhere/x\n.jpg') == 'x\\n.jpg' and '96 x 96 pixels' in answers.describe(index.records(0))


def test_guard_counts_bodies_without_length():
    import asyncio

    messages = [{'type': 'http.request', 'body': b'x' * 60, 'more_body': True}] * 2
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    async def receive():
        return messages.pop()

    asyncio.run(Guard(app, 100)({'type': 'http', 'path': '/', 'headers': []}, receive, None))
    assert [message['type'] for message in received] == ['http.request', 'http.disconnect']
