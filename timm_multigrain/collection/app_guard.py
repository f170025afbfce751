"""What the web app does not let in or out: large bodies, its server's network, other sites' pages and scripts."""
from collections.abc import Awaitable, Callable

__all__ = ['Guard']

# Everything comes from the app itself. Gradio's own scripts are inline and build functions at run time.
POLICY = ("default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
          "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'")
HEADERS = [(b'content-security-policy', POLICY.encode()), (b'referrer-policy', b'no-referrer'),
           (b'x-content-type-options', b'nosniff')]

DROPPED = 4  # times the largest body: what is read of one that is refused


class Guard:
    """ASGI middleware.

    Args:
        app: The application.
        max_bytes: Largest body of a request.
    """

    def __init__(self, app: Callable, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        path = scope['path'].lower()
        if 'file=http' in path or '/proxy=' in path:  # gradio would fetch it
            await _answer(send, 403, b'Addresses are not fetched here.')
            return
        declared = next((value for name, value in scope['headers'] if name == b'content-length'), b'0')
        if not declared.isdigit() or int(declared) > self.max_bytes:
            await self._drop_body(receive)
            await _answer(send, 413, b'The request is larger than this app takes.')
            return
        await self.app(scope, self._limited(receive), _with_headers(send))

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
