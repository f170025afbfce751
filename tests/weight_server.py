"""A server of files on the loopback interface that can refuse and cut its answers."""
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
        announced: Whether the length of the content is sent.
    """
    body: bytes = b''
    status: int = 200
    cuts: int = 0
    announced: bool = True


class WeightServer(ThreadingHTTPServer):
    """Files by path; `requests` has the paths that were asked for."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.files: dict[str, File] = {}
        self.requests: list[str] = []

    def add(self, path: str, body: bytes = b'', **kwargs) -> str:
        """Serve a file; its address."""
        self.files[f'/{path}'] = File(body, **kwargs)
        return f'http://127.0.0.1:{self.server_port}/{path}'


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        file = self.server.files.get(self.path)
        if file is None or file.status != 200:
            self.send_error(404 if file is None else file.status)
            return
        self.send_response(200)
        if file.announced:
            self.send_header('Content-Length', str(len(file.body)))
        self.end_headers()
        body = file.body[:len(file.body) // 2] if file.cuts else file.body
        file.cuts = max(0, file.cuts - 1)
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
