"""A small Hugging Face Hub on loopback, in memory: what huggingface_hub's client asks of it to publish and load.

Users are `me`, a member of `lab`, and `you`; the tokens are theirs with '-write' or '-read' behind. Faults are given as
`server.faults.append(Fault(...))`.
"""
import base64
import hashlib
import json
import os
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ORGANIZATIONS = {'me': ['lab'], 'you': []}
LICENSES = {'apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-nc-4.0', 'other', 'unknown', None}
README = re.compile(r'^\s*---\r?\n(.*?)\r?\n---', re.DOTALL)


@dataclass
class Fault:
    """What goes wrong with requests that match.

    Attributes:
        method: Method of the request.
        path: Regular expression found in its path.
        status: Answer with this status.
        message: Its text.
        cut: 'request' breaks the connection after part of the request's body was read, 'response' after half of the
            answer, 'answer' before any of it but after the work was done.
        corrupt: Change the bytes of the answer.
        times: How often it strikes.
    """
    method: str
    path: str
    status: int | None = None
    message: str = 'out of order'
    cut: str | None = None
    corrupt: bool = False
    times: int = 10 ** 9


@dataclass
class Repo:
    """Commits, each a tree of path to (content, whether it is a large file); branches and pull requests by ref."""
    private: bool
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, tree: dict) -> str:
        sha = hashlib.sha1(f'{len(self.commits)}{sorted(tree)}'.encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, ref: str = 'main') -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commits[self.refs[ref]].items()}


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        tree = {'.gitattributes': (b'*.safetensors filter=lfs', False)}
        tree.update({path: (content, is_large(path, len(content))) for path, content in (files or {}).items()})
        repo.commit('main', tree)
        return repo

    def handle_error(self, request, client_address):
        pass  # connections that a fault has broken


