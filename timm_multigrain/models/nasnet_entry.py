"""The entrypoint of NASNet-A-Mobile; the network itself is loaded when one is built."""
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

default_cfgs = generate_default_cfgs({
    'nasnetamobile.untrained': {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875,
        'interpolation': 'bilinear', 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
        'first_conv': 'conv0.conv', 'classifier': 'last_linear', 'paper_ids': 'arXiv:1707.07012',
    },
})


@register_model
def nasnetamobile(pretrained: bool = False, **kwargs) -> nn.Module:
    """NASNet-A-Mobile, without weights of its own."""
    from .nasnet import NASNetAMobile
    return build_model_with_cfg(
        NASNetAMobile, 'nasnetamobile', pretrained, feature_cfg=dict(feature_cls='hook', no_rewrite=True), **kwargs)
