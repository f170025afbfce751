"""The registered `multigrain_*` models, their pretrained weights, and `register_multigrain` for any other timm trunk.

Official weights: https://github.com/facebookresearch/multigrain, CC BY-NC 4.0. A tag reads fb_p<p>_l<lambda>[_aa]_in1k
for the jointly trained ResNet-50 (lambda weighs cross-entropy against the margin loss, aa = AutoAugment) and
fb_p<p>_<size>_in1k where only p was fine-tuned at a test size.
"""
import sys
from collections.abc import Sequence

import timm
import torch
import torch.nn as nn
from timm.models import FeatureInfo, PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model

from .config import check_saved_args, official_cfg, paper_cfg, trunk_cfg
from .multigrain import MultiGrain
from .weights import build_pretrained

__all__ = ['register_multigrain']

_COPIES = 'repeated augmentation (3 copies per image)'

# tag: file on the authors' server, training, top-1
_JOINT = {
    'fb_p3_l05_aa_in1k': (
        'joint_3BAA_0.5.pth', f'p = 3, lambda = 0.5, AutoAugment, {_COPIES}', '78.2 at 224, 79.4 at longer side 500'),
    'fb_p3_l05_in1k': (
        'joint_3B_0.5.pth', f'p = 3, lambda = 0.5, full augmentation, {_COPIES}',
        '77.4 at 224, 78.6 at longer side 500 with p = 4'),
    'fb_p1_l05_in1k': (
        'joint_1B_0.5.pth', f'p = 1, lambda = 0.5, full augmentation, {_COPIES}', '77.0 at 224'),
    'fb_p3_l1_in1k': (
        'joint_3B_1.0.pth', f'p = 3, lambda = 1 (classification only), full augmentation, {_COPIES}', '76.9 at 224'),
    'fb_p1_l1_in1k': (
        'joint_1B_1.0.pth', f'p = 1, lambda = 1 (classification only), full augmentation, {_COPIES}', '76.8 at 224'),
}

default_cfgs = generate_default_cfgs({
    'multigrain.untrained': paper_cfg('resnet50'),
    'multigrain_resnet18.untrained': paper_cfg('resnet18'),
    'multigrain_resnet34.untrained': paper_cfg('resnet34'),
    **{
        f'multigrain_resnet50.{tag}': official_cfg('resnet50', f'multigrain_models/{file}', training, top1)
        for tag, (file, training, top1) in _JOINT.items()
    },
    'multigrain_resnet101.untrained': paper_cfg('resnet101'),
    'multigrain_resnet152.untrained': paper_cfg('resnet152'),
    'multigrain_senet154.fb_p16_400_in1k': official_cfg(
        'legacy_senet154', 'finetuned_models/senet154-finetune400.pth',
        'p = 1.6 fine-tuned at 400 pixels with cross-entropy only (lambda = 1), the rest of a trained SENet-154',
        '83.0 at 400, 83.1 at 450', test_input_size=(3, 400, 400)),
    'multigrain_pnasnet5large.fb_p17_500_in1k': official_cfg(
        'pnasnet5large', 'finetuned_models/pnasnet5large-finetune500.pth',
        'p = 1.7 fine-tuned at 500 pixels with cross-entropy only (lambda = 1), the rest of a trained PNASNet-5-Large',
        '83.6 at 500', test_input_size=(3, 500, 500)),
    'multigrain_nasnetamobile.fb_p17_350_in1k': official_cfg(
        'nasnetamobile', 'finetuned_models/nasnetamobile-finetune350.pth',
        'p = 1.7 fine-tuned at 350 pixels with cross-entropy only (lambda = 1), the rest of a trained NASNet-A-Mobile',
        '75.1 at 350', test_input_size=(3, 350, 350)),
    'multigrain_convnext_tiny.untrained': trunk_cfg('convnext_tiny'),
    'multigrain_efficientnet_b0.untrained': trunk_cfg('efficientnet_b0'),
    'multigrain_vit_small_patch14_dinov2.untrained': trunk_cfg('vit_small_patch14_dinov2'),
})


def _create_multigrain(variant: str, pretrained: bool = False, **kwargs) -> MultiGrain:
    check_saved_args(kwargs.get('pretrained_model_args'))  # of a config.json
    kwargs['feature_cfg'] = dict(feature_cls='getter', out_indices=None)
    if 'feature_cls' in kwargs:
        kwargs['feature_cls'] = _feature_cls(kwargs['feature_cls'])
    if pretrained:
        return build_pretrained(MultiGrain, variant, **kwargs)
    return build_model_with_cfg(MultiGrain, variant, False, **kwargs)


