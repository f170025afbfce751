"""Servers on loopback, in memory: of plain files, and a small Hugging Face Hub to publish to and load from.

The users of the Hub are `me` and `you`; the tokens are theirs with '-write' or '-read' behind. What goes wrong is given
as `server.faults.append(Fault(...))`.
"""
import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = {'apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-nc-4.0', 'other', 'unknown', None}


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path holds a regular expression.

    A status answers with it and the message; cut='request' breaks the connection before the work is done, cut='answer'
    after it.
    """
    method: str
    path: str
    status: int | None = None
    message: str = 'out of order'
    cut: str | None = None
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

    def files(self, ref: str = 'main') -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commits[self.refs[ref]].items()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type):
        super().__init__(('127.0.0.1', 0), handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.requests = []

    def handle_error(self, request, client_address):
        pass  # connections that a fault has broken


class FileServer(_Server):
    """Files by path; `requests` has the paths that were asked for."""

    def __init__(self):
        super().__init__(_FileHandler)
        self.files = {}

    def add(self, path: str, body: bytes = b'', status: int = 200, cuts: int = 0, announced: bool = True) -> str:
        """Serve a file, its first answers cut in half, with its length or without; its address."""
        self.files[f'/{path}'] = dict(body=body, status=status, cuts=cuts, announced=announced)
        return f'{self.endpoint}/{path}'


class HubServer(_Server):
    """Repositories by name; `requests` has methods and paths."""

    def __init__(self):
        super().__init__(_HubHandler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        files = {'.gitattributes': b'*.safetensors filter=lfs', **(files or {})}
        repo.commit('main', {path: (content, is_large(path)) for path, content in files.items()})
        return repo


@contextmanager
def running(server: _Server):
    """The server while it answers."""
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(path: str) -> bool:
    return path.endswith(('.safetensors', '.bin', '.zip'))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class _FileHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        file = self.server.files.get(self.path, dict(status=404))
        if file['status'] != 200:
            self.send_error(file['status'])
            return
        body = file['body']
        self.send_response(200)
        if file['announced']:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if file['cuts'] else body)
        file['cuts'] = max(0, file['cuts'] - 1)

    def log_message(self, *args):
        pass


class Answer(Exception):
    """An answer that ends a request."""

    def __init__(self, status: int, body: object = None, headers: dict | None = None, code: str | None = None):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {**(headers or {}), **({'X-Error-Code': code} if code else {})}


class _HubHandler(BaseHTTPRequestHandler):
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
        ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', 'info'),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', 'batch'),
        ('PUT', r'/objects/([0-9a-f]{64})', 'upload'),
        ('(?:HEAD|GET)', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'resolve'),
    )

    def handle_any(self):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.server.requests.append((self.command, parts.path))
        fault = next((f for f in self.server.faults if f.times > 0 and f.method == self.command
                      and re.search(f.path, parts.path)), Fault('', ''))
        fault.times -= 1
        length = int(self.headers.get('Content-Length') or 0)
        if fault.cut == 'request':
            self.rfile.read(min(length, 1000) // 2)
            self.break_off()
            return
        self.content = self.rfile.read(length) if length else self.read_chunks()
        try:
            if fault.status is not None:
                raise Answer(fault.status, {'error': fault.message})
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and re.fullmatch(method, self.command):
                    getattr(self, name)(*(group and unquote(group) for group in match.groups()))
            raise Answer(404, {'error': 'no such page'})
        except Answer as answer:
            if fault.cut == 'answer':
                self.break_off()
                return
            self.send_response(answer.status)
            headers = {'Content-Length': len(answer.body), 'Content-Type': 'application/json', **answer.headers}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(b'' if self.command == 'HEAD' else answer.body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def read_chunks(self) -> bytes:
        content = b''
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return content

    def break_off(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass

    # who may do what

    def user(self) -> str:
        name = (self.headers.get('Authorization') or '').removeprefix('Bearer ').rpartition('-')[0]
        if name not in ('me', 'you'):
            raise Answer(401, {'error': 'Invalid credentials in Authorization header'},
                         {'X-Error-Message': 'Invalid credentials in Authorization header'})
        return name

    def may_write(self, repo_id: str) -> None:
        if self.headers['Authorization'].endswith('-read') or repo_id.split('/')[0] != self.user():
            raise Answer(403, {'error': f"You don't have the rights to write to {repo_id}"})

    def tree(self, repo_id: str, revision: str) -> tuple[Repo, str, dict]:
        self.user()
        repo = self.server.repos.get(repo_id)
        if repo is None:
            raise Answer(404, {'error': 'Repository not found'}, code='RepoNotFound')
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Answer(404, {'error': f'Invalid rev id: {revision}'}, code='RevisionNotFound')
        return repo, sha, repo.commits[sha]

    # pages

    def whoami(self):
        raise Answer(200, {'type': 'user', 'name': self.user(), 'orgs': []})

    def create(self):
        wanted = json.loads(self.content)
        repo_id = f'{wanted["organization"] or self.user()}/{wanted["name"]}'
        self.may_write(repo_id)
        url = {'url': f'{self.server.endpoint}/{repo_id}'}
        if repo_id in self.server.repos:
            raise Answer(409, {'error': 'You already created this model repo', **url})
        self.server.add_repo(repo_id, private=wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        raise Answer(200, url)

    def delete(self):
        wanted = json.loads(self.content)
        repo_id = f'{wanted["organization"]}/{wanted["name"]}'
        self.may_write(repo_id)
        del self.server.repos[repo_id]
        raise Answer(200, {})

    def validate_yaml(self):
        errors = []
        metadata = yaml.safe_load(re.match(r'\s*---\r?\n(.*?)\r?\n---', json.loads(self.content)['content'], re.S)[1])
        if metadata.get('license') not in LICENSES:
            errors = [{'message': f'"license" must be one of {sorted(filter(None, LICENSES))}'}]
        raise Answer(400 if errors else 200, {'errors': errors, 'warnings': []})

    def preupload(self, repo_id, revision):
        _, _, tree = self.tree(repo_id, revision)
        files = []
        for file in json.loads(self.content)['files']:
            content, large = tree.get(file['path'], (None, None))
            digest = None if content is None else (hashlib.sha256(content).hexdigest() if large else git_hash(content))
            mode = 'lfs' if is_large(file['path']) else 'regular'
            files.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, 'oid': digest})
        raise Answer(200, {'files': files})

    def batch(self, repo_id):
        raise Answer(200, {'transfer': 'basic', 'objects': [
            item if item['oid'] in self.server.objects
            else {**item, 'actions': {'upload': {'href': f'{self.server.endpoint}/objects/{item["oid"]}'}}}
            for item in json.loads(self.content)['objects']]})

    def upload(self, oid):
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Answer(400, {'error': 'The content does not match its SHA-256'})
        self.server.objects[oid] = self.content
        raise Answer(200, {})

    def commit(self, repo_id, revision):
        request = 'create_pr' in self.query
        self.may_write(repo_id)
        repo, sha, tree = self.tree(repo_id, revision)
        tree = dict(tree)
        for line in self.content.decode().splitlines():
            key, value = (item := json.loads(line))['key'], item['value']
            if key == 'header' and value.get('parentCommit', sha) != sha:
                raise Answer(412, {'error': 'A commit has happened since. Please refresh and try again.'})
            if key == 'file':
                tree[value['path']] = (base64.b64decode(value['content']), False)
            if key == 'lfsFile':
                tree[value['path']] = (self.server.objects[value['oid']], True)
        sha = repo.commit('refs/pr/1' if request else revision, tree)
        url = f'{self.server.endpoint}/{repo_id}'
        raise Answer(200, {'commitUrl': f'{url}/commit/{sha}', 'commitOid': sha,
                           'pullRequestUrl': f'{url}/discussions/1' if request else None})

    def create_branch(self, repo_id, branch):
        self.may_write(repo_id)
        repo = self.server.repos[repo_id]
        repo.refs[branch] = repo.refs['main']
        raise Answer(200, {})

    def info(self, repo_id, revision):
        repo, sha, tree = self.tree(repo_id, revision or 'main')
        siblings = []
        for path, (content, large) in tree.items():
            lfs = {'sha256': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 134}
            siblings.append({'rfilename': path, 'size': len(content), 'blobId': git_hash(content),
                             **({'lfs': lfs} if large else {})})
        raise Answer(200, {'_id': '0', 'id': repo_id, 'modelId': repo_id, 'sha': sha, 'private': repo.private,
                           'siblings': siblings, 'tags': []})

    def resolve(self, repo_id, revision, path):
        _, sha, tree = self.tree(repo_id, revision)
        headers = {'X-Repo-Commit': sha}
        if path not in tree:
            raise Answer(404, {'error': 'Entry not found'}, headers, code='EntryNotFound')
        content, large = tree[path]
        headers['ETag'] = f'"{git_hash(content)}"'
        if large:
            headers.update({'X-Linked-Etag': f'"{hashlib.sha256(content).hexdigest()}"', 'X-Linked-Size': len(content)})
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