@contextmanager
def hub_server():
    """A running server."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(path: str, size: int) -> bool:
    return path.endswith(('.safetensors', '.bin', '.zip')) or size > 10_000_000


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Answer(Exception):
    """An answer that ends a request."""

    def __init__(self, status: int, body: object = None, headers: dict | None = None, code: str | None = None):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {**(headers or {}), **({'X-Error-Code': code} if code else {})}


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: HubServer
    ROUTES = (
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', r'/api/repos/create', 'create'),
        ('DELETE', r'/api/repos/delete', 'delete'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('POST', r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', 'preupload'),
        ('POST', r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', 'commit'),
        ('POST', r'/api/models/([^/]+/[^/]+)/branch/([^/]+)', 'create_branch'),
        ('DELETE', r'/api/models/([^/]+/[^/]+)/branch/([^/]+)', 'delete_branch'),
        ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', 'info'),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', 'batch'),
        ('PUT', r'/objects/([0-9a-f]{64})', 'upload'),
        ('HEAD', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'resolve'),
        ('GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'resolve'),
    )

    def handle_any(self):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.server.requests.append((self.command, parts.path))
        fault = next((f for f in self.server.faults if f.times > 0 and f.method == self.command
                      and re.search(f.path, parts.path)), None)
        if fault is not None:
            fault.times -= 1
        length = int(self.headers.get('Content-Length') or 0)
        if fault is not None and fault.cut == 'request':
            self.rfile.read(min(length, 1000) // 2)
            self.break_off()
            return
        self.content = self.rfile.read(length) if length else self.read_chunks()
        try:
            if fault is not None and fault.status is not None:
                raise Answer(fault.status, {'error': fault.message})
            self.route(parts.path)
            raise Answer(404, {'error': 'no such page'})
        except Answer as answer:
            self.send(answer, fault)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def read_chunks(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return b''
        content = b''
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def route(self, path: str) -> None:
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                getattr(self, name)(*(group and unquote(group) for group in match.groups()))
                return

    def send(self, answer: Answer, fault: Fault | None) -> None:
        if fault is not None and fault.cut == 'answer':
            self.break_off()
            return
        body = answer.body[::-1] if fault is not None and fault.corrupt else answer.body
        headers = {'Content-Length': len(body), 'Content-Type': 'application/json', **answer.headers}
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault is not None and fault.cut == 'response':
            self.wfile.write(body[:len(body) // 2])
            self.break_off()
            return
        self.wfile.write(body)

    def break_off(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass

    # who may do what

    def user(self) -> str | None:
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        name = token.rpartition('-')[0]
        if token and name not in ORGANIZATIONS:
            raise Answer(401, {'error': 'Invalid credentials in Authorization header'},
                         {'X-Error-Message': 'Invalid credentials in Authorization header'})
        return name or None

    def may_write(self, repo_id: str) -> None:
        user = self.user()
        if user is None:
            raise Answer(401, {'error': 'Unauthorized'})
        read_only = self.headers['Authorization'].endswith('-read')
        if read_only or repo_id.split('/')[0] not in (user, *ORGANIZATIONS[user]):
            raise Answer(403, {'error': f"You don't have the rights to write to {repo_id}"})

    def repo(self, repo_id: str) -> Repo:
        user = self.user()
        repo = self.server.repos.get(repo_id)
        owner = repo_id.split('/')[0]
        hidden = repo is None or (repo.private and (user is None or owner not in (user, *ORGANIZATIONS[user])))
        if hidden:
            raise Answer(404 if user else 401, {'error': 'Repository not found'}, code='RepoNotFound')
        return repo

    def tree(self, repo: Repo, revision: str) -> tuple[str, dict]:
        sha = repo.find(revision)
        if sha is None:
            raise Answer(404, {'error': f'Invalid rev id: {revision}'}, code='RevisionNotFound')
        return sha, repo.commits[sha]

    # pages

    def whoami(self):
        user = self.user()
        if user is None:
            raise Answer(401, {'error': 'Unauthorized'})
        role = self.headers['Authorization'].rpartition('-')[2]
        raise Answer(200, {'type': 'user', 'name': user, 'orgs': [{'name': name} for name in ORGANIZATIONS[user]],
                           'auth': {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': role}}})

    def create(self):
        wanted = json.loads(self.content)
        repo_id = f'{wanted["organization"] or self.user()}/{wanted["name"]}'
        self.may_write(repo_id)
        url = {'url': f'{self.server.endpoint}/{repo_id}'}
        if repo_id in self.server.repos:
            raise Answer(409, {'error': 'You already created this model repo', **url})
        private = wanted.get('visibility') == 'private' or bool(wanted.get('private'))
        self.server.add_repo(repo_id, private=private)
        raise Answer(200, url)

    def delete(self):
        wanted = json.loads(self.content)
        repo_id = f'{wanted["organization"]}/{wanted["name"]}'
        self.may_write(repo_id)
        self.repo(repo_id)
        del self.server.repos[repo_id]
        raise Answer(200, {})

    def validate_yaml(self):
        match = README.match(json.loads(self.content)['content'])
        errors = []
        try:
            metadata = yaml.safe_load(match.group(1)) if match else {}
            if metadata.get('license') not in LICENSES:
                errors.append({'message': f'"license" must be one of {sorted(filter(None, LICENSES))}'})
            for model in metadata.get('model-index', []):
                for result in model['results']:
                    assert result['task']['type'] and result['dataset']['type'] and result['dataset']['name']
                    assert all(set(metric) >= {'type', 'value'} for metric in result['metrics'])
        except (yaml.YAMLError, KeyError, AssertionError, AttributeError) as e:
            errors.append({'message': repr(e)})
        raise Answer(400 if errors else 200, {'errors': errors, 'warnings': []})

    def preupload(self, repo_id, revision):
        if 'create_pr' not in self.query:
            self.may_write(repo_id)
        repo = self.repo(repo_id)
        _, tree = self.tree(repo, revision)
        ignored = tree.get('.gitignore', (b'', False))[0].decode().split()
        files = []
        for file in json.loads(self.content)['files']:
            path = file['path']
            content, large = tree.get(path, (None, None))
            digest = None if content is None else (hashlib.sha256(content).hexdigest() if large else git_hash(content))
            mode = 'lfs' if is_large(path, file['size']) else 'regular'
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': path in ignored, 'oid': digest})
        raise Answer(200, {'files': files})

    def batch(self, repo_id):
        self.repo(repo_id)
        objects = []
        for item in json.loads(self.content)['objects']:
            href = f'{self.server.endpoint}/objects/{item["oid"]}'
            missing = item['oid'] not in self.server.objects
            objects.append({**item, **({'actions': {'upload': {'href': href}}} if missing else {})})
        raise Answer(200, {'transfer': 'basic', 'objects': objects})

    def upload(self, oid):
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Answer(400, {'error': 'The content does not match its SHA-256'})
        self.server.objects[oid] = self.content
        raise Answer(200, {})

    def commit(self, repo_id, revision):
        request = 'create_pr' in self.query
        if not request:
            self.may_write(repo_id)
        repo = self.repo(repo_id)
        sha, tree = self.tree(repo, revision)
        tree = dict(tree)
        for line in self.content.decode().splitlines():
            key, value = (item := json.loads(line))['key'], item['value']
            if key == 'header' and value.get('parentCommit', sha) != sha:
                raise Answer(412, {'error': 'A commit has happened since. Please refresh and try again.'})
            if key == 'file':
                tree[value['path']] = (base64.b64decode(value['content']), False)
            if key == 'lfsFile':
                if value['oid'] not in self.server.objects:
                    raise Answer(400, {'error': f'{value["path"]} was not uploaded'})
                tree[value['path']] = (self.server.objects[value['oid']], True)
            if key == 'deletedFile':
                del tree[value['path']]
        number = 1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)
        sha = repo.commit(f'refs/pr/{number}' if request else revision, tree)
        url = f'{self.server.endpoint}/{repo_id}'
        raise Answer(200, {'commitUrl': f'{url}/commit/{sha}', 'commitOid': sha,
                           'pullRequestUrl': f'{url}/discussions/{number}' if request else None})

    def create_branch(self, repo_id, branch):
        self.may_write(repo_id)
        repo = self.repo(repo_id)
        if branch in repo.refs:
            raise Answer(409, {'error': 'Reference already exists'})
        repo.refs[branch] = repo.refs['main']
        raise Answer(200, {})

    def delete_branch(self, repo_id, branch):
        self.may_write(repo_id)
        del self.repo(repo_id).refs[branch]
        raise Answer(200, {})

    def info(self, repo_id, revision):
        repo = self.repo(repo_id)
        sha, tree = self.tree(repo, revision or 'main')
        siblings = []
        for path, (content, large) in tree.items():
            sibling = {'rfilename': path, 'size': len(content), 'blobId': git_hash(content)}
            if large:
                digest = hashlib.sha256(content).hexdigest()
                sibling['lfs'] = {'sha256': digest, 'size': len(content), 'pointerSize': 134}
            siblings.append(sibling if 'blobs' in self.query else {'rfilename': path})
        raise Answer(200, {'_id': '0', 'id': repo_id, 'modelId': repo_id, 'sha': sha, 'private': repo.private,
                           'siblings': siblings, 'tags': []})

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        sha, tree = self.tree(repo, revision)
        headers = {'X-Repo-Commit': sha}
        if path not in tree:
            raise Answer(404, {'error': 'Entry not found'}, headers, code='EntryNotFound')
        content, large = tree[path]
        headers['ETag'] = f'"{git_hash(content)}"'
        if large:
            headers.update({'X-Linked-Etag': f'"{hashlib.sha256(content).hexdigest()}"', 'X-Linked-Size': len(content)})
        start = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if start:
            first = int(start.group(1))
            headers['Content-Range'] = f'bytes {first}-{len(content) - 1}/{len(content)}'
            raise Answer(206, content[first:], headers)
        raise Answer(200, content, headers)


def use(server: HubServer, monkeypatch, home) -> None:
    """Let huggingface_hub in this process talk to the server as `me`, with a cache of its own and without waiting."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(home / 'hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(home / 'token'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)  # the server speaks LFS
    monkeypatch.setenv('HF_TOKEN', 'me-write')
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the client's attempts


def environment(server: HubServer, home) -> dict[str, str]:
    """The same for another process."""
    return {**os.environ, 'HF_ENDPOINT': server.endpoint, 'HF_HOME': str(home), 'HF_TOKEN': 'me-write',
            'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1'}
