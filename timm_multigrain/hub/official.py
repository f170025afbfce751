"""The authors' weights as repositories of the Hub: each tag converted to safetensors and published, in a run that can
be repeated until all are there.
"""
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg
from tqdm import tqdm

from .card import CardFacts
from .metrics import Metric
from .publish import Publication, fetch_base, publish_folder, write_card
from .remote import look, own_name
from .save import CONFIG, WEIGHTS
from .upload import Target

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ['OfficialRun', 'official_metrics', 'official_tags', 'publish_official']

SERVER = 'https://dl.fbaipublicfiles.com/multigrain/'
_PAPER = {'source_name': 'Berman et al. 2019', 'source_url': 'https://arxiv.org/abs/1902.05509'}
_CROP = 'shorter side 256, centre crop'
_LONGER = 'longer side, no crop'
_UNSTATED = 'not stated'
# Published accuracies of each of the authors' files: value, metric, size, p (None: not stated), protocol.
_PUBLISHED = {
    'joint_3BAA_0.5.pth': [(78.2, 'top1', 224, 3, _CROP), (79.4, 'top1', 500, None, _LONGER)],
    'joint_3B_0.5.pth': [
        (77.4, 'top1', 224, 3, _CROP), (78.6, 'top1', 500, 4, _LONGER), (94.4, 'top5', 500, 4, _LONGER)],
    'joint_1B_0.5.pth': [(77.0, 'top1', 224, 1, _CROP)],
    'joint_3B_1.0.pth': [(76.9, 'top1', 224, 3, _CROP)],
    'joint_1B_1.0.pth': [(76.8, 'top1', 224, 1, _CROP)],
    'nasnetamobile-finetune350.pth': [(75.1, 'top1', 350, 1.7, _UNSTATED)],
    'senet154-finetune400.pth': [(83.0, 'top1', 400, 1.6, _UNSTATED), (83.1, 'top1', 450, 1.6, _UNSTATED)],
    'pnasnet5large-finetune500.pth': [(83.6, 'top1', 500, 1.7, _LONGER)],
}


@dataclass(frozen=True)
class OfficialRun:
    """What a run did.

    Attributes:
        published: Tag to what was published.
        unchanged: Tag to the repository that held the same files already.
        prepared: Tag to the folder that a dry run left it in.
        failed: Tag to why it could not be published.
    """
    published: dict[str, Publication] = field(default_factory=dict)
    unchanged: dict[str, str] = field(default_factory=dict)
    prepared: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f'{tag}: {publication}' for tag, publication in self.published.items()]
        lines += [f'{tag}: {url} holds the same weights, left as it is' for tag, url in self.unchanged.items()]
        lines += [f'{tag}: {folder} holds what would be published' for tag, folder in self.prepared.items()]
        lines += [f'{tag}: failed: {reason}' for tag, reason in self.failed.items()]
        groups = ('published', 'unchanged', 'prepared', 'failed')
        counts = ', '.join(f'{len(getattr(self, name))} {name}' for name in groups if getattr(self, name))
        return '\n'.join([*lines, counts + ('; run the same again for the failed ones' if self.failed else '')])


def official_tags() -> list[str]:
    """Names, with tag, of the models whose weights are the authors' files."""
    return [name for name in timm.list_models('multigrain*', pretrained=True)
            if str(get_pretrained_cfg(name).url or '').startswith(SERVER)]


def official_metrics(tag: str) -> list[Metric]:
    """The figures that the authors published for a tag."""
    return [
        Metric('classification', 'ImageNet-1k', metric, value, size, p, protocol, None, split='validation', **_PAPER)
        for value, metric, size, p, protocol in _PUBLISHED.get(_file(tag), ())]


