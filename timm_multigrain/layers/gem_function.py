"""The power mean of GeM, as an autograd function that keeps the map and its result only.

    y = (mean_u x_u^p)^(1/p)
    dy / dx_u = (x_u / y)^(p - 1) / n
    dy / dp = y / p mean_u((x_u / y)^p log(x_u / y))

The formula left to autograd would keep six copies of the map for the backward.
"""
import torch
from torch import Tensor

from timm_multigrain.eager import is_traced

from .format import at_least_float32

__all__ = ['power_mean']


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
        wide = at_least_float32(x)
        ratio = (wide.clamp(min=ctx.eps) / y).clamp(min=torch.finfo(y.dtype).tiny)  # the logarithm of 0 is infinite
        of_x = of_p = None
        if ctx.needs_input_grad[0]:
            of_x = ratio.pow(q - 1) * (grad * (y.numel() / x.numel()))
            of_x = of_x.masked_fill(wide <= ctx.eps, 0.).to(x.dtype)
        if ctx.needs_input_grad[1]:
            slope = y / q * (ratio.pow(q) * ratio.log()).mean(ctx.dim, keepdim=True)
            of_p = (grad * slope).sum_to_size(p.shape).to(p.dtype)
        return of_x, of_p, None, None
