"""Tests of the triplet samplers."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from timm_multigrain.loss import (
    DistanceWeightedSampler,
    TripletSampler,
    UniformSampler,
    create_sampler,
    effective_negatives,
)

NAMES = ['batch', 'row', 'uniform']


@pytest.fixture(scope='module')
def numbers(golden):
    return load_file(golden / 'margin.safetensors')


def make_embedding(kind, num_instances, repeats, dim, seed=0):
    """Unit vectors of instances with `repeats` images each, and their target."""
    generator = torch.Generator().manual_seed(seed)
    batch_size = num_instances * repeats
    if kind == 'sphere':
        x = torch.randn(batch_size, dim, generator=generator)
    elif kind == 'noise':
        centre = F.normalize(torch.randn(num_instances, dim, generator=generator), dim=1).repeat_interleave(repeats, 0)
        x = centre + 0.6 * F.normalize(torch.randn(batch_size, dim, generator=generator), dim=1)
    else:
        # half the square of a normal variable has a gamma(0.5) distribution
        centre = torch.randn(num_instances, dim, generator=generator).square().repeat_interleave(repeats, 0)
        x = 0.75 * centre + 0.25 * torch.randn(batch_size, dim, generator=generator).square()
    return F.normalize(x, dim=1), torch.arange(num_instances).repeat_interleave(repeats)


def naive_log_weight(a, b, cutoff=0.5):
    dim = len(a)
    d = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    capped = min(max(d, cutoff), math.sqrt(4 - cutoff ** 2))
    return (2 - dim) * math.log(capped) - (dim - 3) / 2 * math.log(1 - capped * capped / 4), d


def naive_probabilities(embedding, target, cutoff=0.5, nonzero_loss_cutoff=1.4):
    """Per-anchor probabilities by loops over float64."""
    rows, target = embedding.double().tolist(), target.tolist()
    prob = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    uniform = torch.zeros(len(rows), dtype=torch.bool)
    for i, a in enumerate(rows):
        negatives = [j for j in range(len(rows)) if target[j] != target[i]]
        weights = {}
        for j in negatives:
            log_weight, d = naive_log_weight(a, rows[j], cutoff)
            if d < nonzero_loss_cutoff:
                weights[j] = log_weight
        if negatives and not weights:
            uniform[i] = True
            weights = dict.fromkeys(negatives, 0.)
        top = max(weights.values(), default=0.)
        total = sum(math.exp(w - top) for w in weights.values())
        for j, w in weights.items():
            prob[i, j] = math.exp(w - top) / total
    return prob, uniform


def naive_pairs(target, usable=None):
    target = target.tolist()
    usable = [True] * len(target) if usable is None else usable.tolist()
    return [
        (a, p) for a in range(len(target)) for p in range(len(target))
        if a != p and target[a] == target[p] and usable[a] and usable[p]
        and any(u and t != target[a] for u, t in zip(usable, target, strict=True))
    ]


def check_golden(numbers, tag):
    embedding, target = numbers[f'{tag}.embedding'], numbers[f'{tag}.target']
    sampler = DistanceWeightedSampler('batch', generator=0)
    prob, uniform_row = sampler.probabilities(embedding, target)
    torch.testing.assert_close(prob.double(), numbers[f'{tag}.prob'], rtol=0, atol=2e-5)
    torch.testing.assert_close(prob.sum(1), torch.ones(len(prob)))
    assert uniform_row.tolist() == numbers[f'{tag}.uniform_row'].bool().tolist()
    triplets = sampler(embedding, target)
    assert triplets.anchor.dtype == torch.int64
    assert torch.equal(torch.stack(triplets[:2], 1), numbers[f'{tag}.triples'][:, :2])
    assert torch.equal(triplets.anchor.bincount(minlength=len(target)), numbers[f'{tag}.n_draw'])


@pytest.mark.parametrize('folder, count', [('golden', 12), ('shared_golden', 15)])
def test_batch_is_the_original(request, folder, count):
    numbers = load_file(request.getfixturevalue(folder) / 'margin.safetensors')
    tags = [k.removesuffix('.prob') for k in numbers if k.endswith('.prob') and not k.startswith('duplicate.')]
    assert len(tags) == count
    for tag in tags:
        check_golden(numbers, tag)


def test_duplicate_rows_do_not_make_the_batch_uniform(numbers):
    """The one deviation: a NaN distance of the original turns every row uniform, here the distance is 0."""
    embedding, target = numbers['duplicate.B8.C128.embedding'], numbers['duplicate.B8.C128.target']
    assert numbers['duplicate.B8.C128.uniform_row'].all()
    for name in ('batch', 'row'):
        prob, uniform_row = create_sampler(name).probabilities(embedding, target)
        assert not uniform_row.any()
        torch.testing.assert_close(prob.double(), naive_probabilities(embedding, target)[0], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize('dim, cutoffs', [
    *[(dim, (0.5, 1.4)) for dim in (2, 3, 16, 128, 2048)],
    *[(8, cutoffs) for cutoffs in ((0.3, 1.2), (0.9, 1.0), (1.2, 1.3), (1.0, 2.0))]])
def test_row_equals_loops(dim, cutoffs):
    """An error of a float32 inner product is multiplied by an exponent of up to the dimension."""
    for kind in ('sphere', 'noise', 'relu'):
        embedding, target = make_embedding(kind, 4, 3, dim)
        expected, expected_uniform = naive_probabilities(embedding, target, *cutoffs)
        for x, rtol in ((embedding, max(1e-5, dim * 1e-6)), (embedding.double(), 1e-8)):
            prob, uniform_row = DistanceWeightedSampler('row', *cutoffs).probabilities(x, target)
            assert prob.dtype == x.dtype
            torch.testing.assert_close(prob.double(), expected, rtol=rtol, atol=1e-30)
            assert torch.equal(uniform_row, expected_uniform)


def test_underflow_limits(golden):
    """The largest distance of a negative whose weight survives float32, by C and the closest pair of the batch."""
    sampler = DistanceWeightedSampler('batch')
    target = torch.tensor([0, 0, 1])
    for dim, limits in json.loads((golden / 'sampling.json').read_text())['limits'].items():
        for d, expected in limits['log_weight'].items():
            log_weight, _ = naive_log_weight([float(d), *[0.] * (int(dim) - 1)], [0.] * int(dim))
            assert log_weight == pytest.approx(expected, abs=0.006)
        for closest, largest in limits['largest_distance'].items():
            for d, survives in [(largest - 1e-3, True), (largest + 1e-3, False)]:
                embedding = torch.zeros(3, int(dim), dtype=torch.float64)
                for row, axis, distance in [(0, 1, 0.), (1, 1, float(closest)), (2, 2, d)]:
                    embedding[row, 0] = 1 - distance ** 2 / 2
                    embedding[row, axis] += math.sqrt(1 - embedding[row, 0] ** 2)
                _, uniform_row = sampler.probabilities(embedding, target)
                assert uniform_row[0].item() is not survives, (dim, closest, d)


def test_fraction_of_uniform_rows(golden):
    """How many anchors become uniform, and the effective negatives, for kinds of embeddings the original was run on."""
    for case in json.loads((golden / 'sampling.json').read_text())['cases']:
        batches = [make_embedding(case['kind'], 16, 3, case['C'], seed) for seed in range(20)]
        batch = [create_sampler('batch').probabilities(*b) for b in batches]
        row = [create_sampler('row').probabilities(*b) for b in batches]
        uniform = torch.cat([u for _, u in batch]).float().mean().item()
        effective = [torch.cat([effective_negatives(p) for p, _ in each]).median().item() for each in (batch, row)]
        assert uniform == pytest.approx(case['uniform'], abs=0.01), case
        if case['kind'] != 'relu':  # whose tail, and so the closest negatives, are not those of the recorded batches
            assert effective == pytest.approx([case['effective_batch'], case['effective_row']], rel=0.1), case


@pytest.mark.parametrize('name', ['batch', 'row'])
def test_antipodal_pair(name):
    """One pair at distance 2 or just below leaves the other rows as they are without it."""
    for dim in (16, 512):
        embedding, target = make_embedding('sphere', 6, 2, dim)
        expected, _ = create_sampler(name).probabilities(embedding[:-1], target[:-1])
        for tilt in (0, 1e-3):
            embedding[-1] = F.normalize(tilt * embedding[1] - embedding[0], dim=0)
            prob, uniform_row = create_sampler(name).probabilities(embedding, target)
            assert not uniform_row.any()
            assert prob[0, -1] == 0
            torch.testing.assert_close(prob.sum(1), torch.ones(12))
            others = prob[1:-2, :-1] / prob[1:-2, :-1].sum(1, keepdim=True)
            torch.testing.assert_close(others, expected[1:-1], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_rows_that_are_not_finite_take_no_part(name):
    embedding, target = make_embedding('sphere', 5, 3, 16)
    keep = torch.tensor([i not in (0, 4, 5, 12) for i in range(15)])
    expected, expected_uniform = create_sampler(name).probabilities(embedding[keep], target[keep])
    embedding[~keep, 3] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    sampler = create_sampler(name, generator=1)
    prob, uniform_row = sampler.probabilities(embedding, target)
    torch.testing.assert_close(prob[keep][:, keep], expected, rtol=1e-5, atol=0)
    assert torch.equal(uniform_row[keep], expected_uniform)
    assert not prob[~keep].any() and not prob[:, ~keep].any() and not uniform_row[~keep].any()
    triplets = sampler(embedding, target)
    assert list(zip(*(t.tolist() for t in triplets[:2]), strict=True)) == naive_pairs(target, keep)
    assert keep[triplets.negative].all()


def test_uniform_sampler():
    embedding, target = make_embedding('relu', 4, 3, 2048)
    prob, uniform_row = UniformSampler().probabilities(embedding, target)
    torch.testing.assert_close(prob, (target[:, None] != target) / 9)
    assert uniform_row.all()
    torch.testing.assert_close(effective_negatives(prob), torch.full((12,), 9.))


def test_effective_negatives():
    prob = torch.tensor([[.25, .25, .25, .25], [1, 0, 0, 0], [.5, .5, 0, 0], [0, 0, 0, 0], [.7, .2, .1, 0]])
    last = math.exp(-sum(p * math.log(p) for p in (.7, .2, .1)))
    torch.testing.assert_close(effective_negatives(prob), torch.tensor([4, 1, 2, 0, last]))


@settings(max_examples=150, deadline=None)
@given(
    target=st.lists(st.integers(-3, 5), min_size=1, max_size=20),
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(['sphere', 'duplicates', 'not finite', 'collapsed']),
    dim=st.sampled_from([4, 64, 1024]),
    max_positives=st.one_of(st.none(), st.integers(1, 25)),
    seed=st.integers(0, 2 ** 31),
)
def test_any_batch(target, name, kind, dim, max_positives, seed):
    generator = torch.Generator().manual_seed(seed)
    embedding = F.normalize(torch.randn(len(target), dim, generator=generator), dim=1)
    if kind == 'duplicates':
        embedding = embedding[torch.randint(len(target), (len(target),), generator=generator)]
    elif kind == 'not finite':
        embedding[torch.rand(len(target), generator=generator) < 0.3] = math.nan
    elif kind == 'collapsed':
        embedding = F.normalize(embedding + 10, dim=1)
    target = torch.tensor(target)
    usable = embedding.isfinite().all(1)
    sampler = create_sampler(name, max_positives=max_positives, generator=seed)
    prob, uniform_row = sampler.probabilities(embedding, target)
    has_negatives = torch.tensor([
        bool(u) and any(bool(v) and s != t for s, v in zip(target, usable, strict=True))
        for t, u in zip(target, usable, strict=True)])
    torch.testing.assert_close(prob.sum(1), has_negatives.float())
    assert not (uniform_row & ~has_negatives).any()
    triplets = sampler(embedding, target)
    check_triplets(triplets, target, naive_pairs(target, usable), max_positives)
    check_negatives(triplets, target, usable, prob, name)


def check_triplets(triplets, target, pairs, max_positives):
    anchor, positive, negative = (t.tolist() for t in triplets)
    if max_positives is None:
        assert list(zip(anchor, positive, strict=True)) == pairs
        return
    max_positives = min(max_positives, len(target))
    assert len(anchor) == len(positive) == len(negative) == len(target) * max_positives
    for a in range(len(target)):
        positives = [p for b, p in pairs if a == b][:max_positives]
        slots = slice(a * max_positives, (a + 1) * max_positives)
        padding = [-1] * (max_positives - len(positives))
        assert anchor[slots] == [a] * len(positives) + padding
        assert positive[slots] == positives + padding
        assert negative[slots][len(positives):] == padding


def check_negatives(triplets, target, usable, prob, name):
    drawn = {}
    for a, _, n in zip(*(t.tolist() for t in triplets), strict=True):
        if a >= 0:
            assert usable[n] and target[n] != target[a]
            assert name == 'row' or prob[a, n] > 0
            drawn.setdefault(a, []).append(n)
    for a, negatives in drawn.items():
        if len(negatives) <= (prob[a] > 0).sum():
            assert len(set(negatives)) == len(negatives), 'drawn twice though there are enough others'
        elif name != 'row':
            # 'row' may have more candidates than probabilities that float32 can show
            assert set(negatives) <= set(prob[a].nonzero().flatten().tolist())


def check_frequencies(counts, prob):
    """Chi-square test at four and a half standard deviations, by the approximation of Wilson and Hilferty."""
    expected = prob.double() * counts.sum()
    assert not counts[expected == 0].any()
    likely = expected > 5
    statistic = ((counts - expected)[likely].square() / expected[likely]).sum().item()
    freedom = int(likely.sum()) - 1
    variance = 2 / (9 * freedom)
    assert (statistic / freedom) ** (1 / 3) < 1 - variance + 4.5 * math.sqrt(variance), (counts, expected)


def draw_many(sampler, embedding, target, repeats):
    return torch.stack([sampler(embedding, target).negative for _ in range(repeats)])


@pytest.mark.parametrize('name', NAMES)
def test_frequencies_without_replacement(name):
    embedding, target = make_embedding('relu', 3, 3, 12, seed=1)
    sampler = create_sampler(name, max_positives=2, generator=0)
    prob = sampler.probabilities(embedding, target)[0]
    assert (prob.count_nonzero(1) >= 2).all()
    negatives = draw_many(sampler, embedding, target, 2000)
    for a, p in enumerate(prob.double()):
        check_frequencies(negatives[:, 2 * a].bincount(minlength=9), p)
        second = sum(p[i] * p.index_fill(0, torch.tensor(i), 0) / (1 - p[i]) for i in range(9) if p[i] > 0)
        check_frequencies(negatives[:, 2 * a + 1].bincount(minlength=9), second)
        assert (negatives[:, 2 * a] != negatives[:, 2 * a + 1]).all()


def test_frequencies_with_replacement():
    """Three positives but two candidates: independent draws; the third negative is beyond the cutoff."""
    angle = torch.tensor([0., 0., 0., 0., 0.9, 1.15, 3.])
    embedding = torch.stack([angle.cos(), angle.sin(), torch.zeros(7)], 1)
    target = torch.tensor([0, 0, 0, 0, 1, 2, 3])
    for name in ('batch', 'row'):
        sampler = create_sampler(name, generator=0)
        prob = sampler.probabilities(embedding, target)[0][0].double()
        assert prob.count_nonzero() == 2
        negatives = draw_many(sampler, embedding, target, 1500)
        for column in range(3):
            check_frequencies(negatives[:, column].bincount(minlength=7), prob)
        pairs = (negatives[:, 0] * 7 + negatives[:, 1]).bincount(minlength=49)
        check_frequencies(pairs, torch.outer(prob, prob).flatten())


def test_row_draws_beyond_the_range_of_float32():
    """The second negative has a probability that float32 cannot show, still it is the second one drawn."""
    distances = [0., 0., 0., 0.7, 0.9, 1.1]
    embedding = torch.zeros(6, 2048, dtype=torch.float64)
    for row, distance in enumerate(distances):
        embedding[row, 0] = 1 - distance ** 2 / 2
        embedding[row, 1 + row] = math.sqrt(1 - embedding[row, 0] ** 2)
    for x in (embedding, embedding.float()):
        sampler = DistanceWeightedSampler('row', generator=0)
        target = torch.tensor([0, 0, 0, 1, 2, 3])
        prob = sampler.probabilities(x, target)[0][0]
        assert prob.float().tolist() == [0, 0, 0, 1, 0, 0]
        assert sampler(x, target).negative[:6].tolist() == [3, 4, 3, 4, 3, 4]


@pytest.mark.parametrize('name', NAMES)
def test_precision_and_autocast(name):
    embedding, target = make_embedding('noise', 6, 3, 64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        leaf = embedding.detach().to(dtype).requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            prob, _ = create_sampler(name).probabilities(leaf, target)
            triplets, same = create_sampler(name, generator=0)(leaf, target, return_prob=True)
        reference, _ = create_sampler(name).probabilities(leaf.detach().double(), target)
        assert prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not prob.requires_grad
        torch.testing.assert_close(prob.double(), reference, rtol=1e-4, atol=1e-12)
        assert torch.equal(prob, same)
        assert torch.equal(triplets.negative, create_sampler(name, generator=0)(leaf, target).negative)


def test_randomness():
    embedding, target = make_embedding('sphere', 8, 3, 16)

    def negatives(**kwargs):
        sampler = UniformSampler(**kwargs)
        return [sampler(embedding, target).negative.tolist() for _ in range(2)]

    first = negatives(generator=7)
    assert first[0] != first[1]
    assert first == negatives(generator=7) == negatives(generator=torch.Generator().manual_seed(7))
    torch.manual_seed(5)
    second, after = negatives(), torch.get_rng_state()
    torch.manual_seed(5)
    assert second == negatives() != first
    negatives(generator=7)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize('name', NAMES)
def test_no_result_is_needed_on_the_host(name):
    """A tensor without data shows any decision on values: only the exact list of triplets needs one."""
    embedding, target = torch.empty(6, 16, device='meta'), torch.empty(6, dtype=torch.int64, device='meta')
    triplets = create_sampler(name, max_positives=3)(embedding, target)
    assert all(t.shape == (18,) and t.device.type == 'meta' for t in triplets)
    with pytest.raises((RuntimeError, NotImplementedError)):
        create_sampler(name)(embedding, target)


def test_wrong_batches():
    integers = torch.zeros(4, dtype=torch.int64)
    for embedding, target, message in (
            (torch.zeros(4, 3, 1), integers, r'not torch.float32 \(4, 3, 1\)'),
            (torch.zeros(4, 3, dtype=torch.int64), integers, r'not torch.int64'),
            (torch.zeros(0, 3), integers[:0], r'\(0, 3\)'),
            (torch.zeros(4, 3), torch.zeros(4), r'and torch.float32 \(4,\)'),
            (torch.zeros(4, 3), integers.bool(), 'and torch.bool'),
            (torch.zeros(4, 3), integers.view(2, 2), r'\(2, 2\)')):
        for call in (create_sampler('row'), create_sampler('row').probabilities):
            with pytest.raises(ValueError, match=message):
                call(embedding, target)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'batch', 'row', 'uniform'"):
        create_sampler('hardest')
    with pytest.raises(ValueError, match='hardest'):
        DistanceWeightedSampler('hardest')
    for cutoffs in [(0, 1.4), (-1, 1.4), (1.4, 1.4), (1.5, 1.9)]:
        with pytest.raises(ValueError, match=str(cutoffs[0])):
            DistanceWeightedSampler('row', *cutoffs)
    with pytest.raises(ValueError, match='max_positives'):
        UniformSampler(max_positives=0)


class SecondHalfSampler(TripletSampler):
    """Negatives from the second half of the batch, the later the likelier."""

    def log_weights(self, embedding):
        number = len(embedding)
        weight = torch.arange(number, dtype=embedding.dtype) - (number // 2 - 1)
        return weight.clamp(min=0).log().repeat(number, 1)


def test_sampler_of_ones_own():
    embedding, target = make_embedding('relu', 4, 3, 16)
    sampler = SecondHalfSampler(max_positives=2, generator=0)
    prob, uniform_row = sampler.probabilities(embedding, target)
    for i in range(12):
        weight = [0 if target[i] == target[j] else max(j - 5, 0) for j in range(12)]
        assert prob[i].tolist() == pytest.approx([w / sum(weight) for w in weight], abs=1e-6)
    assert not uniform_row.any()
    triplets = sampler(embedding, target)
    assert (triplets.negative >= 6).all() and (target[triplets.anchor] != target[triplets.negative]).all()
    assert (target[triplets.anchor] == target[triplets.positive]).all()
