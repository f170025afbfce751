"""One commit of a folder to a repository of the Hub, which is created for it and deleted again if it fails."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import hub_errors
from .remote import PICKLE, Remote, look
from .save import WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__all__ = ['Target', 'UploadResult', 'upload']


@dataclass(frozen=True)
class Target:
    """Where to.

    Attributes:
        api: Client.
        repo_id: USER/NAME.
        revision: Branch, None for main.
        create_pr: Open a pull request instead of committing.
        private: Visibility of a new repository.
    """
    api: 'HfApi'
    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    private: bool = False

    @property
    def url(self) -> str:
        """Address of the repository."""
        return f'{self.api.endpoint}/{self.repo_id}'

    def check(self, remote: Remote | None) -> None:
        """Refuse what cannot be done with the repository as it is.

        Raises:
            FileNotFoundError: A pull request to no repository, or to a branch that is not there.
            ValueError: A private publication to a public repository.
        """
        if self.create_pr and (remote is None or not remote.has_revision):
            missing = self.repo_id if remote is None else f'the branch {self.revision} of {self.repo_id}'
            raise FileNotFoundError(f'{missing} is not there, so no pull request can be opened: publish without one.')
        if remote is not None and self.private and not remote.private:
            raise ValueError(f'{self.repo_id} is there and public, and private was asked for: change it at '
                             f'{self.url}/settings, or name another repository.')


@dataclass(frozen=True)
class UploadResult:
    """The commit, the address to look at, and what else happened."""
    commit: str
    url: str
    notes: tuple[str, ...] = ()


def upload(target: Target, remote: Remote | None, folder: Path, names: Sequence[str]) -> UploadResult:
    """Commit files of a folder, and make sure that they have arrived.

    Args:
        target: Where to.
        remote: The repository as it is, None to create it.
        folder: The folder.
        names: Its files.

    Raises:
        FileNotFoundError, OSError, RuntimeError, ValueError: See `hub_errors`; a repository or branch that was created
            is deleted again.
    """
    undo = _create(target, remote)
    notes = []
    try:
        info = _commit(target, remote, folder, names)
        commit, pr_url = info.oid, info.pr_url
        _check_arrived(target, info, folder, names)
    except BaseException as e:
        commit, pr_url = _arrived(target, folder, names), None
        if target.create_pr or commit is None or not isinstance(e, Exception):
            _raise_with(e, undo())
        notes.append('the connection broke after the last file, and everything has arrived')
    if remote is not None and PICKLE in remote.hashes:
        notes.append(f'{PICKLE}, the pickle of the earlier weights, was removed')
    url = pr_url or (f'{target.url}/tree/{target.revision}' if target.revision else target.url)
    return UploadResult(commit, url, tuple(notes))


def _create(target: Target, remote: Remote | None) -> Callable[[], str]:
    """Create what is missing; the function it gives takes that back and says so."""
    api, repo_id, branch = target.api, target.repo_id, target.revision
    undo = partial(str, f'{repo_id} is as it was.')
    if remote is None:
        undo = partial(_delete_repo, target)
        try:
            with hub_errors(f'{repo_id} could not be created', api.endpoint):
                api.create_repo(repo_id, **({'private': True} if target.private else {}))
        except BaseException as e:
            # where the Hub has not said no, it may be there all the same
            _raise_with(e, undo() if getattr(e.__cause__, 'response', None) is None else '')
    if branch and (remote is None or not remote.has_revision):
        try:
            with hub_errors(f'the branch {branch} of {repo_id} could not be created', api.endpoint):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
        except BaseException as e:
            _raise_with(e, undo())
        undo = undo if remote is None else partial(_delete_branch, target)
    return undo


def _raise_with(error: BaseException, outcome: str) -> NoReturn:
    """Raise the error again, with what was done about it if it is one that the user reads as a sentence."""
    kinds = (FileNotFoundError, OSError, ValueError, RuntimeError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), None)
    if kind is None or not outcome:
        raise error
    raise kind(f'{error} {outcome}') from error


def _commit(target: Target, remote: Remote | None, folder: Path, names: Sequence[str]) -> 'CommitInfo':
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, repo_id = target.api, target.repo_id
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    weights = [operation for operation in operations if operation.path_in_repo == WEIGHTS]
    with hub_errors(f'{WEIGHTS} could not be uploaded to {repo_id}', api.endpoint):
        api.preupload_lfs_files(repo_id, weights, revision=target.revision, create_pr=target.create_pr)
    if remote is not None and PICKLE in remote.hashes:
        operations.append(CommitOperationDelete(PICKLE))
    with hub_errors(f'{", ".join(names)} could not be committed to {repo_id}', api.endpoint):
        return api.create_commit(
            repo_id, operations, commit_message='Publish with timm_multigrain', revision=target.revision,
            create_pr=target.create_pr, parent_commit=remote.commit if remote is not None else None)


def _arrived(target: Target, folder: Path, names: Sequence[str]) -> str | None:
    """The commit that holds the files after all, as when only the answer to the last request was lost."""
    try:
        remote = look(target.api, target.repo_id, target.revision)
    except (OSError, RuntimeError, ValueError):
        return None
    complete = remote is not None and remote.has_revision and remote.holds([folder / name for name in names])
    return remote.commit if complete else None


def _check_arrived(target: Target, info: 'CommitInfo', folder: Path, names: Sequence[str]) -> None:
    remote = look(target.api, target.repo_id, info.pr_revision or info.oid)
    different = [name for name in names if remote is None or not remote.holds([folder / name])]
    if different:
        raise RuntimeError(f'{", ".join(different)} did not arrive in {target.repo_id} as it was sent (commit '
                           f'{info.oid}): look whether a .gitignore there leaves it out, and run the same again.')


def _delete_repo(target: Target) -> str:
    """Delete a repository that was created a moment ago, unless something has been put into it."""
    try:
        remote = look(target.api, target.repo_id)
        if remote is None:
            return ''
        if set(remote.hashes) - {'.gitattributes'}:
            return f'{target.url} holds files and is left as it is.'
        target.api.delete_repo(target.repo_id)
    except Exception as e:  # whatever hinders it, the first error is the one to report
        return (f'Whether {target.url} was left behind empty could not be seen to ({str(e).splitlines()[0]}): look '
                'there, and delete it in its settings.')
    return 'The repository that was created for it was deleted again.'


def _delete_branch(target: Target) -> str:
    try:
        target.api.delete_branch(target.repo_id, branch=target.revision)
    except Exception as e:  # whatever hinders it, the first error is the one to report
        return f'The branch {target.revision} could not be deleted again ({str(e).splitlines()[0]}).'
    return f'The branch {target.revision} that was created for it was deleted again.'
