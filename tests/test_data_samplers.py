"""RepeatedAugSampler against the original implementation's order, and both samplers against their definition."""
import json
import math
from collections import Counter
from itertools import cycle, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from timm_multigrain.data import InstanceSampler, RepeatedAugSampler

worlds = st.fixed_dictionaries({
    'length': st.integers(1, 60),
    'repeats': st.integers(1, 5),
    'factor': st.floats(0.02, 4),
    'world': st.integers(1, 8),
    'seed': st.integers(0, 5),
    'epoch': st.integers(0, 5),
})


def ranks(length, repeats, factor, world, seed=0, epoch=0, shuffle=True):
    """The epoch of every rank."""
    streams = []
    for rank in range(world):
        sampler = RepeatedAugSampler(length, repeats, factor, shuffle, seed, world, rank)
        sampler.set_epoch(epoch)
        streams.append(list(sampler))
        assert len(sampler) == len(streams[-1])
    return streams


def test_equals_original(golden):
    for case in json.loads((golden / 'ra_sampler.json').read_text())['cases']:
        sampler = RepeatedAugSampler(
            range(case['dataset_len']), case['repetitions'], case['len_factor'], shuffle=case['shuffle'])
        batches = BatchSampler(sampler, case['batch_size'], case['drop_last'])
        assert list(batches) == case['batches']
        assert len(batches) == case['len']
        assert (list(batches) == case['batches']) == case['second_pass_identical']


def test_shuffled_structure_of_original(golden):
    case = json.loads((golden / 'ra_sampler.json').read_text())['shuffled_structure']
    stream = list(RepeatedAugSampler(case['dataset_len'], case['repetitions'], case['len_factor']))
    assert len(stream) == case['total']
    assert len(set(stream)) == case['distinct_images']


@settings(max_examples=150, deadline=None)
@given(worlds)
def test_unshuffled_order(case):
    case.pop('seed')
    length, repeats, world = case['length'], case['repeats'], case['world']
    total = max(1, int(length * case['factor']))
    for rank, stream in enumerate(ranks(shuffle=False, **case)):
        own = [i for i in range(length) if i % world == rank] or [rank % length]
        naive = cycle([i for i in own for _ in range(repeats)])
        assert stream == list(islice(naive, math.ceil(total / world)))


@settings(max_examples=200, deadline=None)
@given(worlds)
def test_ranks_share_out_images(case):
    length, repeats, world = case['length'], case['repeats'], case['world']
    streams = ranks(**case)
    assert len({len(stream) for stream in streams}) == 1
    assert len(streams[0]) >= 1
    assert len(streams[0]) * world - max(1, int(length * case['factor'])) in range(world)
    if length >= world:
        assert sum(len(set(stream)) for stream in streams) == len(set().union(*streams))
    for rank, stream in enumerate(streams):
        groups = [stream[i:i + repeats] for i in range(0, len(stream), repeats)]
        assert all(len(set(group)) == 1 for group in groups)  # positives on the same rank, side by side
        assert all(0 <= group[0] < length for group in groups)
        size = max(1, len(range(rank, length, world)))
        heads = [group[0] for group in groups]
        passes = [heads[i:i + size] for i in range(0, len(heads), size)]
        assert all(len(set(one)) == len(one) for one in passes)  # a pass shows an image once
        assert all(set(one) <= set(passes[0]) for one in passes)


def test_shuffle_is_fresh_in_every_pass_and_epoch():
    sampler = RepeatedAugSampler(50, 1, 3.0)
    first, second = list(sampler), list(sampler)
    passes = [tuple(stream[i:i + 50]) for stream in (first, second) for i in (0, 50, 100)]
    assert len(set(passes)) == 6
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert list(RepeatedAugSampler(50, 1, 3.0, seed=1)) == second != list(RepeatedAugSampler(50, 1, 3.0, seed=2))


def test_epoch_advances_by_itself_and_set_epoch_wins():
    def epoch(number):
        sampler = RepeatedAugSampler(30)
        sampler.set_epoch(number)
        return list(sampler)

    alone = RepeatedAugSampler(30)
    assert [list(alone) for _ in range(4)] == [epoch(i) for i in range(4)]
    resumed = RepeatedAugSampler(30)
    list(resumed)
    for number in (7, 8, 8, 3):
        resumed.set_epoch(number)
        assert list(resumed) == epoch(number)
    assert list(resumed) == epoch(4)


