"""The web app as a Hugging Face Space: a folder that runs anywhere, and its upload.

The folder has the app, a copy of the index with its model, small copies of the pictures, and this package. Of the
pictures neither the originals nor their metadata (places, dates) go along, and of their paths only the part below the
indexed folders.
"""
import os
import re
import shutil
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from timm_multigrain.files import write_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from .index import Index

__all__ = ['publish_space', 'write_space']

MARK = 'timm-multigrain-space'  # a tag of the README, by which a folder or Space is known as one of ours
SIDE = 640  # pixels, the longer side of the copies
PICTURES, ZIP = 'pictures', 'pictures.zip'
OWN = ('app.py', 'README.md', 'requirements.txt', ZIP, 'index', 'timm_multigrain')
APP = '''"""Search this collection by a picture. Written by timm_multigrain."""
import zipfile
from pathlib import Path

from timm_multigrain.collection import Index
from timm_multigrain.collection.app import launch_app

here = Path(__file__).resolve().parent
if not (here / 'pictures').is_dir():
    with zipfile.ZipFile(here / 'pictures.zip') as file:
        file.extractall(here / 'pictures')
launch_app(Index.open(here / 'index'), host=None, title={title!r})
'''
TEXT = '''
# {title}

{images:,} pictures to search by example, and the copies among them: an index of
[MultiGrain](https://arxiv.org/abs/1902.05509) descriptors. `python app.py` runs it anywhere.
'''


def write_space(index: 'Index', directory: str | os.PathLike, *, title: str | None = None, side: int = SIDE) -> Path:
    """Write the folder of a Space; an earlier one is replaced.

    Args:
        index: The index.
        directory: Folder to write.
        title: Title of the app.
        side: Longer side of the copies of the pictures, pixels.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds other things.
        OSError: It cannot be written, or the model of the index cannot be opened.
        ValueError: The index is empty.
    """
    directory, title = Path(directory), title or f'{len(index):,} pictures'
    if not len(index):
        raise ValueError(f'{index.path} has no images: index some first.')
    others = sorted({path.name for path in directory.iterdir()} - {*OWN, PICTURES}) if directory.is_dir() else []
    if others or directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not _is_ours(directory)):
        raise FileExistsError(f'{directory} exists and is no Space that was written before: name another folder.')
    model = index.model()
    if directory.is_dir():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    names = _write_pictures(index, directory / ZIP, side)
    _write_index(index, model, directory / 'index', names)
    _copy_package(directory / 'timm_multigrain')
    write_text(directory / 'requirements.txt', _requirements())
    write_text(directory / 'app.py', APP.format(title=title))
    write_text(directory / 'README.md', _readme(title, len(index)))
    return directory


def _is_ours(directory: Path) -> bool:
    try:
        return MARK in (directory / 'README.md').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return False


def _write_pictures(index: 'Index', path: Path, side: int) -> list[bytes]:
    """Small copies in one file, and their names in it, row by row; a picture that is gone has a name and no copy."""
    from timm_multigrain.images.sources import UnreadableImage, read_image

    names = []
    with zipfile.ZipFile(path, 'w') as file:
        for row in range(len(index)):
            own = index.store.relative_path(index.columns[row]).decode('utf-8', 'replace')
            name = re.sub(r'[^\w./ ()+-]|(?<![^/])\.+(?=/)', '_', own, flags=re.ASCII) + f'.{row}.jpg'
            names.append(name.encode())
            try:
                image = read_image(index.path_of(row), exif=index.protocol().exif)
            except UnreadableImage:
                continue
            image.thumbnail((side, side))
            with file.open(zipfile.ZipInfo(name), 'w') as entry:
                image.save(entry, 'JPEG', quality=85)
    return names


def _write_index(index: 'Index', model, folder: Path, names: list[bytes]) -> None:
    """The same rows in a new index whose model is inside, and whose only folder is that of the small copies."""
    from timm_multigrain.hub import save_pretrained

    from .store import Store, StoreWriter

    folder.mkdir()
    save_pretrained(model, folder / 'model', index.label_names if model.num_classes else None)
    config = dict(index.store.config)
    config['model'] = {**config['model'], 'source': None, 'options': {}}
    StoreWriter.create(folder, config)
    writer = StoreWriter(Store(folder))
    try:
        writer.roots.append(f'../{PICTURES}')
        for start in range(0, len(index), 4096):
            rows = index.columns[start:start + 4096].copy()
            rows['root'] = 0
            writer.add(names[start:start + 4096], rows, index.vectors[start:start + 4096])
        writer.commit()
    finally:
        writer.close()


