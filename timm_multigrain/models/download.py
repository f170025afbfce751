"""Files from the network, whole or not at all, and its errors in one sentence: what failed, why, and the way out."""
import glob
import http.client
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlparse

from tqdm import tqdm

__all__ = ['cached', 'download', 'hub_errors']

_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
_INSTEAD = 'download it by other means and give the file'


def download(url: str, path: str | os.PathLike, instead: str = _INSTEAD) -> Path:
    """Fetch a URL under a temporary name, check its length, then rename; the folder is made if missing.

    Args:
        url: Address of the file.
        path: File to write; an old one is replaced.
        instead: What else the user can do, as the end of a sentence.

    Raises:
        FileNotFoundError: The server does not have it.
        RuntimeError: No connection, a connection that was cut, a server that refuses, or a disk that does not take it.
    """
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        request = urllib.request.Request(url, headers={'User-Agent': 'timm-multigrain'})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(unfinished, 'xb') as file:
            length = response.headers.get('Content-Length')
            total = None if length is None else int(length)
            with tqdm(total=total, desc=path.name, unit='B', unit_scale=True, disable=None) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            if total is not None and file.tell() < total:
                raise ConnectionError(f'it was cut after {file.tell()} of {total} bytes')
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except urllib.error.HTTPError as e:
        missing = e.code in (404, 410)
        said = f'{"the server does not have it" if missing else "the server refuses"} ({e.code} {e.reason})'
        raise (FileNotFoundError if missing else RuntimeError)(
            f'{url} could not be downloaded: {said}; check the address, or {instead}.') from e
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ValueError) as e:
        cause = getattr(e, 'reason', None) or e
        raise RuntimeError(f'{url} could not be downloaded: the connection failed ({str(cause) or type(e).__name__}); '
                           f'check the address and the network, or {instead}.') from e
    except OSError as e:
        raise RuntimeError(
            f'{path} could not be written ({e.strerror or e}): free space there, or choose another folder (TORCH_HOME '
            'or cache_dir for downloaded weights, TMPDIR for temporary files).') from e
    finally:
        with suppress(OSError):  # such as a folder that is a file: the error is on its way already
            unfinished.unlink(missing_ok=True)
    return path


def _remove_leftovers(path: Path) -> None:
    """What runs that were killed have left: no connection waits for an hour without a byte."""
    for old in path.parent.glob(f'.{glob.escape(path.name)}-*.partial'):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()


def cached(url: str, cache_dir: str | os.PathLike | None = None, instead: str = _INSTEAD) -> Path:
    """The file of a URL, in the place where torch.hub and timm keep it; errors as of `download`."""
    import torch

    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / (Path(urlparse(url).path).name or 'weights.pth')
    return path if path.exists() else download(url, path, instead)


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
        FileNotFoundError: Repository, revision or file not found.
        RuntimeError: Token, rights, network, or the Hub itself.
    """
    try:
        yield
    except Exception as e:
        cause = e
        while cause is not None:
            known = _explain(cause, what, verb)
            if known is not None:
                raise known from e
            cause = cause.__cause__ or cause.__context__
        raise


def _explain(error: BaseException, what: str, verb: str) -> Exception | None:
    from huggingface_hub import constants, utils

    said = ' '.join((getattr(error, 'server_message', None) or str(error)).split()).rstrip('. ')
    # the base of the errors of the library below: requests or httpx
    network = [c for c in utils.HfHubHTTPError.__mro__ if not c.__module__.startswith(('huggingface', 'builtins'))][-1]
    if isinstance(error, utils.HFValidationError):
        return ValueError(f'{what}: {said}: name it USER/NAME, in letters, digits, -, _ and single dots.')
    if isinstance(error, utils.LocalTokenNotFoundError):
        return RuntimeError(f'{what}: a token was not found: {_LOGIN.format(verb)}.')
    if isinstance(error, utils.OfflineModeIsEnabled):
        return RuntimeError(f'{what}: offline mode is on: unset HF_HUB_OFFLINE.')
    if isinstance(error, network):
        response = getattr(error, 'response', None)
        if response is None:
            return RuntimeError(f'{what}: the connection to {constants.ENDPOINT} failed ({said}): check the network, '
                                'HTTPS_PROXY and HF_ENDPOINT, and run the same again.')
        status = response.status_code
        cause, remedy = _STATUS.get(
            500 if status >= 500 else status, ('the Hub refuses the request', 'mend what it names'))
        message = f'{what}: {cause} ({status}: {said}): {remedy}.'.replace('{}', verb)
        missing = (utils.RepositoryNotFoundError, utils.RevisionNotFoundError, utils.EntryNotFoundError)
        return FileNotFoundError(message) if isinstance(error, missing) else RuntimeError(message)
    return ValueError(f'{what}: {said}.') if type(error) is ValueError else None  # such as the metadata of a card
