"""Publishing a model on the Hugging Face Hub: checked here first, then uploaded in one commit with its card."""
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from timm_multigrain.files import file_sha256, write_text

from .card import CardFacts, is_generated, load_card, make_card
from .errors import hub_errors
from .metrics import Metric, parse_metrics
from .remote import Remote, check_content, fetch_card, look, own_name
from .save import CARD, CONFIG, WEIGHTS, model_folder, write_model
from .upload import Target, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

__all__ = ['Publication', 'publish']


@dataclass(frozen=True)
class Publication:
    """What was published, or by a dry run would be.

    Attributes:
        repo_id: USER/NAME.
        url: Address of the model, or of the pull request; None after a dry run.
        commit: The commit that holds it; None after a dry run.
        files: File to its SHA-256.
        license: License of the weights.
        directory: The folder of a dry run.
        notes: What else happened.
    """
    repo_id: str
    url: str | None
    commit: str | None
    files: dict[str, str]
    license: str
    directory: Path | None = None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        done = f'Published {self.url} (commit {self.commit})' if self.url else (
            f'{self.directory} holds what would be published as {self.repo_id}')
        width = max(map(len, self.files))
        lines = [f'  {name:{width}}  sha256 {digest}' for name, digest in self.files.items()]
        lines += [f'  {"license":{width}}  {self.license}', *(f'  {note}' for note in self.notes)]
        if self.url and '/discussions/' not in self.url:
            branch = f'@{self.url.partition("/tree/")[2]}' if '/tree/' in self.url else ''
            lines.append(
                f"Load it: import timm_multigrain; timm.create_model('hf-hub:{self.repo_id}{branch}', pretrained=True)")
        return '\n'.join([done, *lines])


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
    deleted again if the upload fails. A second publication replaces the model and the generated parts of the card, and
    keeps the rest of it. Figures stay in the card as long as the weights do, or until others are given.

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
        revision: Branch to commit to, created if it is not there.
        create_pr: Open a pull request instead, in a repository that is there.
        dry_run: Write the files to this folder and leave the network alone.
        api: huggingface_hub's client; None for the configured Hub and token.

    Raises:
        ValueError: Not a MultiGrain, no known license, wrong figures, an impossible name, or a repository of other
            content.
        FileNotFoundError: A pull request to no repository.
        OSError: The disk is full, or the folder of the dry run holds other things.
        RuntimeError: Token, rights, network or the Hub; or the saved model is not the same.
    """
    from timm_multigrain.models import MultiGrain

    if not isinstance(model, MultiGrain):
        raise ValueError(f'{type(model).__name__} is not a MultiGrain: publish other models with '
                         'timm.models.push_to_hf_hub.')
    if license == 'other' and not (license_name and license_link):
        raise ValueError("the license 'other' needs its name and its address: give license_name and license_link.")
    figures = None if metrics is None else tuple(parse_metrics(list(metrics)))
    facts = CardFacts(
        repo_id, license or '', license_name, license_link, figures or (), description, tuple(datasets))
    job = _Job(model, facts, figures is not None, dict(label_names=label_names, data_config=data_config))
    if dry_run is not None:
        return _dry_run(job, Path(dry_run), card)
    if api is None:
        from huggingface_hub import HfApi
        api = HfApi()
    target = Target(api, own_name(api, repo_id), revision, create_pr, private)
    remote = look(api, target.repo_id, revision)
    target.check(remote)
    with tempfile.TemporaryDirectory(prefix='multigrain-') as work:
        base = fetch_base(target, remote, Path(work) / 'remote')
        of_remote = base is not None
        if base is None and card is not None and Path(card).is_file():
            base = load_card(Path(card), str(card))
        folder = Path(work) / 'model'
        folder.mkdir()
        notes = job.write(
            folder, replace(facts, repo_id=target.repo_id), base,
            lambda: not of_remote or remote.holds([folder / WEIGHTS]))
        return publish_folder(folder, target, remote, notes)


def publish_folder(folder: Path, target: Target, remote: Remote | None, notes: Sequence[str] = ()) -> Publication:
    """Upload a finished folder: config.json, model.safetensors and README.md.

    Raises:
        FileNotFoundError, OSError, RuntimeError, ValueError: As `publish`.
    """
    card = load_card(folder / CARD, str(folder / CARD))
    _validate(card, target)
    files = _hashes(folder)
    result = upload(target, remote, folder, list(files))
    return Publication(
        target.repo_id, result.url, result.commit, files, card.data.get('license'), notes=(*notes, *result.notes))


def _validate(card: 'ModelCard', target: Target) -> None:
    """Ask the Hub whether it takes the card, while nothing has been created yet."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    # ModelCard.validate does this, of the configured Hub only
    endpoint = target.api.endpoint
    with hub_errors(f'the card of {target.repo_id} was not accepted', endpoint):
        hf_raise_for_status(get_session().post(
            f'{endpoint}/api/validate-yaml', json={'repoType': 'model', 'content': str(card)}))


