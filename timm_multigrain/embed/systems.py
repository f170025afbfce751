"""Several descriptors from one pass of a trunk: each pooling of the literature, as it is and whitened.

SPoC, MAC, R-MAC, CroW and GeM differ in how they pool the map that the trunk gives, and nothing else, so that comparing
them costs one trunk: `Systems` runs it once an image and puts the embeddings side by side, `take` takes one out.
"""
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import get_device_dtype
from torch import nn

from timm_multigrain.layers import l2_normalize
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.trunk import InputSizes

__all__ = ['POOLINGS', 'SUMS', 'System', 'Systems', 'UnitPool', 'choose_systems', 'with_own_head']

POOLINGS = ('gem', 'mac', 'spoc', 'rmac', 'crow', 'avg')
SUMS = ('spoc', 'rmac', 'crow')  # over positions or regions, of which there are more in a larger image
_SHOWN = {'mac': 'MAC', 'spoc': 'SPoC', 'rmac': 'R-MAC', 'crow': 'CroW', 'avg': 'average'}
_P = {'mac': 'inf', 'spoc': 1.0, 'avg': 1.0}


@dataclass(frozen=True)
class System:
    """How the trunk's map becomes a descriptor.

    Attributes:
        pooling: One of `POOLINGS`.
        p: Exponent of 'gem', None for the other poolings, and for one exponent a channel.
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
        return 'inf' if self.p == math.inf else _P.get(self.pooling, self.p)

    @property
    def name(self) -> str:
        """The pooling as papers write it."""
        return _SHOWN.get(self.pooling, 'GeM')

    def __str__(self) -> str:
        name = self.name if self.pooling != 'gem' or self.p is None else f'{self.name} p={self.p:g}'
        return name if self.whitening is None else f'{name}, whitened {self.whitening}'


def choose_systems(model: MultiGrain, poolings: Sequence[str] = (), exponents: Sequence[float] = ()) -> list[System]:
    """The systems that a list of poolings and a list of exponents ask for.

    Args:
        model: The model.
        poolings: Names of `POOLINGS`; none: the model's own, or GeM if there are exponents.
        exponents: A system of GeM for each; none: the model's p, or 3 where it has none.

    Raises:
        ValueError: An unknown pooling, an impossible exponent, or exponents without GeM.
    """
    own = _own(model)
    if not poolings and not exponents:
        return [own]
    unknown = next((name for name in poolings if name not in POOLINGS), None)
    if unknown is not None:
        raise ValueError(f'{unknown!r} is no pooling: take {", ".join(POOLINGS)}.')
    wrong = next((p for p in exponents if not p > 0), None)
    if wrong is not None:
        raise ValueError(f'p = {wrong} is no exponent: it has to be above 0.')
    poolings = list(dict.fromkeys(poolings)) or ['gem']
    if exponents and 'gem' not in poolings:
        raise ValueError(f'p is the exponent of gem, and the poolings are {", ".join(poolings)}: add gem.')
    exponents = list(dict.fromkeys(exponents)) or [own.p or 3.0]
    return [System(name, p) for name in poolings for p in (exponents if name == 'gem' else [None])]


def _own(model: MultiGrain) -> System:
    p = model.gem_p
    return System(
        pooling=model.global_pool, p=p if isinstance(p, float) else None,
        whitening=model.embed_dim if model.whitened else None, own=True)


class Systems(nn.Module):
    """A model's trunk with several heads, whose raw embeddings ``forward_head`` gives side by side.

    Args:
        model: The model, whose trunk is shared.
        systems: What to compute, see `choose_systems`.

    Raises:
        ValueError: Another system than its own for a model with a whitening, which was fitted for its own only.
    """

    def __init__(self, model: MultiGrain, systems: Sequence[System]):
        super().__init__()
        self.systems = list(systems)
        self.models = [_with_pooling(model, system) for system in systems]
        self._collect()
        self.train(model.training)

    def _collect(self) -> None:
        self.trunk = self.models[0].trunk
        self.heads = nn.ModuleList(model.head for model in self.models)
        self.in_chans, self.num_classes, self.whitened = self.models[0].in_chans, 0, False
        self.embed_dim = sum(model.embed_dim for model in self.models)

    def add(self, system: System, model: MultiGrain) -> None:
        """One more system: a model with the trunk of the others."""
        self.systems.append(system)
        self.models.append(model)
        self._collect()

    def single(self, number: int) -> 'Systems':
        """The one system alone."""
        other = copy.copy(self)
        other._modules = {}
        other.systems, other.models = [self.systems[number]], [self.models[number]]
        other._collect()
        return other

    @property
    def head(self) -> nn.Module:
        """The first head."""
        return self.heads[0]

    @property
    def input_sizes(self) -> InputSizes:
        """As the model's."""
        return self.models[0].input_sizes

    @property
    def gem_p(self) -> list:
        """Exponents of the heads."""
        return [model.gem_p for model in self.models]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As the model's."""
        return self.models[0].forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map to the embeddings side by side, (N, embed_dim)."""
        return torch.cat([head(x, pre_logits=True) for head in self.heads], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def take(self, embeddings: torch.Tensor, number: int, normalize: bool = True) -> torch.Tensor:
        """One system's part of embeddings side by side, L2-normalised or as it is."""
        start = sum(model.embed_dim for model in self.models[:number])
        part = embeddings[:, start:start + self.models[number].embed_dim].float()
        return l2_normalize(part) if normalize else part


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


def _with_pooling(model: MultiGrain, system: System) -> MultiGrain:
    """A model with the same trunk and a head that pools as the system does."""
    other = with_own_head(model)
    if system.own:
        return other
    if model.whitened:
        raise ValueError(f'The model is whitened for its own pooling ({_own(model)}), not for {system}: evaluate it as '
                         'it is, or take the model without whitening and fit one to each.')
    name = f'gem{float(system.p)}' if system.pooling == 'gem' else system.pooling
    other.head.reset_pool(name, **get_device_dtype(model))
    return other
