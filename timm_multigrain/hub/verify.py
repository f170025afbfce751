"""Files of a Hub repository, checked against what the Hub says they are.

huggingface_hub's cache names the copy of a large file by its SHA-256 and that of a small one by its git hash, and never
looks at them again. Here both are recomputed, so that a file that was cut off or damaged is noticed and fetched anew.
"""
import hashlib
import os
import re
from pathlib import Path

from timm_multigrain.files import file_sha256

from .errors import hub_errors

__all__ = ['git_blob_hash', 'verified_hub_file']

_SHA256 = re.compile('[0-9a-f]{64}')
_GIT = re.compile('[0-9a-f]{40}')


def verified_hub_file(
        repo_id: str,
        filename: str,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Path of a repository's file in the cache, downloaded if it is not there, with the content the Hub names.

    A file that differs is deleted and downloaded once more.

    Args:
        repo_id: USER/NAME.
        filename: Path in the repository.
        revision: Branch, tag or commit; None for main.
        cache_dir: huggingface_hub's cache; None for the usual one.

    Raises:
        ValueError: An impossible repository name.
        FileNotFoundError: No such repository, revision or file.
        OSError: No room on the disk.
        RuntimeError: No connection and no copy, no right to read it, or a copy that differs twice.
    """
    from huggingface_hub import hf_hub_download

    shown = f'{filename} of {repo_id}' + (f' at {revision}' if revision else '')
    where = dict(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    with hub_errors(f'{shown} could not be downloaded', reading=True):
        path = Path(hf_hub_download(**where))
    problem = _problem(path)
    if problem is None:
        return path
    _delete(path)
    with hub_errors(f'{shown} was damaged in the cache ({problem}), and could not be downloaded again', reading=True):
        path = Path(hf_hub_download(**where, force_download=True))
    problem = _problem(path)
    if problem is not None:
        _delete(path)
        raise RuntimeError(
            f'{shown} came damaged twice ({problem}): check the disk and the network between here and the Hub, then '
            'run the same again; the copy was deleted.')
    return path


def git_blob_hash(path: str | os.PathLike) -> str:
    """Hash that git names a file's content by, in hexadecimal digits."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _problem(path: Path) -> str | None:
    """How a cached file differs from what its blob is named by; None if it does not."""
    name = _blob(path).name
    for pattern, compute, kind in ((_SHA256, file_sha256, 'SHA-256'), (_GIT, git_blob_hash, 'git hash')):
        if pattern.fullmatch(name):
            found = compute(path)
            return None if found == name else f'{kind} {found[:12]}... instead of {name[:12]}...'
    return _unreadable(path) if path.suffix == '.safetensors' else None


def _unreadable(path: Path) -> str | None:
    """For caches without links, where no name tells the hash: whether the file is whole at least."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, 'pt'):
            return None
    except SafetensorError as e:
        return str(e)


def _blob(path: Path) -> Path:
    """The file that a cache entry links to. One link only: newer caches link from there to a store of other names."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path


def _delete(path: Path) -> None:
    blob = _blob(path)
    for file in {path, blob, blob.resolve()}:
        file.unlink(missing_ok=True)
