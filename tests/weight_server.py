"""A server of files on the loopback interface that can refuse, lie about and cut its answers."""
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class File:
    """What is served at a path.

    Attributes:
        body: Content.
        status: Status code of the answer.
        cuts: Answers that end after half of what they announce, the first ones.
        announced: Whether the length of the content is told.
        etag: Validator, without which a download cannot be resumed.
    """
    body: bytes = b''
    status: int = 200
    cuts: int = 0
    announced: bool = True
    etag: str | None = '"1"'


class WeightServer(ThreadingHTTPServer):
    """Files by path; `ranges` has the Range header of every request, None where there was none."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.files: dict[str, File] = {}
        self.ranges: list[str | None] = []

    def add(self, path: str, body: bytes = b'', **kwargs) -> str:
        """Serve a file; its address."""
        self.files[f'/{path}'] = File(body, **kwargs)
        return f'http://127.0.0.1:{self.server_port}/{path}'


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get('Range')
        self.server.ranges.append(asked)
        file = self.server.files.get(self.path)
        if file is None or file.status != 200:
            self.send_error(404 if file is None else file.status)
            return
        start = 0
        if asked and file.etag and self.headers.get('If-Range') == file.etag:
            start = int(re.fullmatch(r'bytes=(\d+)-', asked)[1])
        body = file.body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(file.body) - 1}/{len(file.body)}')
        if file.announced:
            self.send_header('Content-Length', str(len(body)))
        if file.etag:
            self.send_header('ETag', file.etag)
        self.end_headers()
        if file.cuts:
            file.cuts -= 1
            body = body[:len(body) // 2]
        with suppress(ConnectionError):  # a client that has seen enough
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def weight_server() -> Iterator[WeightServer]:
    """A running server."""
    server = WeightServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
