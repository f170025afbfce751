"""Tests of the instance losses."""
import itertools
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from timm_multigrain.layers import GeM, l2_normalize
from timm_multigrain.loss import (
    ContrastiveLoss,
    DistanceWeightedSampler,
    MarginLoss,
    MetricLearningLoss,
    TripletLoss,
    Triplets,
    create_instance_loss,
    losses,
    margin_loss,
    margin_statistics,
)

BETAS = ['beta1.2', 'beta0.8']
OURS = {'margin': MarginLoss, 'contrastive': ContrastiveLoss, 'triplet': TripletLoss}


@pytest.fixture(scope='module')
def numbers(golden):
    return load_file(golden / 'margin.safetensors')


@pytest.fixture
def batch():
    """Embedding (12, 16), target and triplets of 4 instances."""
    embedding = F.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    target = torch.arange(4).repeat_interleave(3)
    return embedding, target, DistanceWeightedSampler('row', generator=0)(embedding, target)


def pad(triplets, every=3):
    """The same triplets with padding before every third of them and at the end."""
    n = len(triplets.anchor)
    positions = [i for i in range(n + n // every + 1) if i % (every + 1)][:n]
    padded = []
    for index in triplets:
        out = torch.full((positions[-1] + 3,), -1)
        out[positions] = index
        padded.append(out)
    return Triplets(*padded)


def naive_distances(embedding, triplets, eps=1e-8):
    rows = embedding.double().tolist()
    for a, p, n in zip(*(t.tolist() for t in triplets), strict=True):
        yield tuple(
            math.sqrt(sum((x - y) ** 2 for x, y in zip(rows[a], rows[b], strict=True)) + eps) for b in (p, n))


def naive_margin(embedding, triplets, beta, margin):
    total, active = 0., [0, 0]
    for d_ap, d_an in naive_distances(embedding, triplets):
        for k, term in enumerate((d_ap - beta + margin, beta - d_an + margin)):
            if term > 0:
                total += term
                active[k] += 1
    return total / max(sum(active), 1), active


def naive_balance(distances, margin):
    """Between the two boundaries nearest to where as many positives as negatives cost something."""
    ends = sorted([d_ap + margin for d_ap, _ in distances] + [d_an - margin for _, d_an in distances])

    def excess(beta):
        return sum(d_ap + margin > beta for d_ap, _ in distances) - sum(d_an - margin < beta for _, d_an in distances)

    balanced = [(low + high) / 2 for low, high in itertools.pairwise(ends) if not excess((low + high) / 2)]
    return sum(balanced) / len(balanced)


def naive_contrastive(embedding, triplets, margin):
    terms = [t for d_ap, d_an in naive_distances(embedding, triplets)
             for t in (d_ap ** 2 / 2, max(0., margin - d_an) ** 2 / 2)]
    return sum(terms) / len(terms)


def naive_triplet(embedding, triplets, margin):
    terms = [d_ap ** 2 - d_an ** 2 + margin for d_ap, d_an in naive_distances(embedding, triplets, eps=0)]
    active = [t for t in terms if t > 0]
    return sum(active) / max(len(active), 1)


def max_relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def check_golden(numbers, tag, name):
    key = f'{tag}.{name}'
    embedding = numbers[f'{tag}.embedding'].clone().requires_grad_()
    triplets = Triplets(*numbers[f'{tag}.triples'].T)
    loss_module = MarginLoss(beta_init=float(name.removeprefix('beta')))
    loss = loss_module(embedding, numbers[f'{tag}.target'], triplets)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(numbers[f'{key}.loss'].item(), rel=5e-6)
    assert loss_module.beta.grad.item() == pytest.approx(numbers[f'{key}.grad_beta'].item(), abs=1e-6)
    if f'{key}.grad_embedding' in numbers:
        assert max_relative_error(embedding.grad, numbers[f'{key}.grad_embedding']) < 1e-6
    statistics = margin_statistics(embedding, triplets, loss_module.beta)
    both, _ = numbers[f'{key}.pair_count'].tolist()
    shares = statistics['active_positives'] + statistics['active_negatives']
    assert (shares * len(triplets.anchor)).item() == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize('folder, count', [('golden', 13), ('shared_golden', 16)])
def test_margin_is_the_original(request, folder, count):
    numbers = load_file(request.getfixturevalue(folder) / 'margin.safetensors')
    tags = [k.removesuffix('.triples') for k in numbers if k.endswith('.triples')]
    assert len(tags) == count
    for tag in tags:
        for name in BETAS:
            check_golden(numbers, tag, name)


def test_margin_counts_positives_and_negatives_apart(numbers):
    """Three triplets whose two terms are all active: half the loss of counting triplets."""
    embedding = torch.cat([numbers[f'tiny.{k}'] for k in ('anchor', 'positive', 'negative')])
    loss = margin_loss(embedding, Triplets(*torch.arange(9).view(3, 3)), 1.2)
    assert loss.item() == pytest.approx(numbers['tiny.loss'].item(), rel=5e-6)
    assert numbers['tiny.loss_torch2'].item() == pytest.approx(2 * loss.item(), rel=5e-6)


def test_margin_equals_loops(batch):
    embedding, _, triplets = batch
    distances = list(naive_distances(embedding, triplets))
    mean = [sum(pair[kind] for pair in distances) / len(distances) for kind in (0, 1)]
    for beta in (0.7, 1.2, 1.6):
        for margin in (0.2, 0.6):
            expected, active = naive_margin(embedding, triplets, beta, margin)
            assert margin_loss(embedding, triplets, beta, margin).item() == pytest.approx(expected, rel=1e-6)
            loss = margin_loss(embedding.double(), pad(triplets), torch.tensor([beta], dtype=torch.float64), margin)
            assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, rel=1e-12)
            statistics = margin_statistics(embedding, pad(triplets), beta, margin)
            balanced = statistics.pop('balanced_beta')
            assert balanced.item() == pytest.approx(naive_balance(distances, margin), rel=1e-6)
            assert {k: v.item() for k, v in statistics.items()} == pytest.approx({
                'active_positives': active[0] / len(distances), 'active_negatives': active[1] / len(distances),
                'positive_distance': mean[0], 'negative_distance': mean[1]}, rel=1e-6)


def test_pair_losses_equal_loops(batch):
    embedding, target, triplets = batch
    for margin in (0.2, 1.0, 1.8):
        for loss, naive in [(ContrastiveLoss(margin), naive_contrastive), (TripletLoss(margin), naive_triplet)]:
            expected = naive(embedding, triplets, margin)
            assert loss(embedding, target, triplets).item() == pytest.approx(expected, rel=2e-6)
            assert loss(embedding.double(), target, pad(triplets)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('chunk', [1, 60, 2 ** 17])
@pytest.mark.parametrize('name', OURS)
def test_gradients(batch, name, chunk, monkeypatch):
    monkeypatch.setattr(losses, 'CHUNK', chunk)
    embedding, target, triplets = batch
    loss = OURS[name]().double()
    embedding = embedding.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda e, *_: loss(e, target, pad(triplets)), (embedding, *loss.parameters()))


@pytest.mark.parametrize('name', OURS)
def test_padding_never_reads_the_first_row(batch, name):
    embedding, target, triplets = batch
    triplets = pad(Triplets(*(t[triplets.anchor > 2].clone() for t in triplets)))
    triplets.negative[triplets.negative == 0] = 1
    embedding = embedding.clone()
    embedding[0] = math.nan
    embedding.requires_grad_()
    loss = OURS[name]()
    value = loss(embedding, target, triplets)
    value.backward()
    assert value.isfinite() and value > 0
    assert embedding.grad.isfinite().all() and not embedding.grad[0].any()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize('name', OURS)
def test_no_triplets(batch, name):
    embedding, target, _ = batch
    embedding = embedding.clone().requires_grad_()
    for index in (torch.zeros(3, 0, dtype=torch.int64), torch.full((3, 5), -1)):
        loss, triplets = OURS[name](), Triplets(*index)
        value = loss(embedding, target, triplets)
        assert value.item() == 0 and value.requires_grad
        gradients = torch.autograd.grad(value, [embedding, *loss.parameters()])
        assert not any(gradient.any() for gradient in gradients)
        assert all(v == 0 for v in margin_statistics(embedding, triplets, 1.2).values())


@pytest.mark.parametrize('name', OURS)
def test_coincident_embeddings(name):
    embedding = F.normalize(torch.ones(6, 8), dim=1).requires_grad_()
    loss = OURS[name]()
    triplets = Triplets(torch.tensor([0, 1, 3]), torch.tensor([1, 0, 4]), torch.tensor([3, 4, 0]))
    value = loss(embedding, torch.arange(6) // 3, triplets)
    value.backward()
    assert value > 0 and embedding.grad.isfinite().all()


@pytest.mark.parametrize('name', OURS)
def test_precision_and_autocast(batch, name):
    embedding, target, triplets = batch
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        leaf = embedding.detach().to(dtype).requires_grad_()
        loss = OURS[name]()
        with torch.autocast('cpu', torch.bfloat16):
            value = loss(leaf, target, triplets)
        value.backward()
        reference = OURS[name]()(leaf.detach().double(), target, triplets)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(reference.item(), rel=2e-6)
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


@pytest.mark.parametrize('kwargs', [
    {'beta_init': 0.}, {'beta_init': 2.}, {'beta_init': math.nan}, {'beta_init': 'now'}, {'margin': -0.1},
    {'margin': math.nan}])
def test_margin_refuses(kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} is '):
        MarginLoss(**kwargs)


def test_boundary_follows_the_distances(batch):
    embedding, target, triplets = batch
    loss = MarginLoss(margin=0.3)
    assert not list(loss.parameters()) and loss.state_dict()['beta'].shape == (1,)
    expected = None
    for scale in (1., 0.5, 2., 0.1):
        near = F.normalize(embedding + scale, dim=1)
        distances = list(naive_distances(near, triplets))
        found = naive_balance(distances, 0.3)
        expected = found if expected is None else 0.9 * expected + 0.1 * found
        value = loss(near, target, pad(triplets))
        assert loss.beta.item() == pytest.approx(expected, rel=1e-5)
        assert value.item() == pytest.approx(naive_margin(near, triplets, expected, 0.3)[0], rel=1e-4)
    loss(embedding, target, Triplets(*torch.full((3, 4), -1)))  # nothing to follow
    loss.eval()(embedding, target, triplets)
    assert loss.beta.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('name', OURS)
def test_wrong_shapes(batch, name):
    for shape in ((4,), (4, 2, 1)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            OURS[name]()(torch.zeros(shape), None, batch[2])


class TinyNet(nn.Module):
    """The network of the recorded optimisation steps."""

    def __init__(self, state):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = GeM(p=3.0)
        self.classifier = nn.Linear(8, 5)
        state = {k.removeprefix('features.'): v for k, v in state.items() if k != 'pool.p'}
        assert not self.load_state_dict(state, strict=False).unexpected_keys

    def forward(self, x):
        embedding = self.pool(self.bn1(self.conv1(x)).relu()).flatten(1)
        return self.classifier(embedding), embedding


def test_train_steps_are_the_original(golden):
    """Four optimisation steps of the whole objective, beta with its own optimizer, step by step."""
    path = golden / 'train_steps.safetensors'
    numbers = load_file(path)
    with safe_open(path, 'pt') as f:
        metadata = f.metadata()
    factors = [float(factor) for factor in metadata.pop('lr_factors').split(',')]
    settings = {k: float(v) for k, v in metadata.items() if k != 'producer'}
    net = TinyNet({k.removeprefix('init.'): v for k, v in numbers.items() if k.startswith('init.')}).train()
    margin = MarginLoss(settings['beta_init'])
    sgd = {'momentum': settings['momentum'], 'lr': settings['lr']}
    optimizers = [
        torch.optim.SGD(net.parameters(), weight_decay=settings['weight_decay'], **sgd),
        torch.optim.SGD(margin.parameters(), **{**sgd, 'lr': settings['lr'] * settings['beta_lr_factor']}),
    ]
    instance = numbers['instance']
    anchor, positive = ((instance[:, None] == instance) & ~torch.eye(12, dtype=torch.bool)).nonzero(as_tuple=True)
    for step, factor in enumerate(factors):
        logits, embedding = net(numbers[f'step{step}.input'])
        cross_entropy = F.cross_entropy(logits, numbers['label'])
        triplets = Triplets(anchor, positive, numbers[f'step{step}.negatives'].flatten())
        instance_loss = margin(l2_normalize(embedding), instance, triplets)
        loss = settings['lambda'] * cross_entropy + (1 - settings['lambda']) * instance_loss
        for optimizer in optimizers:
            optimizer.param_groups[0]['lr'] = optimizer.defaults['lr'] * factor
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        expected = {k: numbers[f'step{step}.{k}'].item() for k in ('cross_entropy', 'margin', 'loss', 'beta_after')}
        measured = {'cross_entropy': cross_entropy, 'margin': instance_loss, 'loss': loss, 'beta_after': margin.beta}
        assert {k: v.item() for k, v in measured.items()} == pytest.approx(expected, rel=1e-6), step
    for k, v in net.state_dict().items():
        key = f'final.{k}' if k.startswith(('pool', 'classifier')) else f'final.features.{k}'
        if not k.startswith('pool'):
            assert max_relative_error(v.double(), numbers[key].double()) < 1e-6, k


def test_compile(batch):
    embedding, target, _ = batch
    sampler = DistanceWeightedSampler('batch', max_positives=2)
    margin = MarginLoss(1.2)

    def step(embedding, target):
        triplets = sampler(embedding, target)
        return margin(embedding, target, triplets), triplets

    leaf = embedding.clone().requires_grad_()
    loss, triplets = torch.compile(step, backend='aot_eager', fullgraph=True)(leaf, target)
    loss.backward()
    eager = embedding.clone().requires_grad_()
    expected = margin_loss(eager, triplets, 1.2)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(leaf.grad, eager.grad)


def test_create_instance_loss():
    for name, loss_class in OURS.items():
        loss = create_instance_loss(name, margin=0.5)
        assert type(loss) is loss_class and loss.margin == 0.5
        assert create_instance_loss(loss) is loss
    with pytest.raises(ValueError, match='margin'):
        create_instance_loss(MarginLoss(), margin=0.5)
    for spec in ('hinge', None):
        with pytest.raises(ValueError, match="'margin', 'contrastive', 'triplet' or 'pml:NAME'"):
            create_instance_loss(spec)
    with pytest.raises(ValueError, match='Linear cannot be an instance loss'):
        create_instance_loss(nn.Linear(2, 2))


def test_metric_learning_library_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning', None)
    with pytest.raises(ImportError, match=r"pip install 'timm_multigrain\[metric\]'"):
        create_instance_loss('pml:TripletMarginLoss')


def test_metric_learning_names():
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    with pytest.raises(ValueError, match='TripletMarginLoss'):
        create_instance_loss('pml:TripletMarginLos')
    for name in ('', 'BaseLossWrapper', 'zzz', '__name__'):
        with pytest.raises(ValueError, match='did you mean'):
            create_instance_loss(f'pml:{name}')
    loss = create_instance_loss('pml:NTXentLoss', temperature=0.2)
    assert type(loss) is MetricLearningLoss and loss.needs_triplets
    assert type(loss.loss) is losses.NTXentLoss and loss.loss.temperature == 0.2
    with pytest.raises(ValueError, match='SelfSupervisedLoss cannot be an instance loss'):
        create_instance_loss(losses.SelfSupervisedLoss(losses.NTXentLoss()))


def test_metric_learning_with_and_without_triplets(batch):
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    embedding, target, triplets = batch
    for name in ('TripletMarginLoss', 'NTXentLoss', 'MultiSimilarityLoss'):
        theirs = getattr(losses, name)()
        loss = create_instance_loss(theirs)
        expected = theirs(embedding, target, indices_tuple=tuple(triplets))
        torch.testing.assert_close(loss(embedding, target, pad(triplets)), expected)
        everything = create_instance_loss(f'pml:{name}', use_triplets=False)
        assert not everything.needs_triplets
        torch.testing.assert_close(everything(embedding, target, None), theirs(embedding, target))
        assert not torch.allclose(expected, theirs(embedding, target))


def test_metric_learning_precision_and_gradients(batch):
    pytest.importorskip('pytorch_metric_learning')
    embedding, target, triplets = batch
    loss = create_instance_loss('pml:NTXentLoss')
    expected = loss(embedding.bfloat16().float(), target, triplets)
    leaf = embedding.bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        value = loss(leaf, target, triplets)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    value.backward()
    assert leaf.grad.any()
    empty = loss(leaf, target, Triplets(*torch.full((3, 4), -1)))
    assert empty.item() == 0
    empty.backward()
