"""The parameters of the instance loss in a group of their own of timm's optimizer."""
from torch import nn
from torch.optim import Optimizer

__all__ = ['split_off']


def split_off(optimizer: Optimizer, parameters: list[nn.Parameter], lr: float | None = None) -> None:
    """Move `parameters` into a new last group: no weight decay, no layer decay, and a learning rate of their own.

    A `param_group_fn` would do the same, but turns timm's layer decay off and is stored in checkpoints.

    Args:
        optimizer: One of timm's, before its first step.
        parameters: Members of its groups.
        lr: Learning rate; None takes the optimizer's.
    """
    own = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group['params'] = [p for p in group['params'] if id(p) not in own]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]
    lr = optimizer.defaults['lr'] if lr is None else lr
    optimizer.add_param_group({'params': list(parameters), 'weight_decay': 0., 'lr': lr})