def _copy_package(folder: Path) -> None:
    """This package itself, so that the Space needs no release of it."""
    source = Path(__file__).resolve().parents[1]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns('__pycache__', '*.pyc', '.*'))


def _requirements() -> str:
    """What the package needs, with the smaller builds of torch without CUDA; gradio comes with the Space."""
    needed = [line for line in metadata.requires('timm_multigrain') or [] if 'extra ==' not in line]
    return '\n'.join(['--extra-index-url https://download.pytorch.org/whl/cpu', *needed]) + '\n'


def _readme(title: str, images: int) -> str:
    head = {'title': title, 'sdk': 'gradio', 'sdk_version': metadata.version('gradio'), 'app_file': 'app.py',
            'pinned': False, 'tags': [MARK, 'multigrain', 'image-retrieval']}
    plain = re.sub(r'([\\`*_{}\[\]<>#|])', r'\\\1', ' '.join(title.split()))
    return f'---\n{yaml.safe_dump(head, sort_keys=False)}---\n{TEXT.format(title=plain, images=images)}'


def publish_space(
        folder: str | os.PathLike, repo_id: str, *, private: bool = True, api: 'HfApi | None' = None) -> str:
    """Upload a folder of `write_space` as a Space, in one commit. A Space that it had made before is replaced.

    Args:
        folder: The folder.
        repo_id: USER/NAME, or NAME for one's own.
        private: Whether a new Space is seen by its owners only.
        api: huggingface_hub's client; None for the configured Hub and token.

    Returns:
        Address of the Space.

    Raises:
        ValueError: The folder or the Space was not made here, an impossible name, or private was asked for and the
            Space is public.
        OSError, RuntimeError: Token, rights, network or the Hub; a Space that was created for it is deleted again.
    """
    from huggingface_hub import HfApi

    from timm_multigrain.hub.errors import hub_errors
    from timm_multigrain.hub.remote import own_name

    folder, api = Path(folder), api or HfApi()
    if not (folder.is_dir() and _is_ours(folder)):
        raise ValueError(f'{folder} is no folder of a Space: write one with timm-multigrain app INDEX --space {folder}')
    repo_id = own_name(api, repo_id)
    there = _look(api, repo_id, private)
    files = sorted(path for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts
                   and path.relative_to(folder).parts[0] in OWN)
    with hub_errors(f'the Space {repo_id} could not be published', api.endpoint):
        if there is None:
            api.create_repo(repo_id, repo_type='space', space_sdk='gradio', private=private)
        try:
            _commit(api, repo_id, folder, files, there or set())
        except BaseException:
            if there is None:
                api.delete_repo(repo_id, repo_type='space')
            raise
    return f'{api.endpoint}/spaces/{repo_id}'


def _look(api: 'HfApi', repo_id: str, private: bool) -> set[str] | None:
    """Files of the Space, None if there is none."""
    from huggingface_hub.utils import RepositoryNotFoundError

    from timm_multigrain.hub.errors import hub_errors

    with hub_errors(f'the Space {repo_id} could not be looked up', api.endpoint):
        try:
            info = api.repo_info(repo_id, repo_type='space')
        except RepositoryNotFoundError as e:
            if e.response is not None and e.response.status_code == 401:
                raise
            return None
        files = {file.rfilename for file in info.siblings or []}
        ours = 'README.md' in files and MARK in Path(
            api.hf_hub_download(repo_id, 'README.md', repo_type='space', revision=info.sha)).read_text('utf-8')
    if not ours and files - {'.gitattributes', 'README.md'}:
        raise ValueError(f'The Space {repo_id} is another app: name another one, or delete it.')
    if private and not info.private:
        raise ValueError(f'The Space {repo_id} is there and public, so everybody would see the pictures: publish with '
                         '--public if that is meant, or name another one.')
    return files


def _commit(api: 'HfApi', repo_id: str, folder: Path, files: list[Path], there: set[str]) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [path.relative_to(folder).as_posix() for path in files]
    operations = [CommitOperationAdd(name, path) for name, path in zip(names, files, strict=True)]
    gone = {name for name in there - set(names) if name.split('/')[0] in OWN}
    operations += [CommitOperationDelete(name) for name in sorted(gone)]
    api.create_commit(repo_id, operations, commit_message='Publish with timm_multigrain', repo_type='space')
