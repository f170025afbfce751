"""The training task: the objective recomputed by hand, timm's task contract, and two real processes."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import timm_multigrain  # noqa: F401 - registers the models
from timm_multigrain.loss import DistanceWeightedSampler, UniformSampler, effective_negatives, margin_statistics
from timm_multigrain.task import MultiGrainTask

LEARNED = {'beta_init': 1.2}  # a parameter, as in the paper


def _model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('multigrain', trunk='test_resnet', num_classes=4, **kwargs)


def _batch(groups=4, repeats=3, size=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(groups * repeats, 3, size, size, generator=generator)
    instance = torch.arange(groups).repeat_interleave(repeats)
    return x, torch.stack([instance % 4, instance + 100], dim=1)


@pytest.mark.parametrize('weight', [0.0, 0.3, 0.5])
def test_objective_by_hand(weight):
    x, target = _batch()
    model = _model().eval()
    task = MultiGrainTask(
        model, classif_weight=weight, sampling=UniformSampler(generator=0), instance_loss_kwargs=LEARNED)
    task.train()
    model.eval()  # the same numbers again below
    result = task(x, target)
    with torch.no_grad():
        embedding = model.forward_head(model.forward_features(x), pre_logits=True).double()
        logits = model(x)
    unit = embedding / (embedding.norm(dim=1, keepdim=True) + 1e-6)
    triplets = UniformSampler(generator=0)(unit.float(), target[:, 1])
    total, active = 0., 0
    for a, p, n in zip(*(t.tolist() for t in triplets), strict=True):
        for term in (0.2 + (unit[a] - unit[p]).norm() - 1.2, 0.2 + 1.2 - (unit[a] - unit[n]).norm()):
            total, active = total + max(0., term.item()), active + (term > 0).item()
    cross_entropy = F.cross_entropy(logits, target[:, 0])
    assert result['instance_loss'].item() == pytest.approx(total / active, rel=1e-4)
    assert result['classification_loss'].item() == pytest.approx(cross_entropy.item(), rel=1e-4)
    expected = weight * cross_entropy.item() + (1 - weight) * total / active
    assert result['loss'].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(result['output'], logits, rtol=1e-4, atol=1e-5)


def test_lambda_one_is_timms_task():
    x, target = _batch()
    losses = []
    for make, y in (
            (lambda m: ClassificationTask(m), target[:, 0]),
            (lambda m: MultiGrainTask(m, classif_weight=1.0, num_repeats=1), target),
            (lambda m: MultiGrainTask(m, classif_weight=1.0), target[:, 0])):
        task = make(_model(drop_rate=0.5)).train()
        optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
        torch.manual_seed(3)
        for _ in range(3):
            result = task(x, y)
            optimizer.zero_grad()
            result['loss'].backward()
            optimizer.step()
        losses.append((result['loss'].item(), [p.detach().clone() for p in task.parameters()]))
        assert task.get_eval_model() is task.get_trainable_module()
    for loss, parameters in losses[1:]:
        assert loss == losses[0][0]
        assert all(torch.equal(a, b) for a, b in zip(parameters, losses[0][1], strict=True))


def test_evaluation_targets_and_any_timm_model():
    x, target = _batch()
    task = MultiGrainTask(timm.create_model('resnet10t', num_classes=4, global_pool='gem'))
    assert set(task.train()(x, target)) == {'loss', 'output', 'classification_loss', 'instance_loss', 'beta'}
    result = task.eval()(x, target[:, 0])
    assert set(result) == {'loss', 'output'}
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], target[:, 0]))


@pytest.mark.parametrize('name', [
    'resnet10t', 'test_vit',
    'mobilenetv4_conv_small_035',  # a batch norm in the head
    'resnetv2_18',  # the classifier is a convolution
    'deit_tiny_distilled_patch16_224', 'levit_128s'])  # two classifiers, a batch norm before them
def test_one_pass_through_the_head_of_any_timm_model(name):
    model = _any_timm_model(name, drop_rate=0.5).eval()
    plain = _any_timm_model(name, drop_rate=0.).eval()
    sizes = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or model.pretrained_cfg['input_size'][1:]
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(2))
    trainable = MultiGrainTask(model).trainable_module
    with torch.no_grad():
        logits, embedding, _ = trainable.eval()(x)
        assert torch.equal(logits, model(x))
        assert torch.equal(embedding, model.forward_head(model.forward_features(x), pre_logits=True))
        own = copy.deepcopy(model).train()
        trainable.train(), plain.train()
        torch.manual_seed(1)
        expected = own(x)
        torch.manual_seed(1)
        logits, embedding, _ = trainable(x)
        torch.manual_seed(1)
        undropped = plain.forward_head(plain.forward_features(x), pre_logits=True)
    assert torch.equal(embedding, undropped)
    if trainable._head.shape is not None:  # nothing random between the two but timm's own dropout
        assert torch.equal(logits, expected)
    counters = [v for k, v in model.named_buffers() if k.endswith('num_batches_tracked')]
    assert all(v == 1 for v in counters)


def _any_timm_model(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs)


def test_optimizer_groups_and_clipping():
    task = MultiGrainTask(_model(learn_p=True), instance_loss_kwargs=LEARNED).train()
    trainable = task.get_trainable_module()
    assert trainable.no_weight_decay() == {'model.head.pool.p', 'instance_loss.beta'}
    optimizer = create_optimizer_v2(trainable, opt='sgd', lr=0.1, weight_decay=0.1, layer_decay=0.5)
    groups = {id(p): g for g in optimizer.param_groups for p in g['params']}
    beta = trainable.instance_loss.beta
    assert groups[id(beta)]['weight_decay'] == 0 and groups[id(beta)]['lr_scale'] == 1
    assert groups[id(trainable.model.trunk.conv1[0].weight)]['lr_scale'] < 0.5
    assert len(groups) == len(list(trainable.parameters()))
    assert any(p is beta for p in task.get_clip_parameters(exclude_head=True))
    heads = list(trainable.model.head.fc.parameters())
    assert not any(p is h for p in task.get_clip_parameters(exclude_head=True) for h in heads)
    assert beta.shape == (1,) and beta.dtype == torch.float32


@pytest.mark.parametrize('weight', [0.5, 1.])
@pytest.mark.parametrize('freeze_bn', [False, True])
def test_frozen_statistics(weight, freeze_bn):
    task = MultiGrainTask(_model(), classif_weight=weight, freeze_bn=freeze_bn)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    before = {k: v.clone() for k, v in task.get_eval_model().state_dict().items()}
    x, target = _batch()
    task.get_trainable_module().train()  # as train.py does
    task(x, target)['loss'].backward()
    optimizer.step()
    changed = {k for k, v in task.get_eval_model().state_dict().items() if not torch.equal(v, before[k])}
    assert any('running_mean' in k for k in changed) is not freeze_bn
    assert {'trunk.bn1.weight', 'trunk.conv1.0.weight', 'head.fc.weight'} <= changed
    if freeze_bn:  # normalised as at test time
        torch.manual_seed(0)
        again = MultiGrainTask(_model().eval(), classif_weight=weight, freeze_bn=True)
        again.get_trainable_module().train()
        torch.testing.assert_close(again(x, target)['output'], _model().eval()(x))


def test_start_is_kept():
    x, target = _batch()
    task = MultiGrainTask(_model(), freeze_bn=True, start_weight=3.)
    start = copy.deepcopy(task.get_eval_model()).eval()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    for _ in range(2):
        task.get_trainable_module().train()
        task.sampler.generator = 0
        result = task(x, target)
        model = copy.deepcopy(task.get_eval_model()).eval()
        now, before = (m.forward_head(m.forward_features(x), pre_logits=True).detach() for m in (model, start))
        unit = before / before.norm(dim=1, keepdim=True)
        away = 0.
        for i, row in enumerate(now):
            wanted = sum(unit[j] for j in range(len(x)) if target[j, 1] == target[i, 1])
            away += (1 - float(row @ wanted / (row.norm() * wanted.norm()))) / len(x)
        assert result['start_loss'].item() == pytest.approx(away, abs=1e-6)
        expected = (result['classification_loss'] + result['instance_loss'] + 3 * away) / 2
        assert result['loss'].item() == pytest.approx(expected.item(), rel=1e-5)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    assert task.get_checkpoint_state()['state_dict'].keys() == start.state_dict().keys()
    assert len(list(task.parameters())) == len(list(MultiGrainTask(_model()).parameters()))
    assert torch.isfinite(task.double()(x.double(), target)['start_loss'])  # the start is converted, too


def test_ema_and_checkpoint_round_trip():
    x, target = _batch()
    # a boundary this low has more active positives than negatives, so that it moves
    task = MultiGrainTask(_model(), instance_loss_kwargs=dict(beta_init=0.5)).train()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    for step in range(2):
        loss = task(x, target)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.update_ema(step=step + 2)  # the first ones copy
    state, ema = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
    assert state['state_dict'].keys() == _model().state_dict().keys()  # plain model keys for every timm script
    beta, ema_beta = (s['instance_loss']['beta'].item() for s in (state['task_state'], ema['task_state_ema']))
    assert beta > 0.5 and 0.5 < ema_beta < beta
    again = MultiGrainTask(_model())  # whose boundary is a buffer: under the same name
    again.setup_ema(decay=0.5)
    again.load_checkpoint_state(state['state_dict'], state['task_state'])
    again.load_checkpoint_state(ema['state_dict_ema'], ema['task_state_ema'], ema=True)
    assert again.get_task_state()['instance_loss']['beta'].item() == beta
    assert again.get_task_state(ema=True)['instance_loss']['beta'].item() == ema_beta
    assert torch.equal(again.get_eval_model(ema=True)(x), task.get_eval_model(ema=True)(x))
    again.load_checkpoint_state(state['state_dict'])  # a plain timm checkpoint: beta stays
    assert again.get_task_state()['instance_loss']['beta'].item() == beta
    with pytest.raises(RuntimeError, match='this task has none'):
        MultiGrainTask(_model(), classif_weight=1.).load_checkpoint_state(state['state_dict'], state['task_state'])


@pytest.mark.parametrize('name', ['multigrain', 'test_resnet'])
def test_compiled_task(name):
    x, target = _batch()
    model = _model() if name == 'multigrain' else _any_timm_model(name, drop_rate=1e-6)
    task = MultiGrainTask(model, sampling=UniformSampler(generator=0)).train()
    expected = copy.deepcopy(task)(x, target)['loss']
    task.compile(backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(task(x, target)['loss'], expected, rtol=1e-4, atol=1e-5)
    assert any(k.endswith('conv1.0.weight') for k in task.get_checkpoint_state()['state_dict'])
    assert unwrap_model(task.get_eval_model()) is unwrap_model(task.get_trainable_module()).model


def test_bad_arguments_and_batches():
    x, target = _batch()
    for kwargs, message in (
            (dict(num_repeats=1), 'num_repeats=1 with classif_weight=0.5.*at least 2 copies'),
            (dict(classif_weight=1.5), r'\(lambda\) = 1.5 is outside'),
            (dict(classif_weight=float('nan')), r'\(lambda\) = nan is outside')):
        with pytest.raises(ValueError, match=message):
            MultiGrainTask(_model(), **kwargs)
    with pytest.raises(ValueError, match='no classifier'):
        MultiGrainTask(timm.create_model('resnet10t', num_classes=0))
    task = MultiGrainTask(_model()).train()
    with pytest.raises(ValueError, match=r'integer targets \(B, 2\).*of shape \(12,\)'):
        task(x, target[:, 0])
    with pytest.raises(ValueError, match='images of the batch are of one instance'):
        task(x[:3], target[:3])
    with pytest.raises(ValueError, match='12 images of the batch are of as many instances'):
        task(x, torch.stack([target[:, 0], torch.arange(12)], 1))
    assert torch.isfinite(task(x, target)['loss'])
    short = task(x[:3], target[:3])  # of one instance, later: nothing to compare it with
    short['loss'].backward()
    assert short['instance_loss'] == 0 and short['classification_loss'] > 0


def test_copies_that_are_all_alike():
    """Looked at in the first batch of a training only, and one pair that differs will do."""
    images, targets = _batch()
    alike = images[::3].repeat_interleave(3, 0)
    task = MultiGrainTask(_model()).train()
    with pytest.raises(ValueError, match='copies of an image in the first batch are the same, pixel for pixel'):
        task(alike, targets)
    assert task.eval()(alike, targets)['loss'].isfinite()
    task = MultiGrainTask(_model()).train()
    one = alike.clone()
    one[-1, 0, 0, 0] += 1
    assert task(one, targets)['loss'].isfinite() and task(alike, targets)['loss'].isfinite()


def test_instance_loss_runs_outside_autocast():
    class Loss(torch.nn.Module):
        needs_triplets = False

        def forward(self, embedding, target, triplets):
            self.dtypes = embedding.dtype, (embedding @ embedding.T).dtype
            return embedding.sum()

    task = MultiGrainTask(_model(), instance_loss=Loss()).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*_batch())
    assert result['output'].dtype == torch.bfloat16
    assert task.get_trainable_module().instance_loss.dtypes == (torch.float32, torch.float32)


def test_statistics():
    x, target = _batch()
    task = MultiGrainTask(_model().eval(), sampling=DistanceWeightedSampler(max_positives=2, generator=0),
                          instance_loss_kwargs=LEARNED, statistics=True)
    task.train()
    task.trainable_module.model.eval()
    result = task(x, target)
    with torch.no_grad():
        embedding = task.trainable_module.model.embed(x).double()
    sampler = DistanceWeightedSampler(max_positives=2, generator=0)
    triplets, (prob, _) = sampler(embedding, target[:, 1]), sampler.probabilities(embedding, target[:, 1])
    squares = [(a - b).square().sum() for a in embedding for b in embedding]
    expected = {**margin_statistics(embedding, triplets, 1.2), 'effective_negatives': effective_negatives(prob).mean(),
                'spread': sum(squares) / len(squares) / 2}
    assert {k: v.item() for k, v in result.items() if k in expected} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=2e-3)
    assert not set(expected) & set(MultiGrainTask(_model()).train()(x, target))


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, 'record_event'), reason='torch 2.6 shards on GPUs only')
def test_fully_sharded(tmp_path):
    """FSDP2, which takes no 0-dim parameter: a learned p, its training and its checkpoints."""
    x, target = _batch(size=64)
    tasks = [MultiGrainTask(_model(learn_p=True), sampling=UniformSampler(generator=0)).train() for _ in range(2)]
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        fully_shard(tasks[0].trainable_module, mesh=init_device_mesh('cpu', (1,)))
        for task in tasks:
            optimizer = torch.optim.SGD(task.parameters(), lr=1.)
            task(x, target)['loss'].backward()
            optimizer.step()
        sharded, plain = (task.trainable_module.model for task in tasks)
        assert isinstance(sharded.gem_p, float) and sharded.gem_p != 3
        assert sharded.gem_p == pytest.approx(plain.gem_p, rel=1e-6)
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(sharded, options=options)
        assert state['head.pool.p'].item() == sharded.gem_p
        set_model_state_dict(sharded, {**state, 'head.pool.p': torch.tensor([2.5])}, options=options)
        assert sharded.gem_p == 2.5
    finally:
        torch.distributed.destroy_process_group()
    plain.load_state_dict({**state, 'head.pool.p': torch.tensor(2.5)})  # 0-dim in older checkpoints
    assert plain.gem_p == 2.5 and plain.head.pool.p.shape == (1,)


_WORKER = '''
import os, sys, torch, torch.distributed as dist
from timm_multigrain.task import MultiGrainTask
from timm_multigrain.loss import DistanceWeightedSampler
from tests.test_task import _batch, _freeze_norms, _model
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{path}.store', rank=rank, world_size=2)
x, target = _batch()
half = len(x) // 2
gradients = []
for gather in (True, False):
    task = MultiGrainTask(_model().double(), sampling=DistanceWeightedSampler(max_positives=2), gather=gather)
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    _freeze_norms(task.train())
    for _ in range(2):  # a second step fails if a parameter was left out of the first one's reduction
        task.zero_grad()
        task.sampler.generator = 5  # gathered, all ranks see the same batch and have to draw the same negatives
        result = task(x[rank * half:][:half].double(), target[rank * half:][:half])
        result['loss'].backward()
    gradients.append({n: p.grad for n, p in task.get_trainable_module().module.named_parameters()})
if rank == 0:
    torch.save(gradients, path)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # at times a thread of gloo is still there when Python ends, and aborts the process
'''


def _freeze_norms(task):
    for module in task.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Gathered, the gradient is that of one process on the whole batch; otherwise of each half on its own."""
    root = Path(__file__).resolve().parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', _WORKER, str(rank), str(tmp_path / 'grads')], cwd=root,
            env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
        for rank in range(2)]
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    x, target = _batch()
    halves = [slice(0, 6), slice(6, 12)]
    for found, chunks in zip(torch.load(tmp_path / 'grads', weights_only=True), ([slice(None)], halves), strict=True):
        task = MultiGrainTask(_model().double())
        _freeze_norms(task.train())
        for chunk in chunks:
            task.sampler = DistanceWeightedSampler(max_positives=2, generator=5)
            (task(x[chunk].double(), target[chunk])['loss'] / len(chunks)).backward()
        for name, parameter in task.get_trainable_module().named_parameters():
            difference = (found[name] - parameter.grad).norm()
            assert difference <= 1e-6 * parameter.grad.norm() + 1e-12, name
