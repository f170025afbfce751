"""Whether the code that runs is seen by PyTorch operation by operation, or simply executed."""
import torch
from torch.autograd import forward_ad

__all__ = ['is_traced']


def is_traced() -> bool:
    """Whether a compiler, tracer, exporter or function transform looks at what is called now."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0)
