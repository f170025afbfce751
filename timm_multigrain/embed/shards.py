"""Descriptors of named images, in memory or in a folder of shards, each of which appears whole or not at all.

    manifest.json             what the descriptors were made with and how many shards there are
    shard-00000.safetensors   `vectors` (n, D) float32; in the header the names, the skipped images and a SHA-256

A shard holds the images of one stretch of the list.
"""
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save

from timm_multigrain.files import check_json, fsync, parse_json, read_json, write_bytes, write_text
from timm_multigrain.images.sources import printable

__all__ = [
    'DamagedShard', 'Descriptors', 'Shard', 'iter_shards', 'read_manifest', 'read_shard', 'shard_path',
    'write_manifest', 'write_shard']

MANIFEST = 'manifest.json'
FORMAT = {'format': 'timm_multigrain descriptors', 'format_version': 1}
_FORM = {'shards': int, 'shard_size': int, 'images': {'number': int, 'sha256': str}, 'settings': {'components': int}}


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Descriptors of named images.

    Attributes:
        names: Name of each image.
        vectors: (N, D) float32, a row per image.
        skipped: Images that could not be read, and why.
        info: What they were made with: model, protocol, versions.
    """
    names: tuple[str, ...]
    vectors: torch.Tensor
    skipped: dict[str, str] = field(default_factory=dict)
    info: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        skipped = f', {len(self.skipped)} images skipped' if self.skipped else ''
        return f'{len(self)} descriptors of {self.vectors.shape[1]} components{skipped}'

    @classmethod
    def load(cls, folder: str | os.PathLike) -> 'Descriptors':
        """The descriptors in a folder that `extract` or `timm-multigrain embed` wrote, whole and checked.

        Raises:
            FileNotFoundError: No descriptors found.
            FileExistsError: The folder holds other things.
            ValueError: A shard is missing or damaged.
        """
        manifest = _manifest(folder)
        shards = [read_shard(folder, number, manifest) for number in range(manifest['shards'])]
        skipped = {name: reason for shard in shards for name, reason in shard.skipped.items()}
        names = tuple(name for shard in shards for name in shard.names)
        return cls(names, torch.cat([shard.vectors for shard in shards]), skipped, manifest)


def iter_shards(folder: str | os.PathLike) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """(names, vectors) of the descriptors in a folder, one checked shard at a time; errors as of `Descriptors.load`."""
    manifest = _manifest(folder)
    for number in range(manifest['shards']):
        shard = read_shard(folder, number, manifest)
        yield shard.names, shard.vectors


def _manifest(folder: str | os.PathLike) -> dict:
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f'{printable(folder)} has no descriptors: write them with timm-multigrain embed.')
    return manifest


class DamagedShard(ValueError):
    """A shard that is missing, damaged, or of another extraction."""


class Shard(NamedTuple):
    """Some of the descriptors: names and (n, D) float32 vectors, and why images were skipped."""
    names: tuple[str, ...]
    vectors: torch.Tensor
    skipped: dict[str, str]


def shard_path(folder: str | os.PathLike, number: int) -> Path:
    return Path(folder) / f'shard-{number:05d}.safetensors'


def write_manifest(folder: str | os.PathLike, manifest: dict) -> None:
    write_text(Path(folder) / MANIFEST, json.dumps({**FORMAT, **manifest}, indent=1) + '\n')
    fsync(folder)


def read_manifest(folder: str | os.PathLike) -> dict | None:
    """The manifest of a folder; None if it does not exist or is empty.

    Raises:
        FileExistsError: The path is a file, or a folder that holds other things than descriptors.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        check_json(manifest, {}, MANIFEST)
        if {key: manifest.pop(key, None) for key in FORMAT} == FORMAT:
            check_json(manifest, _FORM, MANIFEST)
            if manifest['shards'] < 1:
                raise ValueError('it has no shards')
            return manifest
        reason = 'its manifest.json is of something else, or of another version'
    except FileNotFoundError:
        if all(path.name.startswith(f'.{MANIFEST}-') for path in folder.iterdir()):  # killed while it was written
            return None
        reason = 'it has no manifest.json'
    except (OSError, ValueError) as e:
        reason = f'manifest.json cannot be read ({type(e).__name__})'
    raise FileExistsError(f'{printable(folder)} has no descriptors, {reason}: name another folder.')


def write_shard(folder: str | os.PathLike, number: int, manifest: dict, shard: Shard) -> None:
    names = {'names': shard.names, 'skipped': shard.skipped}
    header = {**names, 'sha256': _digest(manifest, number, names, shard.vectors)}
    write_bytes(shard_path(folder, number), save({'vectors': shard.vectors}, metadata={'shard': json.dumps(header)}))
    fsync(folder)


def read_shard(folder: str | os.PathLike, number: int, manifest: dict) -> Shard:
    """A shard, checked.

    Raises:
        DamagedShard: It is missing, damaged, or of another extraction.
    """
    path = shard_path(folder, number)
    again = 'run the same extraction again, it makes the shard anew.'
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            header = parse_json(file.metadata()['shard'])
            vectors = file.get_tensor('vectors')
        check_json(header, {'names': [str], 'skipped': {str: str}, 'sha256': str}, 'shard')
        names = {'names': header['names'], 'skipped': header['skipped']}
        form = len(names['names']), manifest['settings']['components']
        if vectors.dtype != torch.float32 or vectors.shape != form:
            raise ValueError(f'it has {vectors.dtype} of shape {tuple(vectors.shape)} for {form[0]} names')
    except FileNotFoundError:
        raise DamagedShard(f'{printable(path)} is missing: {again}') from None
    except Exception as e:  # whatever a damaged header leads to
        raise DamagedShard(f'{printable(path)} cannot be read ({type(e).__name__}: {e}): {again}') from e
    if header['sha256'] != _digest(manifest, number, names, vectors):
        raise DamagedShard(f'{printable(path)} is damaged or of another extraction: {again}')
    return Shard(tuple(header['names']), vectors, header['skipped'])


def _digest(manifest: dict, number: int, names: dict, vectors: torch.Tensor) -> str:
    """SHA-256 of a shard's content and of what it belongs to."""
    digest = hashlib.sha256(json.dumps([manifest, number, names, list(vectors.shape), str(vectors.dtype)]).encode())
    if vectors.numel():
        digest.update(memoryview(vectors.contiguous().numpy()).cast('B'))
    return digest.hexdigest()
