"""What the web app does not let in or out: other names and sites, large bodies, files and addresses, too many files."""
import json
import os
from collections.abc import Awaitable, Callable, Collection
from typing import Any

__all__ = ['Guard', 'keep_newest']

# Everything comes from the app itself. Gradio's own scripts are inline and build functions at run time.
POLICY = ("default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
          "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; frame-ancestors 'none'")
HEADERS = [(b'content-security-policy', POLICY.encode()), (b'referrer-policy', b'no-referrer'),
           (b'x-content-type-options', b'nosniff'), (b'x-frame-options', b'DENY'),
           (b'cross-origin-resource-policy', b'same-origin')]

MAX_JSON = 1 << 20  # bytes
DROPPED = 4  # times the largest body: what is read of one that is refused


class _Refused(Exception):
    def __init__(self, status: int, reason: str, read: bool = False):
        self.status, self.reason, self.read = status, reason, read  # read: nothing of the body is left to receive


class Guard:
    """ASGI middleware.

    Args:
        app: The application.
        hosts: Names and addresses it may be asked by, beside the address that a connection came in on.
        uploads: Folder of the uploaded files, the only ones that a request may name.
        max_bytes: Largest body of a request.
        max_total: Bytes kept in the folder.
        max_files: Files kept in the folder.
    """

    def __init__(
            self, app: Callable, hosts: Collection[str], uploads: str, max_bytes: int, max_total: int, max_files: int):
        self.app, self.hosts = app, {host.lower() for host in hosts}
        self.uploads, self.max_bytes = os.path.realpath(uploads), max_bytes
        self.max_total, self.max_files = max_total, max_files

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope['type'] not in ('http', 'websocket'):
            await self.app(scope, receive, send)
            return
        try:
            self._check_sender(scope)
            if scope['type'] == 'http':
                receive = await self._checked_body(scope, receive)
        except _Refused as e:
            if scope['type'] == 'websocket':
                await send({'type': 'websocket.close', 'code': 1008})
                return
            if not e.read:
                await self._drop_body(receive)
            await _answer(send, e.status, e.reason.encode())
            return
        await self.app(scope, receive, _with_headers(send))

    def _check_sender(self, scope: dict) -> None:
        """A page of another site reaches this server by a name of its own that leads here, or sends its origin."""
        def values(name: bytes) -> list[str]:
            joined = b','.join(value for key, value in scope['headers'] if key == name)
            return [value.strip() for value in joined.decode('latin1').lower().split(',') if value.strip()]

        asked = values(b'host') + values(b'x-forwarded-host')
        own = {*self.hosts, (scope.get('server') or ('',))[0]}
        if not values(b'host') or not all(_name(host) in own for host in asked):
            raise _Refused(421, f'This app is not {asked[0][:100] if asked else "known"}: start it with '
                                '--allow-host NAME if it is to be reached by that name.')
        if any(origin.partition('://')[2] not in asked for origin in values(b'origin')):
            raise _Refused(403, 'Other sites may not use this app.')

    async def _checked_body(self, scope: dict, receive: Callable) -> Callable[[], Awaitable[dict]]:
        path = scope['path']
        if 'file=http' in path.lower() or '/proxy=' in path.lower():  # gradio would fetch it
            raise _Refused(403, 'Addresses are not fetched here.')
        declared = next((value for name, value in scope['headers'] if name == b'content-length'), b'0')
        if not declared.isdigit() or int(declared) > self.max_bytes:
            raise _Refused(413, 'The request is larger than this app takes.')
        if scope['method'] != 'POST' or path == '/login':
            return self._limited(receive)
        keep_newest(self.uploads, self.max_total - int(declared), self.max_files)
        if path == '/gradio_api/upload':
            return self._limited(receive)
        return await self._checked_json(receive)

    async def _checked_json(self, receive: Callable) -> Callable[[], Awaitable[dict]]:
        body, more = b'', True
        while more:
            message = await receive()
            body += message.get('body', b'')
            more = message.get('more_body', False)
            if len(body) > MAX_JSON:
                raise _Refused(413, 'The request is larger than this app takes.', read=not more)
        try:
            self._check_files(json.loads(body or b'null'))
        except (ValueError, RecursionError):
            raise _Refused(400, 'The request is not JSON.', read=True) from None
        return _replay(body, receive)

    def _check_files(self, value: Any) -> None:
        """Gradio fetches or copies what a request names as the path of a file, before the app's own code sees it."""
        if isinstance(value, dict):
            path = value.get('path')
            if path is not None and not (
                    isinstance(path, str) and '\0' not in path
                    and os.path.realpath(path).startswith(os.path.join(self.uploads, ''))):
                raise _Refused(403, 'Only files that were uploaded here can be used, and no addresses.', read=True)
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                self._check_files(part)

    async def _drop_body(self, receive: Callable[[], Awaitable[dict]]) -> None:
        """Read a body and keep nothing of it: a client that is still sending sees a closed connection, not the answer.

        Of a very large one only the beginning is read.
        """
        dropped, more = 0, True
        while more and dropped <= DROPPED * self.max_bytes:
            message = await receive()
            dropped += len(message.get('body', b''))
            more = message.get('more_body', False)

    def _limited(self, receive: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
        """A body that does not say how long it is ends, as if the connection were cut, when it is too long."""
        total = 0

        async def limited() -> dict:
            nonlocal total
            message = await receive()
            total += len(message.get('body', b''))
            return message if total <= self.max_bytes else {'type': 'http.disconnect'}
        return limited


def keep_newest(folder: str, max_bytes: int, max_files: int) -> None:
    """Delete the oldest files below a folder, whole subfolders where they become empty, until so many are left."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                status = os.lstat(path)
            except OSError:  # deleted meanwhile
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for count, (_, size, path) in zip(range(len(found), 0, -1), sorted(found), strict=True):
        if count <= max_files and total <= max_bytes:
            return
        total -= size
        try:
            os.unlink(path)
            if os.path.dirname(path) != folder:
                os.rmdir(os.path.dirname(path))
        except OSError:
            pass


def _name(host: str) -> str:
    """The name in a Host header, without port and the brackets of an IPv6 address."""
    return host[1:].partition(']')[0] if host.startswith('[') else host.partition(':')[0]


def _replay(body: bytes, receive: Callable) -> Callable[[], Awaitable[dict]]:
    waiting = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def replayed() -> dict:
        return waiting.pop() if waiting else await receive()
    return replayed


def _with_headers(send: Callable) -> Callable:
    async def wrapped(message: dict) -> None:
        if message['type'] == 'http.response.start':
            own = {name for name, _ in HEADERS}
            others = [(name, value) for name, value in message.get('headers', []) if name.lower() not in own]
            message = {**message, 'headers': [*others, *HEADERS]}
        await send(message)
    return wrapped


async def _answer(send: Callable, status: int, text: bytes) -> None:
    await send({'type': 'http.response.start', 'status': status, 'headers': [
        (b'content-type', b'text/plain'), (b'content-length', str(len(text)).encode()), (b'connection', b'close')]})
    await send({'type': 'http.response.body', 'body': text})
