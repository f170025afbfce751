"""The trunk's own head and its class token as poolings: equal to timm's, kept by everything that keeps a model.

All families of timm: python benchmarks/poolings.py
"""
import runpy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_multigrain import MultiGrain, MultiGrainTask, open_model, save_pretrained
from timm_multigrain.embed.poolings import Systems, choose_systems
from timm_multigrain.hub import publish

TINY = dict(depth=1, embed_dim=32, num_heads=2, img_size=32)
# one model for each kind of head
HEADS = {
    'test_resnet': {}, 'test_efficientnet': {}, 'test_convnext': {}, 'test_byobnet': {}, 'test_nfnet': {},
    'mobilenetv3_small_050': {}, 'ghostnet_050': {}, 'efficientvit_b0': {},  # convolutions in the head
    'swin_tiny_patch4_window7_224': dict(depths=(1, 1), embed_dim=16, num_heads=(1, 2)),
    'test_vit': {}, 'test_vit2': {}, 'test_vit3': {}, 'test_vit_relpos': {},
    'vit_small_patch14_reg4_dinov2': dict(TINY, img_size=28), 'vit_base_patch16_siglip_224': TINY,
    'vit_small_patch16_dinov3': TINY, 'vit_pe_core_tiny_patch16_384': TINY, 'beit_base_patch16_224': TINY,
    'convit_tiny': {},
    'deit_tiny_distilled_patch16_224': TINY, 'pit_ti_distilled_224': {}, 'crossvit_tiny_240': {},
    'levit_128s': {}, 'pvt_v2_b0': {}, 'coat_tiny': dict(serial_depths=(1, 1, 1, 1), parallel_depth=1)}


