"""What the web app does not let in: other names and sites, large bodies, and what of gradio this app does not use."""
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

# Everything comes from the app itself. Gradio's own scripts are inline and build functions at run time.
HEADERS = {
    'content-security-policy':
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; frame-ancestors 'none'",
    'referrer-policy': 'no-referrer', 'x-content-type-options': 'nosniff', 'x-frame-options': 'DENY',
    'cross-origin-resource-policy': 'same-origin'}
QUESTIONS = '/gradio_api/component_server/'
# Gradio's own page and files, and the questions. Its routes that serve, take and fetch other files are not among them.
ROUTES = re.compile(
    r'/|/(config|theme\.css|favicon\.ico|manifest\.json|login|gradio_api/startup-events)/?|/(assets|static)/.*|'
    rf'{QUESTIONS}?')
MAX_FORM = 1 << 16  # bytes of a login


class _Refused(Exception):
    """The status and the reason to answer with."""


@dataclass
class Guard:
    """ASGI middleware.

    Attributes:
        app: The application.
        hosts: Names and addresses it may be asked by, beside the address that a connection came in on.
        max_bytes: Largest body of a question.
    """
    app: Callable
    hosts: Collection[str]
    max_bytes: int

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope['type'] == 'lifespan':
            return await self.app(scope, receive, send)
        if scope['type'] == 'websocket':  # of no use here
            return await send({'type': 'websocket.close', 'code': 1008})
        asks = scope['path'].rstrip('/') == QUESTIONS.rstrip('/')
        most, size, more = self.max_bytes if asks else MAX_FORM, 0, True

        async def body() -> dict:
            """The next part; the body ends, as if the connection were cut, where it is too long."""
            nonlocal size, more
            message = await receive()
            size, more = size + len(message.get('body', b'')), message.get('more_body', False)
            return message if size <= most else {'type': 'http.disconnect'}

        try:
            self._check_sender(scope)
            _check_request(scope, asks, most)
        except _Refused as e:
            while more:  # a client that is still sending sees a closed connection, not the answer
                await body()
            status, reason = e.args
            return await PlainTextResponse(reason, status, {'connection': 'close'})(scope, receive, send)

        async def send_with_headers(message: dict) -> None:
            if message['type'] == 'http.response.start':
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        return await self.app(scope, body, send_with_headers)

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


def _check_request(scope: dict, asks: bool, max_bytes: int) -> None:
    headers = Headers(scope=scope)
    length = headers.get('content-length', '0')
    if not ROUTES.fullmatch(scope['path']) or scope['method'] not in ('GET', 'HEAD', 'POST'):
        raise _Refused(404, 'Not found.')
    if asks and not headers.get('content-type', '').startswith('application/json'):  # gradio writes forms to files
        raise _Refused(415, 'A question is JSON.')
    if not length.isdecimal() or int(length) > max_bytes:
        raise _Refused(413, 'The request is larger than this app takes.')


def _name(host: str) -> str:
    """The name in a Host header, without port and the brackets of an IPv6 address."""
    return host[1:].partition(']')[0] if host.startswith('[') else host.partition(':')[0]
