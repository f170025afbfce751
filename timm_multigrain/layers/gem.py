"""Generalized-mean (GeM) pooling: e_c = (mean_u x_cu^p)^(1/p).

p = 1 is the average, p -> inf the maximum; p > 1 raises the contrast of the map.

Papers:
    `Fine-tuning CNN Image Retrieval with No Human Annotation`, eq. 3, https://arxiv.org/abs/1711.02512
    `MultiGrain: a unified image embedding for classes and instances`, eq. 1, https://arxiv.org/abs/1902.05509
"""
import math
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .functional import at_least_float32, drop_prefix_tokens, is_traced, spatial_dims

_PLAIN = (torch.Tensor, nn.Parameter)


def gem(
        x: torch.Tensor,
        p: float | torch.Tensor = 3.0,
        eps: float = 1e-6,
        dim: list[int] = (-2, -1),
        keepdim: bool = False,
        fixed: bool = False,
) -> torch.Tensor:
    """Generalized mean of x over `dim`.

    A number p = inf is the plain maximum and a number p = 1 the plain mean; every other p, and every tensor p, raises
    the values to at least `eps` first. The power runs in float32 (float64 for a float64 x) on values divided by their
    maximum, so that no p overflows or underflows.

    Args:
        x: Map of any floating dtype, which the result has, too.
        p: Exponent > 0: a number, or a tensor that broadcasts against x with `dim` reduced to 1, e.g. (C, 1, 1).
        eps: Floor of the values.
        dim: Dimensions to pool, side by side.
        keepdim: Keep the pooled dimensions as 1.
        fixed: Let a tensor p of one value mean what a number does, without waiting for a GPU.

    Example:
        >>> x = torch.tensor([[[[1., 2.], [3., 4.]]]])  # one map of 2 x 2
        >>> [round(gem(x, p).item(), 3) for p in (1, 3, float('inf'))]
        [2.5, 2.924, 4.0]
    """
    if has_torch_function_unary(x):  # one node in an fx graph
        return handle_torch_function(gem, (x,), x, p, eps, dim, keepdim, fixed)
    if not isinstance(p, torch.Tensor):
        y = _pool(x, float(p), eps, dim)
    elif fixed:
        y = _pool_by_value(x, p, eps, dim)
    else:
        y = power_mean(x, p, eps, dim)
    if not keepdim:  # one by one: torch's older ONNX exporter takes no squeeze of several dimensions
        first = min([d % x.dim() for d in dim])  # torch 2.6 compiles no sort of these
        for _ in dim:
            y = y.squeeze(first)
    return y.to(x.dtype)


def _pool(x: torch.Tensor, p: float, eps: float, dim: list[int]) -> torch.Tensor:
    if not p > 0:
        raise ValueError(f'GeM needs p > 0, got {p}: 1 is the average, 3 the usual choice, inf the maximum.')
    if p == math.inf:
        return _max(x, dim)
    return x.mean(dim, keepdim=True) if p == 1 else power_mean(x, p, eps, dim)


def _pool_by_value(x: torch.Tensor, p: torch.Tensor, eps: float, dim: list[int]) -> torch.Tensor:
    if torch.jit.is_scripting() or _is_readable(x, p):
        return _pool(x, float(p), eps, dim)
    power = power_mean(x, torch.where((p == 1) | (p == math.inf), 3., p), eps, dim)
    return torch.where(p == 1, x.mean(dim, keepdim=True), torch.where(p == math.inf, _max(x, dim), power))


