"""The power mean of GeM: by plain operations, and as an autograd function that keeps the map and its result only.

The plain formula walks over the map a dozen times and keeps copies of it for the backward. `PowerMean` works on blocks
that stay in the cache of a CPU (on a GPU on all at once), and its gradients need x and y alone:
    dy / dx_u = (x_u / y)^(p - 1) / n
    dy / dp = y / p mean_u((x_u / y)^p log(x_u / y))
No bit of y depends on the batch and the blocks it is computed in, except while an exponent learns.
"""
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from timm_multigrain.eager import is_traced

from .format import at_least_float32
from .logarithm import log_

_BLOCK = 2 ** 18  # values a thread works on at once: 1 MiB
_SMALL = 2 ** 10  # values of an image below which the plain formula is as quick
_QUICK = (2., 2.5, 3., 4.)  # p for which x^p and x^(p - 1) are products and a square root
_LOG2_E = math.log2(math.e)
_LARGE = 32.  # p from which the rounding of y costs the gradient digits
_SAFE = 1e-30, 1e30  # sums of powers that are not near the limits of float32
_SAFE_ROOT = 1e-9, 1e9  # and y, of which the powers below p = 4 are not


def power_mean(x: Tensor, p: float | Tensor, eps: float, dim: list[int]) -> Tensor:
    """(mean of max(x, eps)^p)^(1/p) over `dim`, kept as 1, in float32 or float64: the plain formula, for any tracer."""
    x = at_least_float32(x).clamp(min=eps)
    # the mean is homogeneous: whatever divides x and multiplies the mean needs no gradient
    peak = x.detach().amax(dim, keepdim=True)
    ratio = x / peak
    if isinstance(p, Tensor):
        q = p.to(ratio.dtype)
        return ratio.pow(q).mean(dim, keepdim=True).pow(1. / q) * peak
    return ratio.pow(p).mean(dim, keepdim=True).pow(1. / p) * peak


def unscaled_power_mean(x: Tensor, p: float, eps: float, dim: list[int]) -> Tensor:
    """`power_mean` without the pass for the maximum, for a small p: a compiler makes one loop of it.

    Exact until the p-th power leaves float32, for p = 3 at values of 1e12 and for p = 4 at 1e9.
    """
    return at_least_float32(x).clamp(min=eps).pow(p).mean(dim, keepdim=True).pow(1. / p)


def compiles(p: float | Tensor) -> bool:
    """Whether torch.compile is at work, not torch.export, on a p that `unscaled_power_mean` serves."""
    if not torch.compiler.is_compiling() or isinstance(p, Tensor) or p not in _QUICK:
        return False
    # exported graphs may be run in float16, where even the third power overflows
    return not (hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting())


def takes(x: Tensor, p: float | Tensor, dim: list[int]) -> bool:
    """Whether `PowerMean` can, and had better, do what `power_mean` does."""
    # whoever looks at single operations or transforms them is given plain ones
    if is_traced() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type not in ('cpu', 'cuda'):
        return False
    axes = _axes(x, dim)
    if not axes[0] or axes != list(range(axes[0], axes[-1] + 1)) or x.numel() < max(len(x), 1) * _SMALL:
        return False
    if isinstance(p, Tensor):
        kept = _kept_shape(x, dim)
        if p.dim() > x.dim() or torch.broadcast_shapes(p.shape, kept) != kept:
            return False
    elif p >= _LARGE:
        return False
    return _as_maps(x.detach(), dim) is not None


def fused_power_mean(x: Tensor, p: float | Tensor, eps: float, dim: list[int]) -> Tensor:
    """`power_mean` for arguments that `takes` accepts."""
    if isinstance(p, Tensor) and not torch.is_grad_enabled():
        p = p.detach()  # or its gradient would be prepared in vain
    return PowerMean.apply(x, p, eps, dim)


