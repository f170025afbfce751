"""MultiGrain's poolings under timm's own option: `global_pool='gem'`.

The one place that reaches into timm. `install` wraps the constructors and resets of four timm classes:
    SelectAdaptivePool2d: its `pool` becomes ours
    ClNormMlpClassifierHead: the head becomes a subclass that pools with ours
    VisionTransformer, Eva: `attn_pool`, the slot of attention pooling, becomes ours
A native name goes straight through to timm. For one of our names timm first builds what it builds for 'avg', so the
state dict is that of 'avg' (plus the exponent if it is learnable).
"""
import functools
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
from timm.layers import ClNormMlpClassifierHead
from timm.models.eva import Eva

from .gem import GeM
from .regional import MAC, RMAC, ClassToken, CroW, SPoC

_OTHERS = {'mac': MAC, 'spoc': SPoC, 'rmac': RMAC, 'crow': CroW, 'cls': ClassToken}
_GEM = re.compile(r'gem(inf|\d+(?:\.\d+)?)?(_learn)?')


def _parse_gem(name: str) -> tuple[float, bool] | None:
    """p and whether it is learnable; None for anything that is not a GeM name."""
    match = _GEM.fullmatch(name)
    if match is None:
        return None
    p, learn_p = float(match[1] or 3), bool(match[2])
    return (p, learn_p) if p > 0 and not (learn_p and match[1] == 'inf') else None


def is_multigrain_pool(name: str | None) -> bool:
    """Whether `create_pool` knows the name."""
    return isinstance(name, str) and (name in _OTHERS or _parse_gem(name) is not None)


def create_pool(
        name: str,
        input_fmt: str = 'NCHW',
        flatten: bool = True,
        num_prefix_tokens: int = 0,
) -> nn.Module:
    """Pooling layer by name; a fixed p is not part of its state dict.

    Args:
        name: 'gem' (p = 3), 'gem4', 'gem2.5', 'geminf', 'gem_learn', 'gem4_learn', 'mac', 'spoc', 'rmac',
            'crow' or 'cls' (the class token).
        input_fmt, flatten, num_prefix_tokens: As of `GeM`.

    Example:
        >>> create_pool('gem2.5')(torch.ones(2, 8, 7, 7)).shape
        torch.Size([2, 8])
    """
    kwargs = {'input_fmt': input_fmt, 'flatten': flatten, 'num_prefix_tokens': num_prefix_tokens}
    if name in _OTHERS:
        return _OTHERS[name](**kwargs)
    gem = _parse_gem(name)
    if gem is None:
        raise ValueError(
            f"Unknown pooling {name!r}, expected 'gem' (p = 3), 'gem<p>' with a number p > 0 such as 'gem4' or "
            f"'gem2.5', 'geminf', 'gem_learn', 'gem<p>_learn', {', '.join(map(repr, _OTHERS))}.")
    return GeM(gem[0], learn_p=gem[1], persistent=False, **kwargs)


def _is_ours(name: Any) -> bool:
    # a misspelt 'gem-3' or 'GeM' is ours too, to be refused with the list of names; the class token is timm's 'token'
    return isinstance(name, str) and (name.lower().startswith('gem') or (name in _OTHERS and name != 'cls'))


class _MultiGrainHead(ClNormMlpClassifierHead):
    """timm's channels-last head, pooling with its module `pool`."""

    def _global_pool(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)


# of each class what puts our pooling in, and what takes it out before timm's own method runs

def _enter_select(layer: nn.Module, name: str, args: dict[str, Any]) -> None:
    if args['output_size'] not in (1, (1, 1)):
        raise ValueError(f'{name!r} pools to a single cell, got output_size={args["output_size"]}.')
    layer.pool = create_pool(name, input_fmt=args['input_fmt'], flatten=args['flatten'])
    layer.pool_type = name


def _enter_head(head: nn.Module, name: str, args: dict[str, Any]) -> None:
    head.pool = create_pool(name, input_fmt='NLC' if head.pool_dim == 1 else 'NHWC').train(head.training)
    head.pool_type = name
    head.__class__ = _MultiGrainHead


