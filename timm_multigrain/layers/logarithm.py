"""The natural logarithm, where it is a large part of the work."""
import numpy as np
import torch
from torch import Tensor

from timm_multigrain.eager import is_traced

__all__ = ['log_']


def log_(a: Tensor) -> Tensor:
    """Natural logarithm in place.

    On one thread it is numpy's: torch calls MKL, which takes 2.5 times as long on an AMD EPYC. numpy's is wrong by up
    to 4 units in the last place instead of 1, and is quick on x86 only.
    """
    if (torch.get_num_threads() > 1 or a.device.type != 'cpu' or type(a) is not Tensor or is_traced()
            or not torch.backends.cpu.get_cpu_capability().startswith('AVX')):
        return a.log_()
    values = a.numpy()
    with np.errstate(all='ignore'):  # 0 becomes -inf, as in torch
        np.log(values, out=values)
    return a
