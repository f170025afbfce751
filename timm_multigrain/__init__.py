"""MultiGrain for timm: one image embedding for classes, instances and copies (Berman et al., arXiv 1902.05509).

Importing this package registers the `multigrain_*` models with timm and teaches timm's pooling factory 'gem' and its
relatives. Everything else is imported on first use, so the import itself stays cheap.
"""
import importlib
import os
import sys
from itertools import pairwise

from .version import __version__

_LAZY = {
    'models': ('MultiGrain', 'checkpoint_filter_fn', 'register_multigrain'),
    'layers': ('GeM', 'MAC', 'RMAC', 'SPoC', 'CroW', 'create_pool', 'gem', 'l2_normalize'),
    'loss': (
        'ContrastiveLoss', 'DistanceWeightedSampler', 'MarginLoss', 'TripletLoss', 'UniformSampler',
        'create_instance_loss', 'create_sampler', 'effective_negatives', 'margin_loss', 'margin_statistics'),
    'data': ('InstanceDataset', 'InstanceSampler', 'Lighting', 'RepeatedAugSampler', 'create_loader'),
    'task': ('MultiGrainTask',),
    'models.open': ('open_model',),
    'models.save': ('save_pretrained',),
    'images.sources': ('open_images',),
    'embed.protocol': ('Protocol',),
    'embed.extract': ('extract',),
    'whiten.fit': ('fit_whitening', 'fold_whitening', 'whiten_model'),
    'whiten.adapt': ('adapt', 'fit_adaptation'),
    'index': ('Index',),
    'measure.tune_p': ('tune_p',),
    'measure.evaluate': ('evaluate',),
    'measure.classify': ('validate',),
    'hub': ('publish',),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = ['__version__', *_HOME]


def _register() -> None:
    from . import _timm, models  # noqa: F401 - _timm first: it refuses a timm that models cannot be imported with
    from .layers.pool_factory import install

    install()


def _is_command() -> bool:
    """Whether this process is `timm-multigrain` or `python -m timm_multigrain`."""
    if not sys.argv:
        return False
    as_module = sys.argv[0] == '-m' and ('-m', __name__) in pairwise(sys.orig_argv)
    return as_module or os.path.splitext(os.path.basename(sys.argv[0]))[0] == 'timm-multigrain'


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if not _is_command():  # the command answers --help without torch and timm, and registers before it does anything else
    _register()
