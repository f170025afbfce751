"""L2 normalisation as MultiGrain defines it.

Paper: `MultiGrain: a unified image embedding for classes and instances`, https://arxiv.org/abs/1902.05509
"""
import torch

from .format import at_least_float32


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / (||x|| + eps) over the last dimension.

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
