"""Descriptors on disk: a folder with a manifest and shards, each of which appears whole or not at all.

    manifest.json             what the descriptors were made with and how many shards there are
    shard-00000.safetensors   `vectors` (n, D) float32; in the header the names, the skipped images and a SHA-256

A shard holds the images of one stretch of the list, so that its bytes depend on nothing but manifest and images.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save

from timm_multigrain.files import check_json, fsync, parse_json, read_json, write_bytes, write_text
from timm_multigrain.images.sources import printable

__all__ = ['DamagedShard', 'Shard', 'read_manifest', 'read_shard', 'shard_path', 'write_manifest', 'write_shard']

MANIFEST = 'manifest.json'
FORMAT = {'format': 'timm_multigrain descriptors', 'format_version': 1}


_FORM = {'shards': int, 'shard_size': int, 'images': {'number': int, 'sha256': str}, 'settings': {'components': int}}


class DamagedShard(ValueError):
    """A shard that is missing, damaged, or of another extraction."""


class Shard(NamedTuple):
    """Part of the descriptors: names and (n, D) float32 vectors, and why images were skipped."""
    names: tuple[str, ...]
    vectors: torch.Tensor
    skipped: dict[str, str]


def shard_path(folder: str | os.PathLike, number: int) -> Path:
    return Path(folder) / f'shard-{number:05d}.safetensors'


def write_manifest(folder: str | os.PathLike, manifest: dict) -> None:
    write_text(Path(folder) / MANIFEST, json.dumps({**FORMAT, **manifest}, indent=1) + '\n')
    fsync(folder)


def read_manifest(folder: str | os.PathLike) -> dict | None:
    """The manifest of a folder; None if there is no such folder, or nothing in it.

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
        started = all(path.name.startswith(f'.{MANIFEST}-') for path in folder.iterdir())
        if started:  # killed while it wrote the manifest
            return None
        reason = 'it has no manifest.json'
    except (OSError, ValueError, AttributeError) as e:
        reason = f'manifest.json cannot be read ({type(e).__name__})'
    raise FileExistsError(f'{printable(folder)} holds no descriptors, {reason}: name another folder.')


def write_shard(folder: str | os.PathLike, number: int, manifest: dict, shard: Shard) -> None:
    names = {'names': shard.names, 'skipped': shard.skipped}
    header = {**names, 'sha256': _digest(manifest, number, names, shard.vectors)}
    # one entry: the order of several is not fixed, and neither would be the bytes
    write_bytes(shard_path(folder, number), save({'vectors': shard.vectors}, metadata={'shard': json.dumps(header)}))
    fsync(folder)


def read_shard(folder: str | os.PathLike, number: int, manifest: dict) -> Shard:
    """A shard, checked.

    Raises:
        DamagedShard: It is missing, damaged, or of another extraction.
    """
    path = shard_path(folder, number)
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            header = parse_json(file.metadata()['shard'])
            vectors = file.get_tensor('vectors')
        names = {'names': header['names'], 'skipped': header['skipped']}
        check_json(names, {'names': [str], 'skipped': {str: str}}, 'shard')
        form = len(names['names']), manifest['settings']['components']
        if vectors.dtype != torch.float32 or vectors.shape != form:
            raise ValueError(f'it has {vectors.dtype} of shape {tuple(vectors.shape)} for {form[0]} names')
        whole = header['sha256'] == _digest(manifest, number, names, vectors)
    except FileNotFoundError:
        raise DamagedShard(f'{printable(path)} is missing: run the same extraction again, it makes what is missing.') \
            from None
    except Exception as e:  # whatever a damaged header leads to
        raise DamagedShard(f'{printable(path)} cannot be read ({type(e).__name__}: {e}): run the same extraction '
                           'again, it makes the shard anew.') from e
    if not whole:
        raise DamagedShard(f'{printable(path)} is damaged or of another extraction: run the same extraction again, it '
                           'makes the shard anew.')
    return Shard(tuple(header['names']), vectors, header['skipped'])


def _digest(manifest: dict, number: int, names: dict, vectors: torch.Tensor) -> str:
    """SHA-256 of a shard's content and of what it belongs to."""
    digest = hashlib.sha256(json.dumps([manifest, number, names, list(vectors.shape), str(vectors.dtype)]).encode())
    if vectors.numel():
        digest.update(memoryview(vectors.contiguous().numpy()).cast('B'))
    return digest.hexdigest()