def _leave_head(head: nn.Module) -> None:
    if isinstance(head, _MultiGrainHead):
        head.__class__ = ClNormMlpClassifierHead
        del head.pool
        head.pool_type = ''


def _enter_tokens(model: nn.Module, name: str, args: dict[str, Any]) -> None:
    prefix = model.num_prefix_tokens if isinstance(model, Eva) else 0  # VisionTransformer strips them itself
    model.attn_pool = create_pool(name, input_fmt='NLC', num_prefix_tokens=prefix).train(model.training)
    model.global_pool = name


def _leave_tokens(model: nn.Module) -> None:
    if _is_ours(getattr(model, 'global_pool', None)):
        model.attn_pool = None
        model.global_pool = ''


class _Seam(NamedTuple):
    path: str  # of the class
    wraps: dict[str, str]  # method to wrap: its argument with the name of the pooling
    relies_on: dict[str, set[str]]  # method: attributes it has to touch for our pooling to take part
    enter: Callable[[nn.Module, str, dict[str, Any]], None]
    leave: Callable[[nn.Module], None]

    def find(self) -> type:
        """The class, checked; RuntimeError if timm has another one than we are made for."""
        module, _, name = self.path.rpartition('.')
        try:
            cls = getattr(import_module(module), name)
            for method in {**self.wraps, **self.relies_on}:
                function = getattr(cls, method)
                known = {*inspect.signature(function).parameters, *inspect.unwrap(function).__code__.co_names}
                absent = {self.wraps.get(method, 'self'), *self.relies_on.get(method, ())} - known
                if absent:
                    raise AttributeError(f'{method} does not use {", ".join(sorted(absent))}')
        except (AttributeError, TypeError) as e:
            raise RuntimeError(
                f'global_pool="gem" is built on what {self.path} of timm {timm.__version__} lacks ({e}): install timm '
                '1.0.31 or a timm_multigrain made for this timm.') from e
        return cls


_SEAMS = (
    _Seam('timm.layers.SelectAdaptivePool2d', {'__init__': 'pool_type'},
          {'__init__': {'pool', 'pool_type'}, 'forward': {'pool'}}, _enter_select, lambda layer: None),
    _Seam('timm.layers.ClNormMlpClassifierHead', {'__init__': 'pool_type', 'reset': 'pool_type'},
          {'__init__': {'pool_dim', 'pool_type'}, 'forward': {'_global_pool'}}, _enter_head, _leave_head),
    _Seam('timm.models.vision_transformer.VisionTransformer',
          {'__init__': 'global_pool', 'reset_classifier': 'global_pool'},
          {'__init__': {'global_pool'}, 'pool': {'attn_pool', 'num_prefix_tokens'}}, _enter_tokens, _leave_tokens),
    _Seam('timm.models.eva.Eva', {'__init__': 'global_pool', 'reset_classifier': 'global_pool'},
          {'__init__': {'global_pool', 'num_prefix_tokens'}, 'pool': {'attn_pool'}}, _enter_tokens, _leave_tokens),
)


def _wrap(original: Callable, argument: str, seam: _Seam) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        name = bound.arguments.get(argument)
        if name is not None:
            seam.leave(self)
        if not _is_ours(name):
            return original(self, *args, **kwargs)
        bound.arguments[argument] = 'avg'
        original(*bound.args, **bound.kwargs)
        bound.apply_defaults()
        seam.enter(self, name, bound.arguments)
        return None

    method.is_multigrain = True
    return method


def install() -> None:
    """Makes timm know our poolings by name; calling it again changes nothing.

    Raises:
        RuntimeError: timm lacks a class, method or argument this relies on; timm is left as it was.
    """
    for cls, seam in [(seam.find(), seam) for seam in _SEAMS]:
        for name, argument in seam.wraps.items():
            original = getattr(cls, name)
            if not getattr(original, 'is_multigrain', False):
                setattr(cls, name, _wrap(original, argument, seam))