def test_bad_arguments():
    for arguments, message in (
            ({'dataset': []}, 'holds 0 images'),
            ({'num_repeats': 0}, 'num_repeats is 0: give'),
            ({'num_repeats': 2.5}, 'num_repeats is 2.5'),
            ({'epoch_len_factor': 0}, 'epoch_len_factor is 0'),
            ({'epoch_len_factor': math.nan}, 'epoch_len_factor is nan'),
            ({'epoch_len_factor': math.inf}, 'epoch_len_factor is inf'),
            ({'num_replicas': 2, 'rank': 2}, 'rank is 2, and num_replicas 2'),
            ({'rank': 1}, 'rank is 1, and num_replicas 1'),
            ({'num_replicas': 2}, 'num_replicas is 2 but torch.distributed is not initialised: give rank')):
        with pytest.raises(ValueError, match=message):
            RepeatedAugSampler(**{'dataset': range(5), **arguments})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-3, 9), min_size=1, max_size=80), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from([1., 1., .4, 2.5]), st.integers(0, 3), st.booleans())
def test_instances(instances, repeats, per_rank, world, factor, epoch, shuffle):
    """Recounted from the batches of all ranks."""
    batches = []  # of all ranks
    for rank in range(world):
        sampler = InstanceSampler(instances, per_rank * repeats, repeats, factor, shuffle, 5, world, rank)
        again = InstanceSampler(instances, per_rank * repeats, repeats, factor, shuffle, 5, world, rank)
        for _ in range(epoch):  # epochs count by themselves, and a resumed run sets where it is
            list(again)
        sampler.set_epoch(epoch)
        stream = list(sampler)
        assert stream == list(again) and len(stream) == len(sampler)
        batches.append([stream[i:i + per_rank * repeats] for i in range(0, len(stream), per_rank * repeats)])
    photographs = {one: [i for i, other in enumerate(instances) if other == one] for one in instances}
    needed = {one: math.ceil(len(own) / repeats) for one, own in photographs.items()}
    wanted = max(1, int(sum(needed.values()) * factor))
    steps = math.ceil(wanted / (world * per_rank))
    assert {len(own) for own in batches} == {steps}
    shown, groups, pairs = Counter(), Counter(), Counter()
    for step in range(steps):
        together = Counter()
        for own in batches:
            assert len(own[step]) == per_rank * repeats
            for i in range(0, per_rank * repeats, repeats):
                group = own[step][i:i + repeats]
                one = instances[group[0]]
                assert {instances[index] for index in group} == {one}  # one instance in one batch of one rank
                assert group == [index for index in dict.fromkeys(group) for _ in range(group.count(index))]
                assert len(set(group)) == min(repeats, len(photographs[one]))  # others first, copies where too few
                together[one] += 1
                shown.update(set(group))
        groups += together
        pairs |= together
    assert set(shown) <= set(range(len(instances)))
    for one, number in groups.items():
        assert pairs[one] <= math.ceil(number / steps)  # twice in a batch only where there are not enough batches
    if factor >= 1:
        assert set(shown) == set(range(len(instances)))
        for one, number in needed.items():
            assert groups[one] >= number * int(factor)
            passes = math.ceil(groups[one] / number)
            assert all(shown[index] <= 2 * passes for index in photographs[one])
    if factor == 1:
        assert sum(groups.values()) - wanted < world * per_rank


def test_instances_are_shuffled():
    def epoch(number, **kwargs):
        sampler = InstanceSampler(labels, 8, 2, **kwargs)
        sampler.set_epoch(number)
        stream = list(sampler)
        return [frozenset(stream[i:i + 2]) for i in range(0, 48, 2)]

    labels = [i // 6 for i in range(48)]
    orders = epoch(0), epoch(1), epoch(0, seed=7)
    assert len({tuple(order) for order in orders}) == 3
    assert all(len(set(one) & set(other)) < 18 for one in orders for other in orders if one is not other)  # other pairs


def test_bad_arguments_of_instances():
    for arguments, message in (
            ({'instances': []}, 'instances is empty'), ({'batch_size': 7}, 'batch_size is 7, and num_repeats 3: give'),
            ({'num_repeats': 0}, 'num_repeats 0'), ({'batch_size': 0}, 'batch_size is 0'),
            ({'epoch_len_factor': math.inf}, 'epoch_len_factor is inf'), ({'rank': 1}, 'rank is 1')):
        with pytest.raises(ValueError, match=message):
            InstanceSampler(**{'instances': [1, 1, 2], 'batch_size': 6, **arguments})
