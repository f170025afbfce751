"""What the layers have in common: L2 normalisation, formats and precision of maps, who looks at their operations."""
import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary

_SPATIAL_DIMS = {'NCHW': [-2, -1], 'NHWC': [-3, -2], 'NLC': [-2]}


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / (||x|| + eps) over the last dimension, as MultiGrain defines it (https://arxiv.org/abs/1902.05509).

    eps is added to the norm, so the result is slightly shorter than 1; a zero row stays zero with a finite gradient.

    Args:
        x: (..., C), floating point.
        eps: Added to the norm.

    Returns:
        (..., C) in the dtype of x; the arithmetic is float32, or float64 for a float64 x.

    Example:
        >>> l2_normalize(torch.tensor([[3., 4.]]))
        tensor([[0.6000, 0.8000]])
    """
    y = at_least_float32(x)
    return (y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) + eps)).to(x.dtype)


def spatial_dims(input_fmt: str, num_prefix_tokens: int = 0) -> list[int]:
    """Dimensions to pool in a format; ValueError for an unknown one, or for prefix tokens of a map."""
    if input_fmt not in _SPATIAL_DIMS:
        raise ValueError(f'Unknown input_fmt {input_fmt!r}, expected one of {", ".join(_SPATIAL_DIMS)}.')
    if num_prefix_tokens and input_fmt != 'NLC':
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} needs input_fmt='NLC', got {input_fmt!r}.")
    return _SPATIAL_DIMS[input_fmt]


def is_traced() -> bool:
    """Whether a compiler, tracer, exporter or function transform looks at what is called now."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0)


# Branches on dtype and size cannot be traced symbolically. Dispatching as torch.nn.functional does keeps each of these
# functions as one node of an fx graph.

def drop_prefix_tokens(x: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """(N, L, C) without its first `num_prefix_tokens` tokens; ValueError if none is left."""
    if has_torch_function_unary(x):
        return handle_torch_function(drop_prefix_tokens, (x,), x, num_prefix_tokens)
    if x.shape[1] <= num_prefix_tokens:
        raise ValueError(
            f'Cannot pool {x.shape[1]} tokens of which the first {num_prefix_tokens} are prefix tokens: none is left.')
    return x[:, num_prefix_tokens:]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32; a float64 x as it is."""
    if has_torch_function_unary(x):
        return handle_torch_function(at_least_float32, (x,), x)
    return x if x.dtype == torch.float64 else x.float()
