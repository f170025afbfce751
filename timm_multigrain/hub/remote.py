"""A repository on the Hub as it is: which files it holds, and whether a model may be put there."""
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from timm_multigrain.files import file_sha256

from .errors import hub_errors
from .save import CARD, CONFIG
from .verify import git_blob_hash

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ['PICKLE', 'Remote', 'check_content', 'fetch_card', 'look', 'own_name']

_WEIGHTS = re.compile(r'\.(safetensors|bin|pt|pth|tar|ckpt|pkl|h5|onnx|gguf|msgpack|npz)$')
# The pickle that timm's own upload writes beside model.safetensors: the same weights once more.
PICKLE = 'pytorch_model.bin'


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
        commit: The commit.
        private: Whether only its owners see it.
        hashes: File to its SHA-256 (large files) or git hash.
        has_revision: False if the revision that was asked for is not there; the rest is of the main branch then.
    """
    commit: str
    private: bool
    hashes: dict[str, str]
    has_revision: bool = True

    def holds(self, files: Iterable[Path]) -> bool:
        """Whether these files are there, in these contents."""
        return all(self._is(path, self.hashes.get(path.name, '')) for path in files)

    @staticmethod
    def _is(path: Path, digest: str) -> bool:
        return digest == (file_sha256 if len(digest) == 64 else git_blob_hash)(path)


def look(api: 'HfApi', repo_id: str, revision: str | None = None) -> Remote | None:
    """The repository, or None if there is none.

    Raises:
        ValueError, RuntimeError: See `hub_errors`.
    """
    from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

    with hub_errors(f'{repo_id} could not be looked up', api.endpoint):
        has_revision = True
        try:
            try:
                info = api.model_info(repo_id, revision=revision, files_metadata=True)
            except RevisionNotFoundError:
                has_revision = False
                info = api.model_info(repo_id, files_metadata=True)
        except RepositoryNotFoundError as e:
            # the Hub answers 401 to those who may not know whether it is there
            if e.response is not None and e.response.status_code == 401:
                raise
            return None
    hashes = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    return Remote(info.sha, bool(info.private), hashes, has_revision)


def own_name(api: 'HfApi', repo_id: str) -> str:
    """USER/NAME of a repository that may be given as NAME, after making sure that the token may write.

    Raises:
        ValueError: An impossible name.
        RuntimeError: No token, one the Hub does not know, one that may only read, or no connection.
    """
    from huggingface_hub.utils import validate_repo_id

    what = f'{repo_id} cannot be published'
    with hub_errors(what, api.endpoint):
        validate_repo_id(repo_id)
        user = api.whoami()
    role = user.get('auth', {}).get('accessToken', {}).get('role')
    if role == 'read':
        raise RuntimeError(f'{what}: the token of {user["name"]} may only read: make one with write access at '
                           'https://huggingface.co/settings/tokens, and log in with `hf auth login`.')
    return repo_id if '/' in repo_id else f'{user["name"]}/{repo_id}'


def check_content(api: 'HfApi', repo_id: str, remote: Remote, folder: Path) -> None:
    """Refuse a repository that holds another thing than a MultiGrain.

    Args:
        api: Client.
        repo_id: The repository.
        remote: What it holds.
        folder: Where its config.json may be downloaded to.

    Raises:
        ValueError: It holds another model.
        FileNotFoundError, RuntimeError: See `hub_errors`.
    """
    remedy = 'name another repository, or delete what is there.'
    if CONFIG not in remote.hashes:
        weights = [name for name in remote.hashes if _WEIGHTS.search(name)]
        if weights:
            raise ValueError(f'{repo_id} holds {weights[0]} and no {CONFIG}, so it is not a MultiGrain: {remedy}')
        return
    path = fetch(api, repo_id, CONFIG, remote.commit, folder)
    try:
        architecture = json.loads(path.read_text(encoding='utf-8'))['architecture']
    except (ValueError, KeyError, TypeError):
        architecture = None
    if not str(architecture).startswith('multigrain'):
        raise ValueError(f'{repo_id} holds {architecture or "another model"}, not a MultiGrain: {remedy}')


def fetch(api: 'HfApi', repo_id: str, name: str, commit: str, folder: Path) -> Path:
    """Download one small file of a commit into a folder.

    Raises:
        FileNotFoundError, RuntimeError: See `hub_errors`.
    """
    with hub_errors(f'{name} of {repo_id} could not be read', api.endpoint):
        return Path(api.hf_hub_download(repo_id, name, revision=commit, local_dir=folder))


def fetch_card(api: 'HfApi', repo_id: str, remote: Remote, folder: Path) -> Path | None:
    """The repository's README.md, None if it has none."""
    return fetch(api, repo_id, CARD, remote.commit, folder) if CARD in remote.hashes else None