class PowerMean(torch.autograd.Function):
    """y (kept as 1) from x, p, eps, dim."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float | Tensor, eps: float, dim: list[int]) -> Tensor:
        maps = _as_maps(x, dim)
        y, slope = _pool(maps, _exponent(p, x, dim, maps), eps, ctx.needs_input_grad[1])
        y = y.view(_kept_shape(x, dim))
        ctx.p, ctx.eps, ctx.dim = p if isinstance(p, float) else None, eps, dim
        ctx.save_for_backward(x, y, None if isinstance(p, float) else p, slope)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, p, slope = ctx.saved_tensors
        p = ctx.p if p is None else p
        of_x, of_p = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or is_traced() or is_legacy_batchedtensor(grad):  # to be differentiated or batched
            of_x, of_p = _plain_gradients(x, y, p, ctx.eps, ctx.dim, grad, of_p)
            return of_x, of_p, None, None
        maps = _as_maps(x, ctx.dim)
        shape = len(maps), 1, maps.shape[2]
        of_p = (grad * slope.view_as(grad)).sum_to_size(p.shape).to(p.dtype) if of_p else None
        if of_x:
            of_x = _map_gradient(maps, y.view(shape), _exponent(p, x, ctx.dim, maps), ctx.eps, grad.reshape(shape))
            of_x = _from_maps(of_x, x, ctx.dim)
        return of_x if ctx.needs_input_grad[0] else None, of_p, None, None


def _plain_gradients(x, y, p, eps, dim, grad, of_p: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients by differentiable operations; y has `PowerMean` as its own derivative."""
    q = p.to(y.dtype) if isinstance(p, Tensor) else p
    wide = at_least_float32(x)
    ratio = wide.clamp(min=eps) / y
    of_x = (ratio.pow(q - 1) * (grad * (y.numel() / x.numel()))).masked_fill(wide <= eps, 0.).to(x.dtype)
    if not of_p:
        return of_x, None
    slope = y / q * (ratio.pow(q) * ratio.log()).mean(dim, keepdim=True)
    return of_x, (grad * slope).sum_to_size(p.shape).to(p.dtype)


def _axes(x: Tensor, dim: list[int]) -> list[int]:
    return sorted(d % x.dim() for d in dim)


def _kept_shape(x: Tensor, dim: list[int]) -> torch.Size:
    axes = _axes(x, dim)
    return torch.Size(1 if d in axes else n for d, n in enumerate(x.shape))


def _is_channels_last(x: Tensor, dim: list[int]) -> bool:
    return (x.dim() == 4 and _axes(x, dim) == [2, 3] and not x.is_contiguous()
            and x.is_contiguous(memory_format=torch.channels_last))


def _as_maps(x: Tensor, dim: list[int]) -> Tensor | None:
    """View (A, L, B) of x that is pooled over L, or None if there is none."""
    axes = _axes(x, dim)
    if _is_channels_last(x, dim):
        x, axes = x.permute(0, 2, 3, 1), [1, 2]
    sizes = x.shape[:axes[0]], x.shape[axes[0]:axes[-1] + 1], x.shape[axes[-1] + 1:]
    try:
        return x.view([math.prod(s) for s in sizes])
    except RuntimeError:
        return None


def _from_maps(maps: Tensor, x: Tensor, dim: list[int]) -> Tensor:
    if _is_channels_last(x, dim):
        return maps.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return maps.view(x.shape)


def _exponent(p: float | Tensor, x: Tensor, dim: list[int], maps: Tensor) -> float | Tensor:
    """p as a number, a tensor of one value, or one value a map (A, 1, B)."""
    if isinstance(p, float):
        return p
    p = p.detach().to(torch.promote_types(x.dtype, torch.float32))
    if p.numel() == 1:
        return p.reshape(())
    return p.expand(_kept_shape(x, dim)).reshape(len(maps), 1, maps.shape[2])


