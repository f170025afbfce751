"""Extraction in memory, or into a folder that can be interrupted at any time, by any number of processes.

The list is cut into fixed shards, which are dealt to the processes of torchrun. Shards that exist and are whole, by
their hash, are not made again.
"""
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torch.distributed as dist

from timm_multigrain.files import json_p, printable
from timm_multigrain.images.pixels import UnreadableImage
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.models.open import weights_sha256
from timm_multigrain.version import __version__

from .embedder import Embedder, in_order, none_readable
from .protocol import Protocol
from .shards import DamagedShard, Descriptors, read_manifest, read_shard, write_manifest, write_shard

_WAIT = timedelta(days=30)  # processes wait for the slowest one


def extract(
        model: torch.nn.Module,
        source: ImageSource,
        protocol: Protocol,
        out_dir: str | os.PathLike | None = None,
        *,
        strict: bool = False,
        shard_size: int = 1024,
        progress: bool = True,
        device: str | torch.device | None = None,
        **extraction,
) -> Descriptors:
    """Descriptors of all images, in the order of the source.

    Under torchrun, with a folder, the shards are shared out among the processes, each on its GPU (device='cuda') or on
    the CPU; all of them return when all shards are done.

    Args:
        protocol: Size, crop, scales, flip.
        out_dir: Folder to keep them in, made if missing; shards that exist there and are whole are not computed again.
        strict: Stop at the first image that cannot be read instead of leaving it out.
        shard_size: Images of a file in the folder: what a killed process loses at most.
        device: Where the model runs; where it is by default.
        **extraction: As of `Embedder`: batch_size, workers, dtype, descriptor, dim, fast.

    Raises:
        UnreadableImage: With ``strict``.
        FileExistsError: The folder holds other things.
        ValueError: It holds descriptors of another model, protocol or list, or no image could be read.
    """
    if shard_size < 1:
        raise ValueError(f'shard_size={shard_size}: give at least 1.')
    if out_dir is None:
        embedder = Embedder(model, protocol, device=device, **extraction)
        found, = _embed_stretches(embedder, source, [range(len(source))], strict, progress)
        found.info['protocol'] = protocol.to_dict()
    elif len(source):
        with _processes(device) as (rank, world, agree, device):
            embedder, folder = Embedder(model, protocol, device=device, **extraction), Path(out_dir)
            manifest = _manifest(embedder, source, shard_size)
            todo = agree(lambda: _prepare(folder, manifest))[rank::world]
            stretches = [range(len(source))[number * shard_size:(number + 1) * shard_size] for number in todo]
            title = 'Embedding' if world == 1 else f'Embedding (process 1 of {world})'
            shards = _embed_stretches(embedder, source, stretches, strict, progress and rank == 0, title)
            with closing(shards):
                for number, shard in zip(todo, shards, strict=True):
                    write_shard(folder, number, manifest, shard)
            agree(lambda: _remove_leftovers(folder))  # when all are done
        found = Descriptors.load(folder)
    if not len(source) or not len(found):
        raise ValueError(none_readable(len(source), found.skipped.values() if len(source) else ()))
    if strict and found.skipped:
        raise UnreadableImage(next(iter(found.skipped.values())))
    return found


def _embed_stretches(embedder: Embedder, source: ImageSource, stretches: Sequence[range], strict: bool, progress: bool,
                     title: str = 'Embedding') -> Iterator[Descriptors]:
    """Descriptors of the images of each stretch of numbers, all read by the same workers."""
    stream = embedder.decode(source, [i for stretch in stretches for i in stretch], progress, title)
    with embedder.evaluating(), closing(stream):
        for stretch in stretches:
            skipped = {}
            batches = list(embedder.embed(islice(stream, len(stretch)), None if strict else skipped.__setitem__))
            rows, vectors = in_order(batches)[:2] if batches else ((), torch.empty(0, embedder.width))
            yield Descriptors(
                tuple(source.names[i] for i in rows), vectors, {source.names[i]: skipped[i] for i in sorted(skipped)})


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
    was, now = _flat(found), _flat(manifest)
    differing = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(f'{printable(folder)} holds descriptors of another extraction ({printable(name)} '
                         f'{printable(str(was.get(name)))}, now {now.get(name)}): name another folder, or delete it.')
    todo = []
    for number in range(manifest['shards']):
        try:
            read_shard(folder, number, manifest)
        except DamagedShard:
            todo.append(number)
    return todo


def _flat(manifest: dict) -> dict[str, Any]:
    """A manifest's settings by name, such as 'protocol size'."""
    parts = {part: value if isinstance(value, dict) else {'': value} for part, value in manifest.items()}
    return {f'{part} {name}'.strip(): repr(value) for part, values in parts.items() for name, value in values.items()}


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed."""
    for path in [*folder.glob('.shard-*'), *folder.glob('.manifest.json-*')]:
        path.unlink(missing_ok=True)


@contextmanager
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
