"""Descriptors of named images."""
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .images import printable

__all__ = ['Descriptors']


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