def _blocks(maps: Tensor, *others: Tensor | float | None) -> Iterator[tuple]:
    """The parts to work on, whole maps each, with the same parts of other tensors (A, ., B); the rest as it is."""
    length, columns = maps.shape[1:]
    size = _BLOCK * torch.get_num_threads() if _on_host(maps) else maps.numel()
    width = min(columns, max(size // length // 64, 1) * 64)
    height = max(size // (length * width), 1)

    def split(value, step: int, dim: int):
        return value.split(step, dim) if isinstance(value, Tensor) and value.dim() else itertools.repeat(value)

    for rows in zip(*(split(value, height, 0) for value in (maps, *others))):  # noqa: B905
        yield from [rows] if width == columns else zip(*(split(value, width, 2) for value in rows))  # noqa: B905


def _clamp(x: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    return wide.clamp(min=eps) if wide is x else wide.clamp_(min=eps)


def _threshold(x: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    return torch.threshold(wide, eps, 0.) if wide is x else torch.threshold_(wide, eps, 0.)


def _pool(maps: Tensor, p: float | Tensor, eps: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """y and, if wanted, dy / dp of each map, (A, 1, B)."""
    total = maps.new_empty((len(maps), 1, maps.shape[2]), dtype=torch.promote_types(maps.dtype, torch.float32))
    log_total = torch.empty_like(total) if with_slope else None
    # on a GPU nobody can look whether a sum is safe without waiting, so there nothing may ever leave [0, 1]
    scale = None if _on_host(maps) else torch.empty_like(total)
    for part, q, *sums, peak in _blocks(maps, p, total, log_total, scale):
        a = _clamp(part, eps)
        if peak is not None:
            a.div_(torch.amax(a, 1, keepdim=True, out=peak))
        _sum(a, q, *sums)
    y, slope = _root(total, log_total, scale, p, maps.shape[1])
    if scale is None:
        _repair(y, slope, total, maps, p, eps)
    return y, slope


def _sum(a: Tensor, p: float | Tensor, total: Tensor, log_total: Tensor | None) -> None:
    """Writes the sums of a^p and, if wanted, of a^p log(a), and overwrites a."""
    if _is_quick(p):
        torch.sum(_quick_power_(a, p), 1, keepdim=True, out=total)
        return
    if log_total is None:
        # pow and exp2 round the last few values of a tensor differently from the others, exp and log do not
        torch.sum(a.log_().mul_(p).exp_(), 1, keepdim=True, out=total)
        return
    powers = (log_(a) * (p * _LOG2_E)).exp2_()  # twice as quick, for training
    torch.sum(powers, 1, keepdim=True, out=total)
    torch.sum(powers.mul_(a), 1, keepdim=True, out=log_total)


def _root(total: Tensor, log_total: Tensor | None, scale: Tensor | None, p: float | Tensor, length: int):
    """y, and dy / dp where the sum of logarithms is given, from the sums over maps divided by `scale`."""
    mean = total / length
    if isinstance(p, float) and p == 3:
        y = _cube_root(mean)
    else:
        log_mean = mean.double().log_()  # float32 would lose digits of log(mean) / p
        y = (log_mean / p).exp_().to(total.dtype)
    if scale is not None:
        y.mul_(scale)
    slope = None if log_total is None else y / p * (log_total / total - log_mean / p).to(y.dtype)
    return y, slope


def _cube_root(a: Tensor) -> Tensor:
    """By a float32 approximation and a step of Newton, which has all digits: half the time of doubles."""
    root = a.log().div_(3).exp_()
    return root.lerp_(a / root.square(), 1 / 3)


def _repair(y: Tensor, slope: Tensor | None, total: Tensor, maps: Tensor, p: float | Tensor, eps: float) -> None:
    """Computes anew, divided by their maximum, the maps of which float32 cannot hold the sum."""
    if _is_within(total, *_SAFE):
        return
    length = maps.shape[1]
    safe = total.clamp(*_SAFE)
    for rows in (safe != total).nonzero().split(max(_BLOCK // length, 1)):  # also those with NaN
        i, j = rows[:, 0], rows[:, 2]
        a = _clamp(maps[i, :, j], eps)[:, :, None]
        scale = a.amax(1, keepdim=True)
        a = a.div_(scale).clamp_(min=torch.finfo(a.dtype).tiny)  # a logarithm of 0 would be NaN times 0
        sums = torch.empty_like(scale), None if slope is None else torch.empty_like(scale)
        q = p[i, :, j, None] if isinstance(p, Tensor) and p.dim() else p
        _sum(a, q, *sums)
        for target, value in zip((y, slope), _root(*sums, scale, q, length), strict=True):
            if target is not None:
                target[i, 0, j] = value.flatten()


def _map_gradient(maps: Tensor, y: Tensor, p: float | Tensor, eps: float, grad: Tensor) -> Tensor:
    """Gradient (A, L, B) of the maps for that of y, (A, 1, B)."""
    result = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    grad = grad / maps.shape[1]
    if _is_quick(p) and _on_host(maps) and _is_within(y, *_SAFE_ROOT):
        y, grad = None, grad / y.pow(p - 1)  # y need not divide before the power
    whole = _is_quick(p) and p % 1 == 0
    for part, root, slope, q, target in _blocks(maps, y, grad, p, result):
        # what the floor raised has no gradient: made 0 here where 0 has a power, else at the end
        ratio = _threshold(part, eps) if whole else _clamp(part, eps)
        if root is not None:
            ratio.div_(root)
        if _is_quick(p):
            power = _quick_power_(ratio, p - 1)
        else:
            power = log_(ratio).mul_((q - 1) * _LOG2_E).exp2_()
        if target.dtype != power.dtype:
            power.mul_(slope)
            target.copy_(power if whole else torch.ops.aten.threshold_backward(power, at_least_float32(part), eps))
        elif whole:
            torch.mul(power, slope, out=target)
        else:
            torch.ops.aten.threshold_backward.grad_input(power.mul_(slope), part, eps, grad_input=target)
    return result


def _on_host(maps: Tensor) -> bool:
    return maps.device.type == 'cpu'


def _is_within(x: Tensor, low: float, high: float) -> bool:
    """Whether all values are, none of them NaN."""
    smallest, largest = x.aminmax()
    return low <= smallest.item() and largest.item() <= high


def _is_quick(p: float | Tensor) -> bool:
    return isinstance(p, float) and p in _QUICK


def _quick_power_(a: Tensor, p: float) -> Tensor:
    """a^p in place for a p of `_QUICK`, or such a p - 1."""
    if p == 4:
        return a.square_().square_()
    if p % 1 == 0:
        return a.pow_(p)  # torch multiplies for 1, 2, 3
    root = a.rsqrt()
    return a.pow_(p + 0.5).mul_(root)
