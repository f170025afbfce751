"""Files from the network, whole or not at all, and its errors in one sentence."""
import glob
import http.client
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from timm_multigrain.files import replacing

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
    for old in path.parent.glob(f'.{glob.escape(path.name)}-{"[0-9a-f]" * 8}'):  # of a killed run
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'timm-multigrain'})
        with (urllib.request.urlopen(request, timeout=_TIMEOUT) as response, replacing(path) as unfinished,
              open(unfinished, 'xb') as file):
            total = int(response.headers.get('Content-Length') or 0)
            with tqdm.wrapattr(response, 'read', total=total or None, desc=path.name, disable=None) as body:
                shutil.copyfileobj(body, file, 1 << 20)
            if file.tell() < total:
                raise ConnectionError(f'the connection was cut after {file.tell()} of {total} bytes')
    except (OSError, http.client.HTTPException, ValueError) as e:
        missing = isinstance(e, urllib.error.HTTPError) and e.code in (404, 410)
        cause = e if isinstance(e, urllib.error.HTTPError) else getattr(e, 'reason', None) or e
        raise (FileNotFoundError if missing else RuntimeError)(
            f'{url} could not be downloaded to {path}: {str(cause) or type(e).__name__}; check the address, the '
            f'network and the space on the disk, or {instead}.') from e
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


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """One line for each error of huggingface_hub, which says itself what to do; errors of other kinds pass as they are.

    ``what`` is the failure, such as 'me/name could not be created'.

    Raises:
        ValueError: A repository name or metadata that the Hub cannot take.
        FileNotFoundError: Repository, revision or file not found.
        RuntimeError: Token, rights, network, or the Hub itself.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as e:
        # that a file is not in the cache either says less than why it could not be fetched
        cause = e.__cause__ or e if isinstance(e, errors.LocalEntryNotFoundError) else e
        said = ' '.join(re.sub(r'For more information check: \S+', '', str(cause)).split()).rstrip('.')
        if type(cause).__module__.startswith(('httpx', 'requests')):
            kind, said = RuntimeError, (f'the connection to {constants.ENDPOINT} failed ({said or type(cause).__name__}'
                                        '): check the network, HTTPS_PROXY and HF_ENDPOINT, and run the same again')
        elif isinstance(cause, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
                                errors.EntryNotFoundError)):
            kind = FileNotFoundError
        elif isinstance(cause, (ValueError, OSError)):
            kind = RuntimeError if isinstance(cause, OSError) else ValueError
        else:
            raise
        raise kind(f'{what}: {said}.') from e
