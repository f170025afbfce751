"""Descriptors of named images, in memory or from a folder that `extract` or `timm-multigrain embed` wrote."""
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from timm_multigrain.images.sources import printable

from .shards import read_manifest, read_shard

__all__ = ['Descriptors', 'iter_shards']


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Descriptors of named images.

    Attributes:
        names: Name of each image.
        vectors: (N, D) float32, a row an image.
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
        """The descriptors in a folder, whole and checked.

        Raises:
            FileNotFoundError: There are none.
            FileExistsError: The folder holds other things.
            ValueError: A shard is missing or damaged.
        """
        manifest = _manifest(folder)
        shards = [read_shard(folder, number, manifest) for number in range(manifest['shards'])]
        skipped = {name: reason for shard in shards for name, reason in shard.skipped.items()}
        names = tuple(name for shard in shards for name in shard.names)
        return cls(names, torch.cat([shard.vectors for shard in shards]), skipped, manifest)

    def select(self, names: Sequence[str]) -> 'Descriptors':
        """The descriptors of these images, in this order.

        Raises:
            ValueError: An image that is not there, was skipped, or is there twice with different descriptors.
        """
        rows = {}
        for row, name in enumerate(self.names):
            first = rows.setdefault(name, row)
            if first != row and not torch.equal(self.vectors[first], self.vectors[row]):
                raise ValueError(f'{printable(name)} is there twice with different descriptors: name images apart.')
        missing = [name for name in names if name not in rows]
        if missing:
            why = self.skipped.get(missing[0])
            raise ValueError(f'{len(missing)} of {len(names)} images have no descriptor, such as '
                             f'{printable(missing[0])}{f" ({why})" if why else ""}.')
        return Descriptors(tuple(names), self.vectors[[rows[name] for name in names]], self.skipped, self.info)


def iter_shards(folder: str | os.PathLike) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """(names, vectors) of the descriptors in a folder, a shard at a time and checked, in the order of the list.

    Raises:
        As `Descriptors.load`.
    """
    manifest = _manifest(folder)
    for number in range(manifest['shards']):
        shard = read_shard(folder, number, manifest)
        yield shard.names, shard.vectors


def _manifest(folder: str | os.PathLike) -> dict:
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f'{printable(folder)} holds no descriptors: timm-multigrain embed writes them.')
    return manifest
