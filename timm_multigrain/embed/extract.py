"""Extraction in memory, or into a folder that can be interrupted at any time, by any number of processes.

The list is cut into fixed shards, which are dealt to the processes of torchrun. Shards that exist and are
whole, by their hash, are not made again.
"""
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torch.distributed as dist

from timm_multigrain.images.sources import ImageSource, UnreadableImage, printable
from timm_multigrain.models.config import json_p
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.version import __version__

from .embedder import Decoded, Embedder, embed_images, in_order, none_readable, progress_bar
from .protocol import Protocol
from .shards import DamagedShard, Descriptors, Shard, read_manifest, read_shard, write_manifest, write_shard

__all__ = ['Extraction', 'extract', 'extract_shards', 'skipped_lines']

_WAIT = timedelta(days=30)  # processes wait for the slowest one
_COMPARED = {'model': 'model', 'protocol': 'protocol', 'images': 'list of images', 'settings': 'settings',
             'shard_size': 'shard size', 'versions': 'versions'}


@dataclass(frozen=True)
class Extraction:
    """What is in the folder.

    Attributes:
        folder: Folder of the shards.
        number: Images with a descriptor.
        width: Components of a descriptor.
        skipped: Images that could not be read, and why.
    """
    folder: Path
    number: int
    width: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        return '\n'.join([f'{self.number} descriptors of {self.width} components in {printable(self.folder)}',
                          *skipped_lines(self.skipped, 20)])


def skipped_lines(skipped: Mapping[str, str], most: int = 1) -> list[str]:
    """Lines that say how many images could not be read, and the reasons of the first."""
    if not skipped:
        return []
    more = [f'  and {len(skipped) - most} more'] * (len(skipped) > most)
    return [f'{len(skipped)} images could not be read and were skipped:',
            *(f'  {reason}' for reason in islice(skipped.values(), most)), *more]


def extract(
        model: torch.nn.Module,
        source: ImageSource,
        protocol: Protocol,
        out_dir: str | os.PathLike | None = None,
        *,
        strict: bool = False,
        shard_size: int = 1024,
        **extraction,
) -> Descriptors:
    """Descriptors of all images, in the order of the source.

    Args:
        model: Model.
        source: Images.
        protocol: Size, crop, scales, flip.
        out_dir: Folder to keep them in, see `extract_shards`; in memory only if None.
        strict: Stop at the first image that cannot be read instead of leaving it out.
        shard_size: Images of a file in the folder.
        **extraction: As of `embed_images`: batch_size, workers, device, dtype, descriptor, dim, fast, progress.

    Raises:
        UnreadableImage: With ``strict``.
        ValueError: No image could be read, or as `extract_shards`.
    """
    if out_dir is not None:
        extract_shards(model, source, protocol, out_dir, strict=strict, shard_size=shard_size, **extraction)
        return Descriptors.load(out_dir)
    skipped = {}
    batches = list(embed_images(
        model, source, protocol, errors='raise' if strict else 'skip', on_error=skipped.__setitem__, **extraction))
    if not batches:
        raise ValueError(none_readable(len(source), skipped.values()))
    indices, vectors = in_order(batches)
    return Descriptors(
        tuple(source.names[i] for i in indices), vectors, {source.names[i]: skipped[i] for i in sorted(skipped)},
        {'protocol': protocol.to_dict()})


def extract_shards(
        model: torch.nn.Module,
        source: ImageSource,
        protocol: Protocol,
        out_dir: str | os.PathLike,
        *,
        strict: bool = False,
        shard_size: int = 1024,
        progress: bool = True,
        device: str | torch.device | None = None,
        **extraction,
) -> Extraction:
    """Embed images into a folder of shards; shards that exist and are whole are not computed again.

    Under torchrun the shards are shared out among the processes, each on its GPU (device='cuda') or on the CPU; all
    of them return when all shards are done.

    Args:
        model: Model.
        source: Images.
        protocol: Size, crop, scales, flip.
        out_dir: Folder, made if missing.
        strict: Stop at the first image that cannot be read instead of leaving it out.
        shard_size: Images of a shard: what a killed process loses at most.
        progress: Show a bar if stderr is a terminal.
        device: Where the model runs; where it is by default.
        **extraction: batch_size, workers, dtype, descriptor, dim and fast of `embed_images`.

    Raises:
        UnreadableImage: With ``strict``.
        FileExistsError: The folder holds other things.
        ValueError: It holds descriptors of another model, protocol or list, or no image could be read.
    """
    if shard_size < 1:
        raise ValueError(f'shard_size={shard_size}: give at least 1.')
    if not len(source):
        raise ValueError(none_readable(0, ()))
    folder = Path(out_dir)
    with _processes(device) as (rank, world, agree, device):
        embedder = Embedder(model, protocol, device=device, **extraction)
        manifest = _manifest(embedder, source, shard_size)
        todo = agree(lambda: _prepare(folder, manifest))[rank::world]
        title = 'Embedding' if world == 1 else f'Embedding (process 1 of {world})'
        with progress_bar(sum(len(_stretch(manifest, n)) for n in todo), progress and rank == 0, title) as bar:
            for number, shard in _make(embedder, source, manifest, todo, strict, bar):
                write_shard(folder, number, manifest, shard)
        return agree(lambda: _finish(folder, manifest, strict))


