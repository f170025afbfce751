"""Share embeddings across the ranks of a distributed run, with gradients: negatives from the whole batch."""
import torch
import torch.distributed as dist

__all__ = ['all_gather_with_grad']


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start:start + ctx.rows]


def all_gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """Rows of every rank, in rank order; without a process group, x as it is.

    Every rank then computes the same loss of the whole batch, and the backward sums the ranks' gradients: averaged over
    ranks, as DDP does, that is the gradient of one process on the whole batch.

    Args:
        x: (B, ...), the same shape on each rank.

    Returns:
        (world size * B, ...).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return _AllGather.apply(x)
