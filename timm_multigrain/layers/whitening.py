"""Whitening of the pooled embedding: L2, PCA, L2 (Berman et al., arXiv 1902.05509, section 3.5).

The pooled embedding e of C channels gets a constant channel, z = [e; 1] / |[e; 1]|, and is projected,
y = (z - mean) proj. The classifier that follows works on y: with its weight multiplied by the inverse projection it
ranks the classes as before, while y / |y| is the whitened retrieval descriptor. The constant channel carries the
classifier's bias through the projection.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from .functional import l2_normalize


class Whitening(nn.Module):
    """L2 normalisation with a constant channel, then a stored affine projection.

    A fresh layer centres nothing and keeps the first ``out_features`` channels: its state is to be loaded or fitted.

    Args:
        in_features: Channels C of the pooled embedding.
        out_features: Components kept, at most C + 1, strongest first.

    Shape:
        (N, C) to (N, out_features), dtype kept. The arithmetic is float32 at least, also under autocast.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        if not 1 <= out_features <= in_features + 1:
            raise ValueError(
                f'whitening={out_features} components cannot be taken from {in_features} channels and the constant '
                f'one: choose 1 to {in_features + 1}.')
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer('mean', torch.zeros(in_features + 1, device=device, dtype=dtype))
        self.register_buffer('proj', torch.eye(in_features + 1, out_features, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _project(x, self.mean, self.proj)

    def extra_repr(self) -> str:
        return f'{self.in_features} + 1, {self.out_features}'


def _project(x: torch.Tensor, mean: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    if has_torch_function_unary(x):  # one node in an fx graph
        return handle_torch_function(_project, (x,), x, mean, proj)
    if not torch.jit.is_scripting():  # noqa: SIM102 - alone, or TorchScript would compile what follows
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _project(x, mean, proj)
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = l2_normalize(F.pad(x.to(dtype), (0, 1), value=1.))
    return ((z - mean.to(dtype)) @ proj.to(dtype)).to(x.dtype)