def fetch_base(target: Target, remote: Remote | None, folder: Path) -> 'ModelCard | None':
    """The card that is on the Hub, once the repository is known to be one that may be written to.

    Raises:
        ValueError: The repository holds another model, or its card cannot be read.
        FileNotFoundError, RuntimeError: As `publish`.
    """
    if remote is None:
        return None
    check_content(target.api, target.repo_id, remote, folder)
    path = fetch_card(target.api, target.repo_id, remote, folder)
    return None if path is None else load_card(path, f'{CARD} of {target.repo_id}')


@dataclass(frozen=True)
class _Job:
    """A model and what is to be said about it."""
    model: nn.Module
    facts: CardFacts
    new_figures: bool
    settings: dict

    def write(
            self, folder: Path, facts: CardFacts, base: 'ModelCard | None', same_weights: Callable[[], bool],
            shown: str | os.PathLike | None = None) -> list[str]:
        """Write model and card, and give what there is to note.

        Args:
            folder: Where to.
            facts: The facts with the final name.
            base: An earlier card.
            same_weights: Whether the weights just written are those that the earlier card is about.
            shown: Name of the folder in errors.
        """
        given = facts.license
        facts = _with_license(facts, self.model, base)
        cfg = {'license': facts.license, 'description': facts.description}
        if facts.license != self.model.pretrained_cfg.get('license'):
            cfg.update(tag=None, notes=None)  # said of other weights
        saved = write_model(self.model, folder, **self.settings, shown=shown, pretrained_cfg=cfg)
        notes = [] if given or base is not None else [
            'the license is the one that the configuration of the model names: give another if the weights are not '
            'derived from those']
        earlier = [] if self.new_figures else _earlier_figures(base)
        if earlier and same_weights():
            facts = replace(facts, metrics=tuple(earlier))
        elif earlier:
            notes.append('the figures of the earlier weights were taken out of the card: give those of the new')
        write_card(saved, folder, facts, base)
        return notes


def write_card(model: nn.Module, folder: Path, facts: CardFacts, base: 'ModelCard | None' = None) -> None:
    """Write the README.md of a folder."""
    write_text(folder / CARD, str(make_card(model, facts, base)))


def _dry_run(job: _Job, directory: Path, card: str | os.PathLike | None) -> Publication:
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(f'{job.facts.repo_id} cannot be published'):
        validate_repo_id(job.facts.repo_id)
    own = directory / CARD
    path = next((p for p in (own, card and Path(card)) if p and p.is_file()), None)
    base = load_card(path, str(path)) if path else None
    before = file_sha256(directory / WEIGHTS) if path == own and (directory / WEIGHTS).is_file() else None
    with model_folder(directory) as folder:
        notes = job.write(
            folder, job.facts, base, lambda: path != own or file_sha256(folder / WEIGHTS) == before, shown=directory)
        license_ = load_card(folder / CARD, str(own)).data.get('license')
        files = _hashes(folder)
    return Publication(job.facts.repo_id, None, None, files, license_, directory, tuple(notes))


def _hashes(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS, CARD)}


def _earlier_figures(base: 'ModelCard | None') -> list[Metric]:
    results = base.data.get('eval_results') or [] if base is not None else []
    return [metric for metric in map(Metric.from_eval_result, results) if metric is not None]


def _with_license(facts: CardFacts, model: nn.Module, base: 'ModelCard | None') -> CardFacts:
    """The facts with the license of the weights: the one given, or the one that card and configuration agree on.

    A card that was written elsewhere does not count: timm's upload puts apache-2.0 into it without being asked.
    """
    if facts.license:
        return facts
    card = base.data if base is not None and is_generated(base) else {}
    of_card, of_model = card.get('license'), model.pretrained_cfg.get('license')
    if of_card and of_model and of_card != of_model:
        raise ValueError(f'the card says {of_card} and the configuration of the model {of_model}: give the license of '
                         'the weights (--license).')
    if not (of_card or of_model):
        raise ValueError('the license of the weights is not known: give it (--license), as an identifier of '
                         'https://huggingface.co/docs/hub/repositories-licenses.')
    details = {name: card.get(name) for name in ('license_name', 'license_link')}
    return replace(facts, license=of_card or of_model, **details)