def _make(embedder: Embedder, source: ImageSource, manifest: dict, todo: Sequence[int], strict: bool,
          bar) -> Iterator[tuple[int, Shard]]:
    """The shards of these numbers, all read by the same workers."""
    def skip(item: Decoded) -> None:
        if strict:
            raise UnreadableImage(item.message)
        skipped[item.index] = item.message
        bar.update()

    if not todo:
        return
    stream = embedder.decode(source, [i for number in todo for i in _stretch(manifest, number)])
    with embedder.evaluating(), contextlib.closing(stream):
        for number in todo:
            batches, skipped = [], {}
            for batch in embedder.embed(islice(stream, len(_stretch(manifest, number))), skip):
                batches.append(batch)
                bar.update(len(batch.indices))
            rows, vectors = in_order(batches) if batches else ([], torch.empty(0, embedder.width))
            yield number, Shard(
                tuple(source.names[i] for i in rows), vectors, {source.names[i]: skipped[i] for i in sorted(skipped)})


def _stretch(manifest: dict, number: int) -> range:
    """The images of a shard."""
    size = manifest['shard_size']
    return range(number * size, min((number + 1) * size, manifest['images']['number']))


def _manifest(embedder: Embedder, source: ImageSource, shard_size: int) -> dict:
    model = embedder.model
    return {
        'model': {
            'name': getattr(model, 'trunk_name', type(model).__name__), 'pool': getattr(model, 'global_pool', None),
            'p': json_p(getattr(model, 'gem_p', None)), 'whitened': model.whitened,
            'weights_sha256': weights_sha256(model)},
        'protocol': embedder.protocol.to_dict(),
        'images': {'number': len(source), 'sha256': source.fingerprint()},
        'settings': {
            'descriptor': embedder.descriptor, 'components': embedder.width, 'fast': embedder.fast,
            'dtype': str(embedder.dtype or torch.float32).removeprefix('torch.'), 'device': embedder.device.type},
        'shard_size': shard_size, 'shards': -(-len(source) // shard_size),
        'versions': {'timm_multigrain': __version__, 'torch': str(torch.__version__), 'timm': timm.__version__,
                     'pillow': PIL.__version__},
    }


def _prepare(folder: Path, manifest: dict) -> list[int]:
    """Numbers of the shards that are to be made."""
    found = read_manifest(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
        return list(range(manifest['shards']))
    for part, title in _COMPARED.items():
        if found.get(part) != manifest[part]:
            raise ValueError(f'{printable(folder)} holds descriptors of other {title} '
                             f'({_difference(found.get(part), manifest[part])}): name another folder, or delete it.')
    todo = []
    for number in range(manifest['shards']):
        try:
            read_shard(folder, number, manifest)
        except DamagedShard:
            todo.append(number)
    return todo


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f'{printable(str(found))}, now {wanted}'
    key = next(key for key in {**wanted, **found} if found.get(key, 'not given') != wanted.get(key, 'not given'))
    return f'{printable(key)} {printable(str(found.get(key, "not given")))}, now {wanted.get(key, "not given")}'


def _finish(folder: Path, manifest: dict, strict: bool) -> Extraction:
    for path in [*folder.glob('.shard-*'), *folder.glob('.manifest.json-*')]:  # of processes that were killed
        path.unlink(missing_ok=True)
    number, skipped = 0, {}
    for shard in (read_shard(folder, n, manifest) for n in range(manifest['shards'])):
        number += len(shard.names)
        skipped.update(shard.skipped)
    if strict and skipped:
        raise UnreadableImage(next(iter(skipped.values())))
    if not number:
        raise ValueError(none_readable(len(skipped), skipped.values()))
    return Extraction(folder, number, manifest['settings']['components'], skipped)


@contextlib.contextmanager
def _processes(device: Any) -> Iterator[tuple[int, int, Callable, Any]]:
    """Rank, number of processes, a way to run something in the first one for all, and this process's device."""
    started = dist.is_available() and dist.is_initialized()
    if not started and int(os.environ.get('WORLD_SIZE', 1)) == 1:
        yield 0, 1, lambda function: function(), device
        return
    on_gpu = device is not None and torch.device(device).type == 'cuda'
    if on_gpu and torch.device(device).index is None:
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
    if not started:
        dist.init_process_group('cpu:gloo,cuda:nccl' if on_gpu else 'gloo', timeout=_WAIT)
    group = dist.new_group(backend='gloo', timeout=_WAIT)

    def agree(function: Callable) -> Any:
        dist.barrier(group)
        answer = [None, None]
        if dist.get_rank() == 0:
            try:
                answer[0] = function()
            except Exception as e:  # for every process to raise
                answer[1] = e
        dist.broadcast_object_list(answer, src=0, group=group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    try:
        yield dist.get_rank(), dist.get_world_size(), agree, device
    finally:
        if not started:
            dist.destroy_process_group()