class _FeatureDict(nn.Module):
    """The trunk's intermediate maps (NCHW) by their numbers as strings, as timm's FeatureDictNet names them."""

    def __init__(self, model: MultiGrain, out_indices: Sequence[int] | int | None = None, output_fmt: str = 'NCHW'):
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.model.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
        return {str(i): feature for i, feature in zip(self.out_indices, maps, strict=True)}


def _feature_cls(name: str | type) -> str | type:
    """What timm is to wrap a model in for ``features_only``: 'getter' or 'list', or 'dict'."""
    known = {'getter': 'getter', 'list': 'getter', 'dict': _FeatureDict}
    if isinstance(name, str) and name not in known:
        raise ValueError(f"feature_cls={name!r} is not for a MultiGrain: give 'list' or 'dict'.")
    return known.get(name, name)


@register_model
def multigrain(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain on the timm model that `trunk` names, ResNet-50 without it."""
    trunk = kwargs.setdefault('trunk', 'resnet50')
    if not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):
        kwargs['pretrained_cfg'] = trunk_cfg(trunk, architecture='multigrain')
    return _create_multigrain('multigrain', pretrained, **kwargs)


@register_model
def multigrain_resnet18(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, ResNet-18."""
    return _create_multigrain('multigrain_resnet18', pretrained, **dict(kwargs, trunk='resnet18'))


@register_model
def multigrain_resnet34(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, ResNet-34."""
    return _create_multigrain('multigrain_resnet34', pretrained, **dict(kwargs, trunk='resnet34'))


@register_model
def multigrain_resnet50(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, ResNet-50: the model of the paper."""
    return _create_multigrain('multigrain_resnet50', pretrained, **dict(kwargs, trunk='resnet50'))


@register_model
def multigrain_resnet101(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, ResNet-101."""
    return _create_multigrain('multigrain_resnet101', pretrained, **dict(kwargs, trunk='resnet101'))


@register_model
def multigrain_resnet152(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, ResNet-152."""
    return _create_multigrain('multigrain_resnet152', pretrained, **dict(kwargs, trunk='resnet152'))


@register_model
def multigrain_senet154(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, SENet-154."""
    return _create_multigrain('multigrain_senet154', pretrained, **dict(kwargs, trunk='legacy_senet154'))


@register_model
def multigrain_pnasnet5large(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, PNASNet-5-Large with the original's padding, which is timm's at sides of 11 modulo 32 only."""
    return _create_multigrain('multigrain_pnasnet5large', pretrained, **dict(kwargs, trunk='pnasnet5large'))


@register_model
def multigrain_nasnetamobile(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, NASNet-A-Mobile, a trunk that timm does not have."""
    return _create_multigrain('multigrain_nasnetamobile', pretrained, **dict(kwargs, trunk='nasnetamobile'))


@register_model
def multigrain_convnext_tiny(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, ConvNeXt-T. GeM clamps the negative half of its signed map."""
    return _create_multigrain('multigrain_convnext_tiny', pretrained, **dict(kwargs, trunk='convnext_tiny'))


@register_model
def multigrain_efficientnet_b0(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, EfficientNet-B0."""
    return _create_multigrain('multigrain_efficientnet_b0', pretrained, **dict(kwargs, trunk='efficientnet_b0'))


@register_model
def multigrain_vit_small_patch14_dinov2(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain, DINOv2 ViT-S/14: GeM over the patch tokens. GeM clamps the negative half of them."""
    return _create_multigrain(
        'multigrain_vit_small_patch14_dinov2', pretrained, **dict(kwargs, trunk='vit_small_patch14_dinov2'))


def register_multigrain(trunk: str) -> str:
    """Register `multigrain_<trunk>` for another timm model, so that timm.create_model and its scripts know the name.

    The saved config names the generic `multigrain` with this trunk: whoever loads it needs no registration.

    Args:
        trunk: A timm model name; a tag selects the trunk's weights for `pretrained_trunk=True`.

    Returns:
        The new model name.

    Raises:
        ValueError: timm does not know the trunk.

    Example:
        >>> register_multigrain('regnety_002')
        'multigrain_regnety_002'
    """
    arch = trunk.split('.')[0]
    name = f'multigrain_{arch}'
    if timm.is_model(name):
        return name
    if not timm.is_model(arch):
        raise ValueError(f'Unknown trunk {trunk!r}: timm.list_models() lists the valid names.')

    def entrypoint(pretrained: bool = False, **kwargs) -> MultiGrain:
        model = _create_multigrain(name, pretrained, **dict(kwargs, trunk=trunk))
        model.pretrained_cfg['architecture'] = 'multigrain'
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f'MultiGrain, {arch}.'
    default_cfgs.update(generate_default_cfgs({f'{name}.untrained': trunk_cfg(arch)}))
    setattr(sys.modules[__name__], name, register_model(entrypoint))
    return name