def trained(name, **kwargs):
    """A timm model whose norms are not at their start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 3, **kwargs}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model


def images_for(model, number=2):
    return torch.randn(number, 3, *model.input_sizes.size)


def own_embedding(plain, x):
    return plain.forward_head(plain.forward_features(x), pre_logits=True)


def raw(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize('name', HEADS)
@torch.no_grad()
def test_trunk_is_what_timms_head_gives(name):
    plain = trained(name, **HEADS[name])
    model = MultiGrain(name, num_classes=0, global_pool='trunk', **HEADS[name]).eval()
    model.load_state_dict(plain.state_dict())
    x = images_for(model)
    expected = own_embedding(plain, x)
    torch.testing.assert_close(raw(model, x), expected, rtol=1e-6, atol=1e-6)
    assert expected.shape == (2, model.embed_dim) and model.global_pool == 'trunk'
    # dropout belongs to the classifier
    for module in model.train().modules():
        module.train(not isinstance(module, nn.modules.batchnorm._BatchNorm) and 'drop_path' not in module.__dict__)
    if name == 'ghostnet_050':
        assert plain.drop_rate > 0
        torch.testing.assert_close(raw(model, x), expected)


def test_class_token_and_attention_pooling():
    x = torch.randn(2, 3, 160, 160)
    plain = trained('test_vit', global_pool='token')
    models = {name: MultiGrain('test_vit', num_classes=3, global_pool=name).eval() for name in ('cls', 'cls+gem4')}
    for model in models.values():
        model.load_state_dict(plain.state_dict(), strict=False)
    tokens = plain.forward_features(x)
    torch.testing.assert_close(raw(models['cls'], x), own_embedding(plain, x))
    gem = torch.stack([tokens[:, i].clamp(min=1e-6) ** 4 for i in range(1, tokens.shape[1])]).mean(0) ** 0.25
    torch.testing.assert_close(raw(models['cls+gem4'], x), torch.cat([tokens[:, 0], gem], 1))
    both = models['cls+gem4']
    both.set_gem_p(2)
    assert (both.global_pool, both.gem_p, both.embed_dim, both.num_features) == ('cls+gem', 2, 128, 64)
    plain = trained('test_vit2', global_pool='map')  # which is made to average
    model = MultiGrain('test_vit2', num_classes=0, global_pool='map').eval()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(raw(model, x), own_embedding(plain, x))


@pytest.mark.parametrize('trunk, pool', [
    ('test_vit3', 'trunk'), ('test_vit2', 'map'), ('test_vit', 'cls+gem_learn'), ('test_convnext', 'trunk')])
def test_training_reaches_every_parameter(trunk, pool):
    model = MultiGrain(trunk, num_classes=3, global_pool=pool)
    x = images_for(model, 4)
    task = MultiGrainTask(model, verbose=False).train()
    task(x, torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]]))['loss'].backward()
    assert all(value.grad is not None for value in model.parameters())
    scripted, x = torch.jit.script(model.eval()), x[:, :, :160, :160]
    torch.testing.assert_close(scripted(x), model(x))


@torch.no_grad()
def test_saving_whitening_and_the_hub_keep_the_pooling(hub, tmp_path):
    for number, (trunk, pool) in enumerate([
            ('test_vit', 'cls+gem2'), ('test_vit2', 'map'), ('test_convnext', 'trunk'), ('test_vit', 'cls')]):
        model = timm.create_model('multigrain', trunk=trunk, global_pool=pool, num_classes=3).eval()
        model.set_whitening(8)
        model.head.whitening.proj.normal_()
        x = images_for(model)
        opened = [open_model(save_pretrained(model, tmp_path / f'{number}'))]
        if number == 0:
            publish(model, 'me/tokens', license='mit')
            opened.append(open_model('hf-hub:me/tokens'))
        for other in opened:
            assert (other.global_pool, other.gem_p) == (model.global_pool, model.gem_p) and other.whitened
            assert torch.equal(other.embed(x), model.embed(x)) and torch.equal(other(x), model(x))
        with pytest.raises(ValueError, match='whitened for its own pooling'):
            open_model(tmp_path / f'{number}', pool='gem5')


@pytest.mark.parametrize('name, kept', [('test_resnet', 3), ('test_vit2', 0), ('test_convnext', 0)])
@torch.no_grad()
def test_another_pooling_of_a_timm_model(tmp_path, name, kept):
    """Of its map; the classifier stays where the mean of the map is what it was trained on."""
    plain = trained(name)
    timm.models.save_for_hf(plain, str(tmp_path / 'plain'), safe_serialization=True)
    for model in (open_model(tmp_path / 'plain', pool='gem'), open_model(tmp_path / 'plain', p=3)):
        assert (model.global_pool, model.gem_p, model.num_classes) == ('gem', 3, kept)
        x = images_for(model)
        plain.reset_classifier(0, '')
        tokens = plain(x)[:, 1:] if name == 'test_vit2' else plain(x).flatten(2).mT  # which has a register
        torch.testing.assert_close(raw(model, x), tokens.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3))
        assert torch.equal(open_model(save_pretrained(model, tmp_path / 'saved')).embed(x), model.embed(x))
        with pytest.raises(ValueError, match="'trunk' needs the own head of the trunk"):
            model.set_pool('trunk')


@torch.no_grad()
def test_all_poolings_from_one_pass(tmp_path):
    timm.models.save_for_hf(trained('test_vit'), str(tmp_path), safe_serialization=True)
    model = open_model(tmp_path)
    systems = Systems.of(model, choose_systems(model, ['gem', 'trunk', 'cls', 'cls+gem', 'avg'], [2., 3.]))
    x = images_for(model)
    side_by_side = systems.forward_head(systems.forward_features(x))
    assert side_by_side.shape[1] == (2 + 1 + 1 + 2 * 2 + 1) * 64 and model.global_pool == 'trunk'
    assert len({value.data_ptr() for value in systems.trunks.parameters()}) == len(list(model.trunk.parameters()))
    for number, system in enumerate(systems.systems):
        pool = system.pooling + ('' if system.p is None else f'{system.p}')
        torch.testing.assert_close(systems.take(side_by_side, number), open_model(tmp_path, pool=pool).embed(x))


@pytest.mark.parametrize('trunk, pool, message', [
    ('test_resnet', 'cls', "'cls' takes the class token, which this trunk does not have: choose 'trunk'"),
    ('test_vit2', 'cls+gem', "'cls\\+gem' takes the class token"), ('test_resnet', 'map', "global_pool='map'"),
    ('vit_tiny_r_s16_p8_224', 'cls+nothing', "Unknown global_pool 'cls\\+nothing'"),
    ('beit_base_patch16_224', 'map', "choose another pooling; global_pool='trunk' is its own"),
    ('crossvit_tiny_240', 'gem', "global_pool='trunk' is its own"), ('pit_ti_224', 'gem', "or global_pool='trunk'"),
    ('mobilenetv5_300m_enc', 'trunk', 'does not have a pooling of its own')])
def test_a_pooling_that_the_trunk_cannot_have(trunk, pool, message):
    with pytest.raises(ValueError, match=message):
        MultiGrain(trunk, num_classes=0, global_pool=pool, device='meta')


def test_a_refused_change_changes_nothing(tmp_path):
    model = MultiGrain('test_vit2', num_classes=3, global_pool='trunk')
    before = model(torch.ones(1, 3, 160, 160))
    for pool in ('cls', 'map', 'nothing'):
        with pytest.raises(ValueError, match=r'class token|attention pooling|Unknown'):
            model.set_pool(pool)
    assert model.global_pool == 'trunk' and torch.equal(model(torch.ones(1, 3, 160, 160)), before)


def test_the_table_of_the_guide():
    """Every family is in it, and some are as they are now."""
    script = runpy.run_path(str(Path(__file__).parents[1] / 'benchmarks/poolings.py'))
    text, names, rows = script['README'].read_text(), script['families'](), {}
    for line in text[text.index(script['MARKS'][0]):].split('\n\n')[0].splitlines()[3:]:
        families, *cells = line.strip('|').split('|')
        rows |= dict.fromkeys(families.strip().split(', '), tuple('yes' in cell for cell in cells))
    assert timm.__version__ not in text or rows.keys() == names.keys()
    for family in ('resnet', 'vision_transformer', 'pit'):
        assert script['works'](names[family]) == rows[family]
