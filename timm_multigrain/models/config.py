"""timm's model configuration of a MultiGrain, derived from that of its trunk."""

__all__ = ['model_cfg']

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
