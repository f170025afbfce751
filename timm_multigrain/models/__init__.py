from .checkpoint import checkpoint_filter_fn
from .multigrain import MultiGrain
from .registry import register_multigrain

__all__ = ['MultiGrain', 'checkpoint_filter_fn', 'register_multigrain']
