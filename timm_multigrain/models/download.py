"""Files from the network, whole or not at all, and its errors in one sentence: what failed, why, and the way out."""
import glob
import http.client
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

_TIMEOUT = 30  # seconds without a byte
_BY_HAND = 'download it by other means and give the file'


def download(url: str, path: str | os.PathLike, instead: str = _BY_HAND) -> Path:
    """Fetch a URL under a temporary name, check its length, then rename; an old file is replaced.

    ``instead`` says what else the user can do, as the end of a sentence.

    Raises:
        FileNotFoundError: The server does not have it.
        RuntimeError: The connection failed, the server refuses, or the disk does not take it.
    """
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f'.{glob.escape(path.name)}-*.partial'):  # of a killed run
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink(missing_ok=True)
        request = urllib.request.Request(url, headers={'User-Agent': 'timm-multigrain'})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(unfinished, 'xb') as file:
            total = int(response.headers.get('Content-Length') or 0)
            with tqdm.wrapattr(response, 'read', total=total or None, desc=path.name, disable=None) as body:
                shutil.copyfileobj(body, file, 1 << 20)
            if file.tell() < total:
                raise ConnectionError(f'the connection was cut after {file.tell()} of {total} bytes')
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except urllib.error.HTTPError as e:
        kind = FileNotFoundError if e.code in (404, 410) else RuntimeError
        raise kind(f'{url} could not be downloaded: the server says {e.code} {e.reason}; check the address, or '
                   f'{instead}.') from e
    except (OSError, http.client.HTTPException, ValueError) as e:
        cause = getattr(e, 'reason', None) or e
        raise RuntimeError(f'{url} could not be downloaded to {path}: {str(cause) or type(e).__name__}; check the '
                           f'address, the network and the space on the disk, or {instead}.') from e
    finally:
        if unfinished.parent.is_dir():
            unfinished.unlink(missing_ok=True)
    return path


def check_reachable(repository: str, name: str) -> None:
    """Refuse in seconds, not after minutes of retries, what has to come from the Hub and cannot: a RuntimeError.

    Weights of the repository that are in the cache need no connection.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    url = urlsplit(constants.ENDPOINT)
    cached = any(isinstance(try_to_load_from_cache(repository, file), str)
                 for file in ('model.safetensors', 'pytorch_model.bin'))
    if cached or urllib.request.getproxies():  # a proxy may resolve what this computer cannot
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError('HF_HUB_OFFLINE is set')
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == 'https' else 80)), timeout=5).close()
    except OSError as e:
        raise RuntimeError(
            f'The weights of {name} are not on this computer, and {url.hostname} cannot be reached '
            f'({e.strerror or e}): run the same once with a connection; or copy {constants.HF_HUB_CACHE} from a '
            'computer that has them; or name a model that is here, a folder of save_pretrained or a checkpoint.') from e


_LOGIN = 'log in with `hf auth login`, or set HF_TOKEN, to a token that may {}'
_STATUS = {  # cause and way out
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

    ``what`` is the failure, such as 'me/name could not be created', ``verb`` what the token has to be allowed.

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
            kind, text = _explain(cause)
            if kind is not None:
                raise kind(f'{what}: {text}.'.replace('{}', verb)) from e
            cause = cause.__cause__ or cause.__context__
        raise


def _explain(error: BaseException) -> tuple[type[Exception] | None, str]:
    from huggingface_hub import constants, utils

    said = ' '.join((getattr(error, 'server_message', None) or str(error)).split()).rstrip('. ')
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, utils.HFValidationError):
        return ValueError, f'{said}: name it USER/NAME, in letters, digits, -, _ and single dots'
    if isinstance(error, utils.LocalTokenNotFoundError):
        return RuntimeError, f'a token was not found: {_LOGIN}'
    if isinstance(error, utils.OfflineModeIsEnabled):
        return RuntimeError, 'offline mode is on: unset HF_HUB_OFFLINE'
    if status is not None:
        cause, way_out = _STATUS.get(min(status, 500), ('the Hub refuses the request', 'mend what it names'))
        missing = (utils.RepositoryNotFoundError, utils.RevisionNotFoundError, utils.EntryNotFoundError)
        kind = FileNotFoundError if isinstance(error, missing) else RuntimeError
        return kind, f'{cause} ({status}: {said}): {way_out}'
    if type(error).__module__.startswith(('httpx', 'requests')):
        return RuntimeError, (f'the connection to {constants.ENDPOINT} failed ({said}): check the network, HTTPS_PROXY '
                              'and HF_ENDPOINT, and run the same again')
    return (ValueError, said) if type(error) is ValueError else (None, '')  # such as the metadata of a card