def publish_official(
        org: str,
        *,
        tags: Sequence[str] | None = None,
        work_dir: str | os.PathLike = 'multigrain-official',
        source_dir: str | os.PathLike | None = None,
        private: bool = False,
        dry_run: bool = False,
        api: 'HfApi | None' = None,
) -> OfficialRun:
    """Convert the authors' weights and publish each tag as ORG/<model>.<tag>.

    A tag whose repository holds the same model.safetensors and config.json is left alone, one that is converted already
    is not converted again, and one that fails does not stop the others: repeat the run until none fails.

    Args:
        org: User or organization.
        tags: The tags; None for all of them.
        work_dir: Folder of the converted models, one folder a tag.
        source_dir: Folder with the authors' files, under their names; None to download them.
        private: Make new repositories that only their owners see.
        dry_run: Convert and write the cards, and leave the Hub alone.
        api: huggingface_hub's client; None for the configured Hub and token.

    Raises:
        ValueError: An unknown tag, or an impossible name.
        RuntimeError: No token, a token that may only read, or no connection to the Hub.
    """
    tags = _check_tags(tags)
    if not dry_run:
        if api is None:
            from huggingface_hub import HfApi
            api = HfApi()
        own_name(api, f'{org}/{tags[0]}')
    run = OfficialRun()
    for tag in tqdm(tags, desc='official weights', disable=None):
        try:
            folder = _convert(tag, Path(work_dir), source_dir)
            _publish_tag(run, tag, folder, f'{org}/{tag}', private, api)
        except (OSError, RuntimeError, ValueError) as e:
            run.failed[tag] = ' '.join(str(e).split())
    return run


def _check_tags(tags: Iterable[str] | None) -> list[str]:
    known = official_tags()
    for tag in tags or ():
        if tag not in known:
            raise ValueError(f'{tag} is no official tag: choose from {", ".join(known)}.')
    return list(tags or known)


def _convert(tag: str, work_dir: Path, source_dir: str | os.PathLike | None) -> Path:
    """The folder of the converted tag; one that is there is complete, as folders appear whole or not at all."""
    from timm_multigrain.convert import convert_checkpoint

    folder = work_dir / tag
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder
    source = tag
    if source_dir is not None:
        source = Path(source_dir) / _file(tag)
        if not source.is_file():
            raise FileNotFoundError(
                f'{source} is not there: download it from {get_pretrained_cfg(tag).url}, or let it be downloaded.')
    return Path(convert_checkpoint(source, folder, model_name=tag.partition('.')[0]).directory)


def _file(tag: str) -> str:
    """Name of a tag's file on the authors' server."""
    return get_pretrained_cfg(tag).url.rpartition('/')[2]


def _publish_tag(
        run: OfficialRun, tag: str, folder: Path, repo_id: str, private: bool, api: 'HfApi | None') -> None:
    facts = _facts(tag, get_pretrained_cfg(tag), repo_id)
    if api is None:
        write_card(_load(folder), folder, facts)
        run.prepared[tag] = folder
        return
    target = Target(api, repo_id, private=private)
    remote = look(api, repo_id)
    if remote is not None and remote.holds([folder / WEIGHTS, folder / CONFIG]):
        run.unchanged[tag] = target.url
        return
    target.check(remote)
    with tempfile.TemporaryDirectory(prefix='multigrain-') as work:
        write_card(_load(folder), folder, facts, fetch_base(target, remote, Path(work)))
    run.published[tag] = publish_folder(folder, target, remote)


def _load(folder: Path):
    return timm.create_model(f'local-dir:{folder}', pretrained=True)


def _facts(tag: str, cfg: PretrainedCfg, repo_id: str) -> CardFacts:
    description = (
        f'`{tag}` of timm_multigrain: the weights of {cfg.url} by the authors of the paper ({cfg.origin_url}), '
        f"converted to safetensors and otherwise unchanged. {cfg.description}. The figures below are the authors'.")
    return CardFacts(
        repo_id, cfg.license, metrics=official_metrics(tag), description=description, datasets=('imagenet-1k',))
