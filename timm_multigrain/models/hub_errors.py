"""What can go wrong between here and the Hub, each as one sentence: what failed, why, and the way out."""
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['hub_errors']

_LOGIN = 'log in with `hf auth login`, or set HF_TOKEN, to a token that may {}'
_STATUS = {
    401: ('the Hub does not accept the token', _LOGIN),
    403: ('the token may not {}', f'ask its owner for access, or {_LOGIN}'),
    404: ('not found, or the token may not see it', f'check the names, and {_LOGIN}'),
    409: ('someone else changed it meanwhile', 'run the same again'),
    412: ('someone else changed it meanwhile', 'run the same again'),
    429: ('too many requests', 'wait a few minutes and run the same again'),
    500: ('the Hub has trouble', 'run the same again later; https://status.huggingface.co says how it is'),
}


@contextmanager
def hub_errors(what: str, verb: str = 'write there') -> Iterator[None]:
    """Turn errors of huggingface_hub into sentences; errors of other kinds pass as they are.

    Args:
        what: The failure, such as 'me/name could not be created'.
        verb: What the token has to be allowed.

    Raises:
        ValueError: A repository name or metadata that the Hub cannot take.
        FileNotFoundError: No such repository, revision or file.
        RuntimeError: Token, rights, network, or the Hub itself.
    """
    try:
        yield
    except Exception as e:
        for cause in _chain(e):
            known = _explain(cause, what, verb)
            if known is not None:
                raise known from e
        raise


def _explain(error: BaseException, what: str, verb: str) -> Exception | None:
    from huggingface_hub import constants, utils

    said = ' '.join(str(error).split()).rstrip('. ') or type(error).__name__
    # the base of the errors of the library below: requests or httpx
    network = [c for c in utils.HfHubHTTPError.__mro__ if not c.__module__.startswith(('huggingface', 'builtins'))][-1]
    response = getattr(error, 'response', None)
    if isinstance(error, utils.HFValidationError):
        return ValueError(f'{what}: {said}: name it USER/NAME, in letters, digits, -, _ and single dots.')
    if isinstance(error, utils.LocalTokenNotFoundError):
        return RuntimeError(f'{what}: no token was found: {_LOGIN.format(verb)}.')
    if isinstance(error, utils.OfflineModeIsEnabled):
        return RuntimeError(f'{what}: offline mode is on: unset HF_HUB_OFFLINE.')
    if isinstance(error, network) and response is not None:
        return _of_status(error, what, verb)
    if isinstance(error, network):
        return RuntimeError(f'{what}: the connection to {constants.ENDPOINT} failed ({said}): check the network, '
                            'HTTPS_PROXY and HF_ENDPOINT, and run the same again.')
    return ValueError(f'{what}: {said}.') if type(error) is ValueError else None  # such as the metadata of a card


def _of_status(error: Exception, what: str, verb: str) -> Exception:
    from huggingface_hub import utils

    status = error.response.status_code
    cause, remedy = _STATUS.get(500 if status >= 500 else status, ('the Hub refuses the request', 'mend what it names'))
    said = ' '.join((getattr(error, 'server_message', None) or '').split()).rstrip('. ')
    message = f'{what}: {cause} ({status}{": " * bool(said)}{said}): {remedy}.'.replace('{}', verb)
    missing = (utils.RepositoryNotFoundError, utils.RevisionNotFoundError, utils.EntryNotFoundError)
    return FileNotFoundError(message) if isinstance(error, missing) else RuntimeError(message)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
