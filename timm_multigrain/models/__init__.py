from .multigrain import MultiGrain
from .registry import register_multigrain
from .weights import checkpoint_filter_fn

__all__ = ['MultiGrain', 'checkpoint_filter_fn', 'register_multigrain']
