"""timm's model configurations: of a MultiGrain on any trunk, and of the weights that the paper's authors published."""
from timm.models import get_pretrained_cfg

__all__ = ['model_cfg', 'official_cfg', 'paper_cfg', 'trunk_cfg']

_URL = 'https://dl.fbaipublicfiles.com/multigrain/'
_PAPER_TEST = {'crop_pct': 0.875, 'interpolation': 'bilinear'}  # shorter side 256, centre crop 224

_KEPT = ('input_size', 'min_input_size', 'fixed_input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std')


def model_cfg(trunk_cfg: dict, **kwargs) -> dict:
    """Configuration of a model on a trunk with this timm configuration, without weights unless given in ``kwargs``."""
    first_conv = trunk_cfg.get('first_conv')
    if first_conv is not None:
        single = isinstance(first_conv, str)
        first_conv = f'trunk.{first_conv}' if single else tuple(f'trunk.{name}' for name in first_conv)
    return {
        'num_classes': 1000,
        **{key: trunk_cfg[key] for key in _KEPT if trunk_cfg.get(key) is not None},
        'first_conv': first_conv,
        'classifier': 'head.fc',
        'paper_name': 'MultiGrain: a unified image embedding for classes and instances',
        'paper_ids': 'arXiv:1902.05509',
        'origin_url': 'https://github.com/facebookresearch/multigrain',
        **kwargs,
    }


def trunk_cfg(trunk: str, **kwargs) -> dict:
    """Configuration of a model on a registered trunk, without weights unless given in ``kwargs``."""
    base = get_pretrained_cfg(trunk)
    return model_cfg(base.to_dict() if base else {}, **kwargs)


def paper_cfg(trunk: str, **kwargs) -> dict:
    """As `trunk_cfg`, with the paper's preprocessing."""
    return trunk_cfg(trunk, **{**_PAPER_TEST, **kwargs})


def official_cfg(trunk: str, file: str, training: str, top1: str, **kwargs) -> dict:
    """Configuration of weights published by the authors, whose license forbids commercial use.

    Args:
        trunk: Registered trunk.
        file: Path on the authors' server.
        training: What the weights are: p, lambda, augmentation.
        top1: Published ImageNet accuracy, with the test size.
        **kwargs: Other fields of timm's configuration.
    """
    return paper_cfg(trunk, **{
        'url': _URL + file,
        'license': 'cc-by-nc-4.0',
        'description': f'MultiGrain, {training}; top-1 {top1}',
        'notes': ('not for commercial use', 'top-1 as published by the authors of the paper'),
        **kwargs})
