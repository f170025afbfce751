"""Several descriptors from one pass of a trunk: each pooling of the literature, as it is and whitened.

They differ in how they pool what the trunk gives, and nothing else, so that comparing them costs one trunk: `Systems`
runs it once per image and puts the embeddings side by side, `take` takes one out.
"""
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from timm_multigrain.layers import l2_normalize
from timm_multigrain.models.multigrain import MultiGrain

POOLINGS = {'gem': 'GeM', 'mac': 'MAC', 'spoc': 'SPoC', 'rmac': 'R-MAC', 'crow': 'CroW', 'avg': 'average',
            'trunk': "trunk's own", 'cls': 'class token', 'cls+gem': 'class token + GeM', 'map': 'attention pooling'}
_WITH_P = ('gem', 'cls+gem')
SUMS = ('spoc', 'rmac', 'crow')  # over positions or regions, of which there are more in a larger image
_EXPONENTS = {'mac': 'inf', 'spoc': 1.0, 'avg': 1.0}


@dataclass(frozen=True)
class System:
    """How the trunk's map becomes a descriptor.

    Attributes:
        pooling: One of `POOLINGS`.
        p: Exponent of 'gem' and 'cls+gem'; None for the other poolings, and for an exponent per channel.
        whitening: Components of the whitened descriptor, None without.
        own: Whether it is the model's own pooling, with the whitening it was saved with.
    """
    pooling: str
    p: float | None = None
    whitening: int | None = None
    own: bool = False

    @property
    def exponent(self) -> float | str | None:
        """The p of GeM that the pooling is, up to a factor: 1 for averages, 'inf' for the maximum."""
        return 'inf' if self.p == math.inf else _EXPONENTS.get(self.pooling, self.p)

    @property
    def name(self) -> str:
        """The pooling as papers write it."""
        return POOLINGS.get(self.pooling, 'GeM')

    def __str__(self) -> str:
        p = f' p={self.p:g}' if self.pooling in _WITH_P and self.p is not None else ''
        return self.name + p + ('' if self.whitening is None else f', whitened {self.whitening}')


def choose_systems(model: MultiGrain, poolings: Sequence[str] = (), exponents: Sequence[float] = ()) -> list[System]:
    """The systems that a list of poolings and a list of exponents ask for.

    Args:
        poolings: Names of `POOLINGS`; none: the model's own, or GeM if there are exponents.
        exponents: A system of GeM for each; none: the model's p, or 3 where it has none.
    """
    own = _own(model)
    if not poolings and not exponents:
        return [own]
    poolings, exponents = list(dict.fromkeys(poolings)) or ['gem'], list(dict.fromkeys(exponents))
    for name in poolings:
        if name not in POOLINGS:
            raise ValueError(f'Unknown pooling {name!r}: take {", ".join(POOLINGS)}.')
    if not all(p > 0 for p in exponents):
        raise ValueError(f'p has to be above 0, and is {", ".join(map(str, exponents))}.')
    if exponents and not set(_WITH_P) & set(poolings):
        raise ValueError(f'p is the exponent of gem, and the poolings are {", ".join(poolings)}: add gem.')
    return [System(name, p) for name in poolings
            for p in ((exponents or [own.p or 3.0]) if name in _WITH_P else [None])]


def _own(model: MultiGrain) -> System:
    return System(model.global_pool, model.gem_p if isinstance(model.gem_p, float) else None,
                  model.embed_dim if model.whitened else None, own=True)


class Systems(nn.Module):
    """Several heads on one trunk, whose raw embeddings ``forward_head`` gives side by side.

    Args:
        systems: What each head computes.
        models: A model for each, all with the same trunk but for its head.
    """
    num_classes, whitened = 0, False

    def __init__(self, systems: Sequence[System], models: Sequence[MultiGrain]):
        super().__init__()
        self.systems, self.models = list(systems), list(models)  # a list: the trunk is registered once
        first = self.models[0]
        self.in_chans, self.input_sizes = first.in_chans, first.input_sizes
        self.trunks = nn.ModuleList(dict.fromkeys(model.trunk for model in self.models))
        self.heads = nn.ModuleList(model.head for model in self.models)
        self.embed_dim = sum(model.embed_dim for model in self.models)
        self.train(first.training)

    @classmethod
    def of(cls, model: MultiGrain, systems: Sequence[System]) -> 'Systems':
        """A model pooled in several ways."""
        models = [with_own_head(model) for _ in systems]
        headless = None
        for system, other in zip(systems, models, strict=True):
            if system.own:
                continue
            if model.whitened:
                raise ValueError(f'The model is whitened for its own pooling ({_own(model)}), not for {system}: '
                                 'evaluate it as it is, or take the model without whitening and fit one to each.')
            other.set_pool(f'{system.pooling}{float(system.p)}' if system.pooling in _WITH_P else system.pooling)
            if other.trunk is not model.trunk:  # the same for all of them
                headless = other.trunk = headless or other.trunk
        return cls(systems, models)

    def __len__(self) -> int:
        return len(self.systems)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As the model's."""
        return self.models[0].forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """The map to the embeddings side by side, (N, embed_dim)."""
        given = {trunk: trunk.forward_head(x) for trunk in self.trunks}
        return torch.cat([model.head(given[model.trunk], pre_logits=True) for model in self.models], 1)

    def take(self, embeddings: torch.Tensor, number: int, normalize: bool = True) -> torch.Tensor:
        """One system's columns of embeddings side by side, L2-normalised or as they are."""
        start = sum(model.embed_dim for model in self.models[:number])
        own = embeddings[:, start:start + self.models[number].embed_dim].float()
        return l2_normalize(own) if normalize else own


class UnitPool(nn.Module):
    """A pooling whose embedding is L2-normalised."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return l2_normalize(self.pool(x))


def with_own_head(model: MultiGrain) -> MultiGrain:
    """A model with the same trunk and a copy of the head."""
    other = copy.copy(model)
    other._modules = {**model._modules, 'head': copy.deepcopy(model.head)}
    return other
