"""Descriptors of named images, in memory or in a folder of shards, each of which appears whole or not at all.

    manifest.json             what the descriptors were made with and how many shards there are
    shard-00000.safetensors   `vectors` (n, D) float32; in the header the names, the skipped images and a SHA-256

A shard holds the images of one stretch of the list.
"""
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

from timm_multigrain.files import check_json, counted, fsync, parse_json, printable, read_json, write_bytes, write_text

MANIFEST = 'manifest.json'
FORMAT = {'format': 'timm_multigrain descriptors', 'format_version': 1}
_FORM = {'shards': int, 'shard_size': int, 'images': {'number': int, 'sha256': str}, 'settings': {'components': int}}


class Descriptors:
    """Descriptors of named images, in memory or in a folder.

    Attributes:
        names: Name of each image.
        skipped: Images that could not be read, and why.
        info: What they were made with: model, protocol, versions.
        folder: Where they are, None in memory.
    """

    def __init__(self, names: Sequence[str], vectors: torch.Tensor | None, skipped: Mapping[str, str] | None = None,
                 info: Mapping | None = None, folder: str | os.PathLike | None = None):
        self.names, self.skipped, self.info, self.folder = tuple(names), dict(skipped or {}), dict(info or {}), folder
        if vectors is not None:
            self.vectors = vectors

    @cached_property
    def vectors(self) -> torch.Tensor:
        """(N, D) float32, a row per image; read from the folder when they are first asked for."""
        return torch.cat([vectors for _, vectors in iter_shards(self.folder)])

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        width = self.info['settings']['components'] if self.folder is not None else self.vectors.shape[1]
        where = '' if self.folder is None else f' in {printable(self.folder)}'
        text = f'{counted(len(self), "descriptor")} of {width} components{where}'
        return '\n'.join([text, *skipped_lines(self.skipped, 20)])

    @classmethod
    def load(cls, folder: str | os.PathLike) -> 'Descriptors':
        """The descriptors in a folder that `extract` or `timm-multigrain embed` wrote, whole and checked.

        Raises:
            FileNotFoundError: No descriptors found.
            FileExistsError: The folder holds other things.
            ValueError: A shard is missing or damaged.
        """
        manifest, names, skipped = read_manifest(folder), [], {}
        for shard in _read_shards(folder, manifest):
            names += shard.names
            skipped.update(shard.skipped)
        return cls(names, None, skipped, manifest, folder)


def skipped_lines(skipped: Mapping[str, str], most: int = 1) -> list[str]:
    """Lines that say how many images could not be read, and the reasons of the first."""
    if not skipped:
        return []
    more = [f'  and {len(skipped) - most} more'] * (len(skipped) > most)
    return [f'{counted(len(skipped), "image")} could not be read:',
            *(f'  {reason}' for reason in islice(skipped.values(), most)), *more]


def iter_shards(folder: str | os.PathLike) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """(names, vectors) of the descriptors in a folder, one checked shard at a time; errors as of `Descriptors.load`."""
    for shard in _read_shards(folder, read_manifest(folder)):
        yield shard.names, shard.vectors


def _read_shards(folder: str | os.PathLike, manifest: dict | None) -> Iterator[Descriptors]:
    if manifest is None:
        raise FileNotFoundError(f'{printable(folder)} has no descriptors: write them with timm-multigrain embed.')
    return (read_shard(folder, number, manifest) for number in range(manifest['shards']))


class DamagedShard(ValueError):
    """A shard that is missing, damaged, or of another extraction."""


def shard_path(folder: str | os.PathLike, number: int) -> Path:
    return Path(folder) / f'shard-{number:05d}.safetensors'


def write_manifest(folder: str | os.PathLike, manifest: dict) -> None:
    write_text(Path(folder) / MANIFEST, json.dumps({**FORMAT, **manifest}, indent=1) + '\n')
    fsync(folder)


def read_manifest(folder: str | os.PathLike) -> dict | None:
    """The manifest of a folder; None if the folder does not exist or is empty.

    Raises:
        FileExistsError: The path is a file, or a folder that holds other things than descriptors.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        check_json(manifest, {}, MANIFEST)
        if {key: manifest.pop(key, None) for key in FORMAT} == FORMAT:
            check_json(manifest, _FORM, MANIFEST)
            if manifest['shards'] > 0:
                return manifest
        reason = 'its manifest.json is of something else, or of another version'
    except FileNotFoundError:
        if all(path.name.startswith(f'.{MANIFEST}-') for path in folder.iterdir()):  # killed while it was written
            return None
        reason = 'it has no manifest.json'
    except (OSError, ValueError) as e:
        reason = f'manifest.json cannot be read ({type(e).__name__})'
    raise FileExistsError(f'{printable(folder)} has no descriptors, {reason}: name another folder.')


def write_shard(folder: str | os.PathLike, number: int, manifest: dict, shard: Descriptors) -> None:
    names = {'names': shard.names, 'skipped': shard.skipped}
    header = {**names, 'sha256': _digest(manifest, number, names, shard.vectors)}
    write_bytes(shard_path(folder, number), save({'vectors': shard.vectors}, metadata={'shard': json.dumps(header)}))
    fsync(folder)


def read_shard(folder: str | os.PathLike, number: int, manifest: dict) -> Descriptors:
    """A shard, checked; DamagedShard if it is missing, damaged, or of another extraction."""
    path = shard_path(folder, number)
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            header = parse_json(file.metadata()['shard'])
            vectors = file.get_tensor('vectors')
        check_json(header, {'names': [str], 'skipped': {str: str}, 'sha256': str}, 'shard')
        names = {'names': header['names'], 'skipped': header['skipped']}
        if vectors.dtype != torch.float32 or vectors.shape != (len(names['names']), manifest['settings']['components']):
            raise ValueError(f'{vectors.dtype} of shape {tuple(vectors.shape)} for {len(names["names"])} names')
        if header['sha256'] != _digest(manifest, number, names, vectors):
            raise ValueError('another hash')
    except Exception as e:  # whatever a damaged header leads to
        reason = 'is missing' if isinstance(e, FileNotFoundError) else f'cannot be read ({type(e).__name__}: {e})'
        raise DamagedShard(f'{printable(path)} {reason}: run the same extraction again, which makes it anew.') from e
    return Descriptors(header['names'], vectors, header['skipped'])


def _digest(manifest: dict, number: int, names: dict, vectors: torch.Tensor) -> str:
    """SHA-256 of a shard's content and of what it belongs to."""
    digest = hashlib.sha256(json.dumps([manifest, number, names, list(vectors.shape), str(vectors.dtype)]).encode())
    digest.update(vectors.contiguous().numpy().tobytes())
    return digest.hexdigest()