@torch.jit.unused
def _is_readable(x: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether p can be read at once, for the faster powers of numbers, and nobody follows the tensor."""
    return type(x) in _PLAIN and _has_value(p) and p.device.type == 'cpu' and not p.requires_grad and not is_traced()


def _max(x: torch.Tensor, dim: list[int]) -> torch.Tensor:
    # amax would share the gradient among equal values, a maximum gives it to one
    axes = [d % x.dim() for d in dim]
    y = x.flatten(min(axes), max(axes)).max(min(axes), keepdim=True)[0]
    for _ in range(len(axes) - 1):
        y = y.unsqueeze(min(axes))
    return y


def power_mean(x: Tensor, p: float | Tensor, eps: float, dim: list[int]) -> Tensor:
    """(mean of max(x, eps)^p)^(1/p) over `dim`, kept as 1, in float32, or float64 for a float64 x.

    Whatever looks at single operations (scripts, compilers, function transforms) sees the formula itself.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - alone, or TorchScript would compile what follows
        if not is_traced():
            return _PowerMean.apply(x, p, eps, dim)
    return _formula(x, p, eps, dim)


def _formula(x: Tensor, p: float | Tensor, eps: float, dim: list[int]) -> Tensor:
    x = at_least_float32(x).clamp(min=eps)
    # the mean is homogeneous: whatever divides x and multiplies the mean needs no gradient, and no power overflows
    peak = x.detach().amax(dim, keepdim=True)
    ratio = x / peak
    if isinstance(p, Tensor):
        q = p.to(ratio.dtype)
        return ratio.pow(q).mean(dim, keepdim=True).pow(1. / q) * peak
    return ratio.pow(p).mean(dim, keepdim=True).pow(1. / p) * peak


class _PowerMean(torch.autograd.Function):
    """The formula, which left to autograd would keep six copies of the map; this keeps x, y and p.

    dy / dx_u = (x_u / y)^(p - 1) / n
    dy / dp = y / p mean_u((x_u / y)^p log(x_u / y))
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float | Tensor, eps: float, dim: list[int]) -> Tensor:
        y = _formula(x, p, eps, dim)
        ctx.eps, ctx.dim, ctx.p = eps, dim, None if isinstance(p, Tensor) else p
        ctx.save_for_backward(x, y, p if isinstance(p, Tensor) else None)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # of differentiable operations on what was kept, y with its own derivative: derivatives of every order are right
        x, y, p = ctx.saved_tensors
        q = ctx.p if p is None else p.to(y.dtype)
        # no float32 copy of x is kept: here a network has all its activations in memory
        ratio = (at_least_float32(x).clamp(min=ctx.eps) / y).clamp(min=torch.finfo(y.dtype).tiny)  # log(0) is infinite
        of_x = of_p = None
        if ctx.needs_input_grad[0]:
            of_x = ratio.pow(q - 1) * (grad * (y.numel() / x.numel()))
            of_x = of_x.masked_fill(at_least_float32(x) <= ctx.eps, 0.).to(x.dtype)
        if ctx.needs_input_grad[1]:
            slope = y / q * (ratio.pow(q) * ratio.log()).mean(ctx.dim, keepdim=True)
            of_p = (grad * slope).sum_to_size(p.shape).to(p.dtype)
        return of_x, of_p, None, None


class GeM(nn.Module):
    """Generalized-mean pooling with one exponent, or one per channel, fixed or learnable.

    A fixed scalar p = inf is the plain maximum and p = 1 the plain mean. A learnable or per-channel p always uses the
    clamped formula and has to be finite. What `p` holds is what is pooled with, however it was changed. A loaded p may
    be an integer, or one value for all channels.

    Args:
        p: Exponent > 0.
        learn_p: Make `p` a parameter instead of a buffer.
        num_channels: One exponent per channel, `p` of shape (C,); otherwise its shape is (1,).
        eps: Floor of the values.
        input_fmt: 'NCHW', 'NHWC' or 'NLC'.
        flatten: Return (N, C); otherwise the pooled dimensions stay as 1.
        num_prefix_tokens: Leading tokens (class, registers) left out of the pooling, 'NLC' only.
        persistent: Whether a fixed p is part of the state dict.

    Example:
        >>> GeM(p=3)(torch.ones(2, 8, 7, 7)).shape
        torch.Size([2, 8])
    """

    def __init__(
            self,
            p: float = 3.0,
            learn_p: bool = False,
            num_channels: int | None = None,
            eps: float = 1e-6,
            input_fmt: str = 'NCHW',
            flatten: bool = True,
            num_prefix_tokens: int = 0,
            persistent: bool = True,
    ):
        super().__init__()
        if not 0 < eps < math.inf:
            raise ValueError(f'GeM needs a finite eps > 0, got {eps}: a channel without activation would give NaN.')
        self.learn_p = learn_p
        self.per_channel = num_channels is not None
        self.fixed = not (learn_p or self.per_channel)
        self.eps = float(eps)
        self.input_fmt = input_fmt
        self.dim = spatial_dims(input_fmt, num_prefix_tokens)
        self.flatten = flatten
        self.num_prefix_tokens = num_prefix_tokens
        # not 0-dim, which fully_shard refuses
        value = torch.empty(num_channels if self.per_channel else 1, dtype=torch.float32)
        if learn_p:
            self.p = nn.Parameter(value)
        else:
            self.register_buffer('p', value, persistent=persistent)
        self.set_p(p)

    def _fitting(self, value: Any) -> torch.Tensor:
        """A number, or a tensor of one value or of the shape of p, as float32 of that shape; ValueError for others."""
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 and value.shape != self.p.shape:
                raise ValueError(f'expected a p of shape {tuple(self.p.shape)} or one value, got {tuple(value.shape)}.')
            low, high = (e.item() for e in torch.aminmax(value.detach().float())) if _has_value(value) else (1., 1.)
        else:
            low = high = float(np.float32(value))  # as a state dict keeps it
        shown = low if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not (low > 0 and high > 0):  # also catches NaN
            raise ValueError(f'GeM needs p > 0, got {shown!r}: 1 is the average, 3 the usual choice, inf the maximum.')
        if high == math.inf and not self.fixed:
            raise ValueError(f'A learnable or per-channel p has to be finite, got {shown}: fix one scalar p instead.')
        if not isinstance(value, torch.Tensor):
            return torch.full(self.p.shape, low, device='cpu')
        value = value.detach().float()
        return value if value.shape == self.p.shape else value.reshape(()).expand(self.p.shape).clone()

    @torch.no_grad()
    def set_p(self, value: float | torch.Tensor) -> None:
        """Set p in place: a number for all channels, or a tensor of the shape of `p`."""
        self.p.copy_(self._fitting(value))
        if not isinstance(value, torch.Tensor):
            self.made_p = float(np.float32(value))  # what a p that was made without memory gets with it

    def value(self) -> float | list[float]:
        """p as a number, or a list with one for each channel; as it was set where its tensor holds no value."""
        p = self.p.detach()
        p = p.full_tensor() if hasattr(p, 'full_tensor') else p  # sharded by fully_shard
        values = p.float().tolist() if _has_value(p) else [self.made_p] * len(p)
        return values if self.per_channel else values[0]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        key = prefix + 'p'
        if 'p' not in self._non_persistent_buffers_set and isinstance(state_dict.get(key), torch.Tensor):
            try:
                # torch itself would round into an integer p and take the first of several values for a scalar p
                state_dict[key] = self._fitting(state_dict[key])
            except ValueError as e:
                errors.append(f'{key}: {e}')
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)

    def _apply(self, fn, recurse=True):
        before = self.p
        super()._apply(fn, recurse)
        if not self.learn_p:  # a fixed p follows the device, not the dtype
            made = before.is_meta and not self.p.is_meta
            self.p = torch.full_like(self.p, self.made_p, dtype=torch.float32) if made else before.to(self.p.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_fmt == 'NLC':
            x = drop_prefix_tokens(x, self.num_prefix_tokens)
        p = self.p
        if self.per_channel and self.input_fmt == 'NCHW':
            p = p[:, None, None]
        return gem(x, p, self.eps, self.dim, not self.flatten, fixed=self.fixed)

    def extra_repr(self) -> str:
        p = f'({len(self.p)} channels)' if self.per_channel else f'{self.value():g}'
        return f'p={p}, learn_p={self.learn_p}, eps={self.eps:g}, input_fmt={self.input_fmt}, flatten={self.flatten}'


def _has_value(p: torch.Tensor) -> bool:
    """Whether it has memory of its own: no meta or fake tensor, no shard."""
    return type(p) in _PLAIN and not p.is_meta
