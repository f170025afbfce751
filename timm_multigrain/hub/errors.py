"""What can go wrong between here and the Hub, each as one sentence: what failed, why, and the way out."""
import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['hub_errors']

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOGIN = 'log in with `hf auth login`, or set HF_TOKEN, to a token with write access'
_STATUS = {
    400: ('the Hub refuses the request', 'mend what it names'),
    401: ('the Hub does not accept the token', _LOGIN),
    403: ('the token may not do that', 'take a token with write access to that namespace '
          '(https://huggingface.co/settings/tokens), or a namespace of your own'),
    404: ('there is no such thing, or the token may not see it', 'check the names, and ' + _LOGIN),
    409: ('it is there already', 'run the same again'),
    412: ('someone else changed it meanwhile', 'run the same again'),
    413: ('it is too large for the Hub', 'see https://huggingface.co/docs/hub/storage-limits'),
    429: ('too many requests', 'wait a few minutes and run the same again'),
}
_READ = 'log in with `hf auth login`, or set HF_TOKEN, to a token that may read it'
_READING = {
    401: (_STATUS[401][0], _READ),
    403: ('the token may not read it', 'ask for access on its page on the Hub, and ' + _READ),
    404: (_STATUS[404][0], 'check the names, and if it is private ' + _READ),
}
_TROUBLE = ('the Hub has trouble', 'run the same again later; https://status.huggingface.co says how it is')


@contextmanager
def hub_errors(what: str, endpoint: str | None = None, reading: bool = False) -> Iterator[None]:
    """Turn errors of huggingface_hub into sentences; errors of other kinds pass as they are.

    Args:
        what: The failure, such as 'model.safetensors could not be uploaded to me/name'.
        endpoint: Address of the Hub; None for the configured one.
        reading: Whether nothing is written there, so that less is asked of the token.

    Raises:
        ValueError: A repository name or metadata that the Hub cannot take.
        FileNotFoundError: No such repository, revision or file.
        OSError: No room on the disk.
        RuntimeError: Everything else: token, rights, network, the Hub itself.
    """
    try:
        yield
    except Exception as e:
        known = _explain(e, what, endpoint, reading)
        if known is None:
            raise
        raise known from e


def _explain(error: Exception, what: str, endpoint: str | None, reading: bool) -> Exception | None:
    from huggingface_hub import constants, utils

    chain = _chain(error)
    for e in chain:
        if isinstance(e, utils.HFValidationError):
            return ValueError(f'{what}: {_line(e)}: name it USER/NAME, in letters, digits, -, _ and single dots.')
        if isinstance(e, utils.LocalTokenNotFoundError):
            return RuntimeError(f'{what}: no token was found: {_LOGIN}.')
        if isinstance(e, utils.OfflineModeIsEnabled):
            return RuntimeError(f'{what}: offline mode is on: unset HF_HUB_OFFLINE.')
        network = isinstance(e, _network_error(utils.HfHubHTTPError))
        if network and getattr(e, 'response', None) is not None:
            return _of_status(e, what, {**_STATUS, **_READING} if reading else _STATUS)
        if isinstance(e, OSError) and e.errno in _NO_ROOM:
            return OSError(
                f'{what}: no room is left on the disk ({e.strerror or e}): free space, or set HF_HOME and TMPDIR to '
                'folders on another disk.')
        if network:
            address = endpoint or constants.ENDPOINT
            return RuntimeError(
                f'{what}: the connection to {address} failed ({_line(e)}): check the network, HTTPS_PROXY and '
                'HF_ENDPOINT, and run the same again.')
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f'{what}: {_line(error)}')
    kind = next((kind for kind in (ValueError, RuntimeError) if isinstance(error, kind)), None)
    return kind and kind(f'{what}: {" ".join(str(error).split())}')


def _network_error(hub_error: type) -> type:
    """Base of the network errors, of requests or httpx: whichever library the Hub's client is built on."""
    return [c for c in hub_error.__mro__ if c.__module__.split('.')[0] not in ('huggingface_hub', 'builtins')][-1]


def _of_status(error: Exception, what: str, known: dict[int, tuple[str, str]]) -> Exception:
    from huggingface_hub import utils

    status = error.response.status_code
    cause, remedy = known.get(status, _TROUBLE if status >= 500 else known[400])
    said = getattr(error, 'server_message', None)
    message = f'{what}: {cause} ({status}{": " + _line(said) if said else ""}): {remedy}.'
    if isinstance(error, (utils.RepositoryNotFoundError, utils.RevisionNotFoundError, utils.EntryNotFoundError)):
        return FileNotFoundError(message)
    return ValueError(message) if status == 400 else RuntimeError(message)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _line(error: Exception | str) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip('. ')
