"""Publishing a model on the Hugging Face Hub: checked here first, then uploaded in one commit with its card."""
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from timm_multigrain.files import file_sha256, read_json, write_text
from timm_multigrain.measure.results import Metric, parse_metrics
from timm_multigrain.models.download import hub_errors
from timm_multigrain.models.save import CARD, model_folder, write_model
from timm_multigrain.models.weights import CONFIG, WEIGHTS

from .card import is_generated, load_card, make_card, own_figures

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelInfo

_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.tar', '.ckpt', '.pkl', '.h5', '.onnx', '.gguf', '.npz')


@dataclass(frozen=True)
class Publication:
    """What was published, or by a dry run would be."""
    repo_id: str
    license: str  # of the weights
    url: str | None = None  # of the model or the pull request; None after a dry run
    commit: str | None = None
    directory: Path | None = None  # of a dry run
    notes: tuple[str, ...] = ()  # what else happened

    def __str__(self) -> str:
        done = f'Published {self.url} (commit {self.commit})' if self.url else (
            f'{self.directory} holds what would be published as {self.repo_id}')
        lines = [done, f'  license {self.license}', *(f'  {note}' for note in self.notes)]
        if self.url and '/discussions/' not in self.url:
            branch = f'@{self.url.partition("/tree/")[2]}' if '/tree/' in self.url else ''
            lines.append(
                f"Load it: import timm_multigrain; timm.create_model('hf-hub:{self.repo_id}{branch}', pretrained=True)")
        return '\n'.join(lines)


