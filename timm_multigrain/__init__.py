"""MultiGrain for timm: one image embedding for classes, instances and copies (Berman et al., arXiv 1902.05509).

Importing this package registers the `multigrain_*` models with timm and teaches timm's pooling factory 'gem' and its
relatives. Everything else is imported on first use, so the import itself stays cheap.
"""
import importlib

from . import _timm  # noqa: F401 - first: it refuses a timm that the rest cannot be imported with
from .layers.pool_factory import install as _install_pools
from .models import MultiGrain, checkpoint_filter_fn, register_multigrain
from .version import __version__

_install_pools()

_LAZY = {
    'layers': ('GeM', 'MAC', 'RMAC', 'SPoC', 'CroW', 'create_pool', 'gem', 'l2_normalize'),
    'loss': (
        'ContrastiveLoss', 'DistanceWeightedSampler', 'MarginLoss', 'TripletLoss', 'UniformSampler',
        'create_instance_loss', 'create_sampler', 'effective_negatives', 'margin_loss', 'margin_statistics'),
    'data': ('InstanceDataset', 'Lighting', 'RepeatedAugSampler', 'create_loader'),
    'task': ('MultiGrainTask',),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = ['MultiGrain', '__version__', 'checkpoint_filter_fn', 'register_multigrain', *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
