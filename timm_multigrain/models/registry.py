"""The registered `multigrain_*` models, their pretrained weights, and `register_multigrain` for any other timm trunk.

Official weights: https://github.com/facebookresearch/multigrain, CC BY-NC 4.0. A tag reads fb_p<p>_l<lambda>[_aa]_in1k
for the jointly trained ResNet-50 (lambda weighs cross-entropy against the margin loss, aa = AutoAugment) and
fb_p<p>_<size>_in1k where only p was fine-tuned at a test size.
"""
import sys

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)

from .multigrain import MultiGrain
from .trunk import model_cfg
from .weights import build_pretrained, check_saved_args

# model: trunk, what it is
_MODELS = {
    'multigrain_resnet18': ('resnet18', 'ResNet-18'),
    'multigrain_resnet34': ('resnet34', 'ResNet-34'),
    'multigrain_resnet50': ('resnet50', 'ResNet-50: the model of the paper'),
    'multigrain_resnet101': ('resnet101', 'ResNet-101'),
    'multigrain_resnet152': ('resnet152', 'ResNet-152'),
    'multigrain_senet154': ('legacy_senet154', 'SENet-154'),
    'multigrain_pnasnet5large': (
        'pnasnet5large', "PNASNet-5-Large with the original's padding, timm's at sides of 11 modulo 32 only"),
    'multigrain_nasnetamobile': ('nasnetamobile', 'NASNet-A-Mobile, a trunk that timm does not have'),
    'multigrain_convnext_tiny': ('convnext_tiny', 'ConvNeXt-T. GeM clamps the negative half of its signed map'),
    'multigrain_efficientnet_b0': ('efficientnet_b0', 'EfficientNet-B0'),
    'multigrain_vit_small_patch14_dinov2': (
        'vit_small_patch14_dinov2', 'DINOv2 ViT-S/14: GeM over the patch tokens, whose negative half it clamps'),
}
_LATER = ('convnext_tiny', 'efficientnet_b0', 'vit_small_patch14_dinov2')  # trunks with a preprocessing of their own

_COPIES = 'repeated augmentation (3 copies per image)'
_JOINT = f'full augmentation, {_COPIES}'
_TUNED = 'with cross-entropy only (lambda = 1), the rest of a trained'
# tag of the published weights: file on the authors' server, training, top-1, size of the test
_OFFICIAL = {
    'resnet50.fb_p3_l05_aa_in1k': (
        'multigrain_models/joint_3BAA_0.5', f'p = 3, lambda = 0.5, AutoAugment, {_COPIES}',
        '78.2 at 224, 79.4 at longer side 500', None),
    'resnet50.fb_p3_l05_in1k': (
        'multigrain_models/joint_3B_0.5', f'p = 3, lambda = 0.5, {_JOINT}',
        '77.4 at 224, 78.6 at longer side 500 with p = 4', None),
    'resnet50.fb_p1_l05_in1k': (
        'multigrain_models/joint_1B_0.5', f'p = 1, lambda = 0.5, {_JOINT}', '77.0 at 224', None),
    'resnet50.fb_p3_l1_in1k': (
        'multigrain_models/joint_3B_1.0', f'p = 3, lambda = 1 (classification only), {_JOINT}', '76.9 at 224', None),
    'resnet50.fb_p1_l1_in1k': (
        'multigrain_models/joint_1B_1.0', f'p = 1, lambda = 1 (classification only), {_JOINT}', '76.8 at 224', None),
    'senet154.fb_p16_400_in1k': (
        'finetuned_models/senet154-finetune400', f'p = 1.6 fine-tuned at 400 pixels {_TUNED} SENet-154',
        '83.0 at 400, 83.1 at 450', 400),
    'pnasnet5large.fb_p17_500_in1k': (
        'finetuned_models/pnasnet5large-finetune500', f'p = 1.7 fine-tuned at 500 pixels {_TUNED} PNASNet-5-Large',
        '83.6 at 500', 500),
    'nasnetamobile.fb_p17_350_in1k': (
        'finetuned_models/nasnetamobile-finetune350', f'p = 1.7 fine-tuned at 350 pixels {_TUNED} NASNet-A-Mobile',
        '75.1 at 350', 350),
}


def _trunk_cfg(trunk: str, **kwargs) -> dict:
    """Configuration of a model on a registered trunk, without weights unless given in ``kwargs``."""
    base = get_pretrained_cfg(trunk)
    return model_cfg(base.to_dict() if base else {}, **kwargs)


def _default_cfgs() -> dict[str, dict]:
    """Of the paper's trunks with its preprocessing (shorter side 256, centre crop 224), and the published weights."""
    paper = dict(crop_pct=0.875, interpolation='bilinear')
    cfgs = {'multigrain.untrained': _trunk_cfg('resnet50', **paper)}
    for name, (trunk, _) in _MODELS.items():
        tags = {tag: known for tag, known in _OFFICIAL.items() if name == f'multigrain_{tag.partition(".")[0]}'}
        for tag, (file, training, top1, size) in tags.items():
            cfgs[f'multigrain_{tag}'] = _trunk_cfg(
                trunk, **paper, url=f'https://dl.fbaipublicfiles.com/multigrain/{file}.pth', license='cc-by-nc-4.0',
                description=f'MultiGrain, {training}; top-1 {top1}', test_input_size=size and (3, size, size),
                notes=('not for commercial use', 'top-1 as published by the authors of the paper'))
        if not tags:
            cfgs[f'{name}.untrained'] = _trunk_cfg(trunk, **({} if trunk in _LATER else paper))
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _create_multigrain(variant: str, pretrained: bool = False, **kwargs) -> MultiGrain:
    check_saved_args(kwargs.get('pretrained_model_args'))  # of a config.json
    kwargs['feature_cfg'] = dict(feature_cls='getter', out_indices=None)
    if pretrained:
        return build_pretrained(MultiGrain, variant, **kwargs)
    return build_model_with_cfg(MultiGrain, variant, False, **kwargs)


@register_model
def multigrain(pretrained: bool = False, **kwargs) -> MultiGrain:
    """MultiGrain on the timm model that `trunk` names, ResNet-50 without it."""
    trunk = kwargs.setdefault('trunk', 'resnet50')
    if not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):
        kwargs['pretrained_cfg'] = _trunk_cfg(trunk, architecture='multigrain')
    return _create_multigrain('multigrain', pretrained, **kwargs)


def _register(name: str, trunk: str, what: str, generic: bool = False) -> None:
    """Register a model on a trunk; a generic one is saved as `multigrain` with this trunk."""
    def entrypoint(pretrained: bool = False, **kwargs) -> MultiGrain:
        model = _create_multigrain(name, pretrained, **dict(kwargs, trunk=trunk))
        if generic:
            model.pretrained_cfg['architecture'] = 'multigrain'
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f'MultiGrain, {what}.'
    setattr(sys.modules[__name__], name, register_model(entrypoint))


for _name, (_trunk, _what) in _MODELS.items():
    _register(_name, _trunk, _what)


def register_multigrain(trunk: str) -> str:
    """Register `multigrain_<trunk>` for another timm model, so that timm.create_model and its scripts know the name.

    The saved config names the generic `multigrain` with this trunk: whoever loads it needs no registration. A tag in
    the trunk's name selects its weights for `pretrained_trunk=True`. Returns the new model name.

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
    default_cfgs.update(generate_default_cfgs({f'{name}.untrained': _trunk_cfg(arch)}))
    _register(name, trunk, arch, generic=True)
    return name