def publish(
        model: nn.Module,
        repo_id: str,
        *,
        license: str | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
        metrics: Sequence[Metric | dict] | None = None,
        description: str | None = None,
        datasets: Sequence[str] = (),
        label_names: Sequence[str] | None = None,
        data_config: dict | None = None,
        card: str | os.PathLike | None = None,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        dry_run: str | os.PathLike | None = None,
        api: 'HfApi | None' = None,
) -> Publication:
    """Publish a MultiGrain so that ``timm.create_model('hf-hub:<repo_id>', pretrained=True)`` gives it back.

    The model is saved here as safetensors, loaded back and compared first; only then a repository is created, and it is
    deleted again if the upload fails and it is empty. A second publication replaces the model and the generated parts
    of the card, and keeps the rest of it. Figures stay in the card as long as the weights do, or until others are
    given.

    Args:
        model: The MultiGrain, in any mode; it is not changed.
        repo_id: USER/NAME, or NAME for a repository of one's own.
        license: The Hub's identifier of the weights' license, such as mit. None: that of the card on the Hub if this
            function wrote it, or of the model's configuration, such as an official tag's.
        license_name: Name of a license 'other'.
        license_link: Its address.
        metrics: Figures of these weights, see `Metric`.
        description: What the weights are; a paragraph of the card.
        datasets: The Hub's identifiers of the data sets they were trained on.
        label_names: Names of the classes, in the order of the classifier's rows.
        data_config: Preprocessing the weights were trained for (input_size, crop_pct, mean, std, interpolation).
        card: README.md to start from where the repository has none.
        private: Make a new repository that only its owners see.
        revision: Branch to commit to, created if it does not exist.
        create_pr: Open a pull request instead, in an existing repository.
        dry_run: Write the files to this folder and leave the network alone.
        api: huggingface_hub's client; None for the configured Hub and token.

    Raises:
        ValueError: Not a MultiGrain, no known license, wrong figures, an impossible name, or a repository of other
            content.
        FileNotFoundError: A pull request to no repository.
        OSError: The disk is full, or the folder of the dry run holds other things.
        RuntimeError: Token, rights, network or the Hub; or the saved model is not the same.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    from timm_multigrain.models import MultiGrain

    if not isinstance(model, MultiGrain):
        raise ValueError(f'{type(model).__name__} is not a MultiGrain: publish other models with '
                         'timm.models.push_to_hf_hub.')
    if license == 'other' and not (license_name and license_link):
        raise ValueError("the license 'other' needs its name and its address: give license_name and license_link.")
    with hub_errors(f'{repo_id} cannot be published'):
        validate_repo_id(repo_id)
        if dry_run is None:
            api = api or HfApi()
            user = api.whoami()['name']
            repo_id = repo_id if '/' in repo_id else f'{user}/{repo_id}'
    metrics = None if metrics is None else parse_metrics(list(metrics))
    given = load_card(Path(card), str(card)) if card is not None and Path(card).is_file() else None

    def write(folder: Path, base: 'ModelCard | None', before: str, shown: Path | None = None) -> tuple[str, tuple]:
        """Write model and card; the license and what there is to note. ``base`` is the earlier card, ``before`` the
        SHA-256 of the weights that it is about."""
        named = dict(license=license, license_name=license_name, license_link=license_link)
        figures, notes, start = metrics, [], base or given
        if not license:
            named |= _license(model, start)
            if start is None:
                notes.append('the license is the one that the configuration of the model names: give another if the '
                             'weights are not derived from those')
        cfg = {'license': named['license'], 'description': description}
        if named['license'] != model.pretrained_cfg.get('license'):
            cfg.update(tag=None, notes=None)  # said of other weights
        saved = write_model(model, folder, label_names, data_config, cfg, shown)
        if figures is None:
            figures = own_figures(start)
            if figures and base and before != file_sha256(folder / WEIGHTS):
                figures = []
                notes.append('the figures of the earlier weights were taken out of the card: give those of the new')
        text = make_card(saved, repo_id, **named, metrics=figures, description=description, datasets=datasets,
                         base=start)
        write_text(folder / CARD, str(text))
        return named['license'], tuple(notes)

    if dry_run is not None:
        directory = Path(dry_run)
        old, weights = directory / CARD, directory / WEIGHTS
        base = load_card(old, str(old)) if old.is_file() else None
        before = file_sha256(weights) if weights.is_file() else ''
        with model_folder(directory) as folder:
            license, notes = write(folder, base, before, directory)
        return Publication(repo_id, license, directory=directory, notes=notes)
    target = _Target(api, repo_id, private, revision, create_pr)
    with tempfile.TemporaryDirectory(prefix='multigrain-') as work:
        base, before = target.read(Path(work) / 'remote')
        folder = Path(work) / 'model'
        folder.mkdir()
        license, notes = write(folder, base, before)
        commit = target.upload(folder)
    url = f'{api.endpoint}/{repo_id}' + (f'/tree/{revision}' if revision else '')
    return Publication(repo_id, license, commit.pr_url or url, commit.oid, notes=notes)


def _license(model: nn.Module, base: 'ModelCard | None') -> dict[str, str | None]:
    """The license that card and configuration agree on.

    A card that was written elsewhere does not count: timm's upload puts apache-2.0 into it without being asked.
    """
    card = base.data if base is not None and is_generated(base) else {}
    of_card, of_model = card.get('license'), model.pretrained_cfg.get('license')
    if of_card and of_model and of_card != of_model:
        raise ValueError(f'the card says {of_card} and the configuration of the model {of_model}: give the license of '
                         'the weights (--license).')
    if not (of_card or of_model):
        raise ValueError('the license of the weights is not known: give it (--license), as an identifier of '
                         'https://huggingface.co/docs/hub/repositories-licenses.')
    return {'license': of_card or of_model,
            'license_name': card.get('license_name'), 'license_link': card.get('license_link')}


class _Target:
    """A repository of the Hub that a model is to be committed to."""

    def __init__(self, api: 'HfApi', repo_id: str, private: bool, revision: str | None, create_pr: bool):
        self.api, self.repo_id, self.private, self.revision, self.create_pr = api, repo_id, private, revision, create_pr
        self.address = f'{api.endpoint}/{repo_id}'
        self.info = self._look(revision) or (self._look() if revision else None)
        if create_pr and self.info is None:
            raise FileNotFoundError(f'{repo_id} was not found, so no pull request can be opened: publish without one.')
        if self.info is not None and private and not self.info.private:
            raise ValueError(f'{repo_id} exists and is public, but private was asked for: change it at '
                             f'{self.address}/settings, or name another repository.')

    def _look(self, revision: str | None = None) -> 'ModelInfo | None':
        from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

        with hub_errors(f'{self.repo_id} could not be looked up'):
            try:
                return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

    def read(self, folder: Path) -> 'tuple[ModelCard | None, str]':
        """The existing card and the SHA-256 of the weights beside it, which have to be a MultiGrain's."""
        files = {file.rfilename: file for file in self.info.siblings} if self.info is not None else {}

        def fetch(name: str) -> Path:
            with hub_errors(f'{name} of {self.repo_id} could not be read'):
                return Path(self.api.hf_hub_download(self.repo_id, name, revision=self.info.sha, local_dir=folder))

        found = next((name for name in files if name.endswith(_WEIGHTS)), None)
        if CONFIG in files:
            try:
                found = str(read_json(fetch(CONFIG))['architecture'])
            except (ValueError, KeyError, TypeError):
                found = 'another model'
        if found is not None and not found.startswith('multigrain'):
            raise ValueError(f'{self.repo_id} holds {found}, not a MultiGrain: name another repository, or delete '
                             'its files.')
        card = load_card(fetch(CARD), f'{CARD} of {self.repo_id}') if CARD in files else None
        lfs = files[WEIGHTS].lfs if WEIGHTS in files else None
        return card, lfs.sha256 if lfs else ''

    def upload(self, folder: Path) -> 'CommitInfo':
        """Commit a folder, creating what is missing; a repository that is empty after a failure is deleted again."""
        try:
            with hub_errors(f'{self.repo_id} could not be created'):
                if self.info is None:
                    self.api.create_repo(self.repo_id, **({'private': True} if self.private else {}))
                if self.revision and not self.create_pr:
                    self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            with hub_errors(f'{self.repo_id} could not be uploaded'):
                return self.api.upload_folder(
                    repo_id=self.repo_id, folder_path=folder, commit_message='Publish with timm_multigrain',
                    revision=self.revision, create_pr=self.create_pr,
                    parent_commit=self.info.sha if self.info is not None else None)
        except BaseException as e:
            theirs = getattr(getattr(e.__cause__, 'response', None), 'status_code', None) == 409
            outcome = '' if self.info is not None or theirs else self._delete_if_empty()
            if outcome and isinstance(e, FileNotFoundError | ValueError | RuntimeError):
                raise type(e)(f'{e} {outcome}') from e
            raise

    def _delete_if_empty(self) -> str:
        try:
            info = self._look()
            if info is None:
                return ''
            if {file.rfilename for file in info.siblings} - {'.gitattributes'}:
                return f'{self.address} holds files and is left as it is.'
            self.api.delete_repo(self.repo_id)
        except Exception as e:  # whatever hinders it, the first error is the one to report
            return f'{self.address} may be left there, empty ({str(e).splitlines()[0]}): delete it in its settings.'
        return 'The repository that was created for it was deleted again.'
