"""What the web app does not let in or out: other names and sites, large bodies, files and addresses, too many files."""
import json
import os
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

__all__ = ['Guard', 'keep_newest']

# Everything comes from the app itself. Gradio's own scripts are inline and build functions at run time.
HEADERS = {
    'content-security-policy':
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; frame-ancestors 'none'",
    'referrer-policy': 'no-referrer', 'x-content-type-options': 'nosniff', 'x-frame-options': 'DENY',
    'cross-origin-resource-policy': 'same-origin'}
MAX_JSON = 1 << 20  # bytes


class _Refused(Exception):
    """The status and the reason to answer with."""


class _Body:
    """Receives the body of a request, which ends, as if the connection were cut, where it is too long."""

    def __init__(self, receive: Callable, max_bytes: int):
        self.receive, self.max_bytes, self.size, self.more = receive, max_bytes, 0, True

    async def __call__(self) -> dict:
        message = await self.receive()
        self.size += len(message.get('body', b''))
        self.more = message.get('more_body', False)
        return message if self.size <= self.max_bytes else {'type': 'http.disconnect'}


@dataclass
class Guard:
    """ASGI middleware.

    Attributes:
        app: The application.
        hosts: Names and addresses it may be asked by, beside the address that a connection came in on.
        uploads: Folder of the uploaded files, the only ones that a request may name.
        max_bytes: Largest body of a request.
        max_total: Bytes kept in the folder.
        max_files: Files kept in the folder.
    """
    app: Callable
    hosts: Collection[str]
    uploads: str
    max_bytes: int
    max_total: int
    max_files: int

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope['type'] not in ('http', 'websocket'):
            await self.app(scope, receive, send)
            return
        body = _Body(receive, self.max_bytes)
        try:
            self._check_sender(scope)
            if scope['type'] == 'http':
                receive = await self._checked(scope, body)
        except _Refused as e:
            if scope['type'] == 'websocket':
                await send({'type': 'websocket.close', 'code': 1008})
                return
            while body.more:  # a client that is still sending sees a closed connection, not the answer
                await body()
            status, reason = e.args
            await PlainTextResponse(reason, status, {'connection': 'close'})(scope, receive, send)
            return

        async def send_with_headers(message: dict) -> None:
            if message['type'] == 'http.response.start':
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check_sender(self, scope: dict) -> None:
        """A page of another site reaches this server by a name of its own that leads here, or sends its origin."""
        def values(name: str) -> list[str]:
            joined = ','.join(Headers(scope=scope).getlist(name)).lower()
            return [value.strip() for value in joined.split(',') if value.strip()]

        asked = values('host') + values('x-forwarded-host')
        own = {*(host.lower() for host in self.hosts), (scope.get('server') or ('',))[0]}
        if not values('host') or not all(_name(host) in own for host in asked):
            raise _Refused(421, f'This app is not {asked[0][:100] if asked else "known"}: start it with '
                                '--allow-host NAME if it is to be reached by that name.')
        if any(origin.partition('://')[2] not in asked for origin in values('origin')):
            raise _Refused(403, 'Other sites may not use this app.')

    async def _checked(self, scope: dict, body: _Body) -> Callable:
        """What the app may receive."""
        path, length = scope['path'], Headers(scope=scope).get('content-length', '0')
        if 'file=http' in path.lower() or '/proxy=' in path.lower():  # gradio would fetch it
            raise _Refused(403, 'Addresses are not fetched here.')
        if not length.isdigit() or int(length) > self.max_bytes:
            raise _Refused(413, 'The request is larger than this app takes.')
        if scope['method'] != 'POST' or path == '/login':
            return body
        keep_newest(self.uploads, self.max_total - int(length), self.max_files)
        return body if path == '/gradio_api/upload' else await self._checked_json(body)

    async def _checked_json(self, body: _Body) -> Callable:
        content = b''
        while body.more:
            content += (await body()).get('body', b'')
            if len(content) > MAX_JSON:
                raise _Refused(413, 'The request is larger than this app takes.')
        try:
            self._check_files(json.loads(content or b'null'))
        except (ValueError, RecursionError):
            raise _Refused(400, 'The request is not JSON.') from None
        waiting = [{'type': 'http.request', 'body': content, 'more_body': False}]

        async def replay() -> dict:
            return waiting.pop() if waiting else await body()
        return replay

    def _check_files(self, value: Any) -> None:
        """Gradio fetches or copies what a request names as the path of a file, before the app's own code sees it."""
        if isinstance(value, dict):
            path = value.get('path')
            if path is not None and not (
                    isinstance(path, str) and '\0' not in path
                    and os.path.realpath(path).startswith(os.path.join(os.path.realpath(self.uploads), ''))):
                raise _Refused(403, 'Only files that were uploaded here can be used, and no addresses.')
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                self._check_files(item)


def keep_newest(folder: str, max_bytes: int, max_files: int) -> None:
    """Delete the oldest files below a folder, whole subfolders where they become empty, until so many are left."""
    files = []
    for path in Path(folder).rglob('*'):
        with suppress(OSError):  # deleted meanwhile
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                files.append((status.st_mtime_ns, status.st_size, path))
    files.sort()
    total = sum(size for _, size, _ in files)
    while files and (len(files) > max_files or total > max_bytes):
        _, size, path = files.pop(0)
        total -= size
        with suppress(OSError):
            path.unlink()
            if path.parent != Path(folder):
                path.parent.rmdir()


def _name(host: str) -> str:
    """The name in a Host header, without port and the brackets of an IPv6 address."""
    return host[1:].partition(']')[0] if host.startswith('[') else host.partition(':')[0]
