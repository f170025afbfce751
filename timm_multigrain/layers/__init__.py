from .functional import l2_normalize
from .gem import GeM, gem
from .pool_factory import create_pool, is_multigrain_pool
from .regional import MAC, RMAC, ClassToken, CroW, SPoC
from .whitening import Whitening

__all__ = [
    'MAC', 'RMAC', 'ClassToken', 'CroW', 'GeM', 'SPoC', 'Whitening', 'create_pool', 'gem', 'is_multigrain_pool',
    'l2_normalize']
