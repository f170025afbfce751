"""Numbers of items above the labelled ones against plain comparisons, for matrices and chunks; the best pairs."""
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.measure.ranks import best_pairs, outranking, ranks


def slow(scores, lists):
    """For each item of a list, the number of other items than those listed that score at least as much."""
    others = [np.delete(np.asarray(row, dtype=object), items) for row, items in zip(scores, lists, strict=True)]
    return [[sum(other >= row[item] for other in rest) for item in items]
            for row, rest, items in zip(scores, others, lists, strict=True)]


def as_lists(arrays):
    return [array.tolist() for array in arrays]


@st.composite
def problems(draw):
    queries, items = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([1, 3, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    scores = rng.integers(0, levels, (queries, items)) / levels - 0.3
    special = rng.random(scores.shape) < draw(st.sampled_from([0, 0, 0.2]))
    scores[special] = rng.choice([np.inf, -np.inf, 1e300, -1e-300, 0., -0.], special.sum())
    lists = [rng.permutation(items)[:rng.integers(0, items + 1)] for _ in range(queries)]
    return scores, lists, sorted(rng.integers(0, items + 1, draw(st.integers(0, 4))))


@given(problems())
@settings(max_examples=100, deadline=None)
def test_equals_comparing_all(problem):
    scores, lists, cuts = problem
    expected = slow(scores, lists)
    chunks = np.split(scores, cuts, axis=1)
    for given_scores in (scores, torch.from_numpy(scores), chunks, np.asfortranarray(scores)):
        assert as_lists(outranking(given_scores, wanted=lists)) == expected
    assert as_lists(outranking(chunks, wanted=[i[:1] for i in lists], other=[i[1:] for i in lists])) == expected


@pytest.mark.parametrize('dtype', [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.int64, torch.bool])
def test_every_dtype(dtype):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(40, 12, (3, 500))).to(dtype)
    if dtype == torch.int64:
        scores += 2 ** 60  # float64 does not tell these apart
    lists = [rng.permutation(500)[:n] for n in (20, 0, 30)]
    expected = slow((scores if dtype == torch.int64 else scores.double()).numpy(), lists)
    scores.requires_grad_(dtype.is_floating_point)
    assert as_lists(outranking(scores, wanted=lists)) == expected
    assert as_lists(outranking(scores.split(77, dim=1), wanted=[torch.from_numpy(own) for own in lists])) == expected


@pytest.mark.gpu
def test_on_a_gpu():
    scores = torch.randn(4, 3000).half()
    expected = as_lists(outranking(scores, wanted=[np.arange(40)] * 4))
    assert as_lists(outranking(scores.cuda(), wanted=[np.arange(40)] * 4)) == expected
    assert as_lists(outranking(scores.cuda().split(999, dim=1), wanted=[np.arange(40)] * 4)) == expected


def test_ranks():
    """Of items with 5, 0 and 0 wrong ones above, two come first, and the third behind them and the five."""
    assert ranks(np.array([5, 0, 0])).tolist() == [0, 1, 7]
    assert ranks(np.array([], dtype=np.int64)).tolist() == []


def test_memory_of_a_chunk():
    class Chunks:
        read = 0

        def __iter__(self):
            buffer, rng = np.empty((10, 100_000), np.float32), np.random.default_rng(0)
            for _ in range(20):
                self.read += 1
                yield rng.random(out=buffer, dtype=np.float32)  # used again: what is kept of it has to be copied

    lists = [[q, 99_000, 150_000] for q in range(10)]
    tracemalloc.start()
    chunks = Chunks()
    counts = outranking(chunks, wanted=lists)  # 76 MiB of scores in chunks of 3.8 MiB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert chunks.read == 2 + 20  # up to the last labelled item, and all of them
    scores = np.concatenate([chunk.copy() for chunk in chunks], axis=1)
    for row, items, own in zip(scores, lists, counts, strict=True):
        assert own.tolist() == [(np.delete(row, items) >= row[item]).sum() for item in items]


@pytest.mark.parametrize('scores, message', [
    (np.zeros(3), r'shape \(3,\)'),
    ([np.zeros((1, 3)), np.zeros((2, 3))], r'shape \(2, 3\) .* \(1, items\)'),
    (iter([np.zeros((1, 3))]), 'scores are a generator, and are read twice'),
    ([], 'Query 0: index 1 is out of range for 0 items'),
    (np.zeros((1, 4), complex), 'real numbers'),
    (torch.tensor([[0., torch.nan, 0., 0.]], dtype=torch.bfloat16), r'scores\[0\] contains NaN'),
])
def test_bad_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        outranking(scores, wanted=[[1, 0]])


@pytest.mark.parametrize('lists, message', [
    (dict(wanted=[[3]]), 'index 3 is out of range for 3'),
    (dict(wanted=[[0]], junk=[[5]]), 'index 5 is out of range'),
    (dict(wanted=[[-1]]), r'wanted\[0\] must be a list of integers from 0'),
    (dict(wanted=[[0, 0]]), 'Query 0: item 0 is more than once in wanted'),
    (dict(wanted=[[0, 1]], junk=[[2, 1]]), 'item 1 is more than once in wanted, junk'),
    (dict(wanted=[[0.]]), 'list of integers'),
    (dict(wanted=[[0], [1]]), r'\(2, items\)'),
    (dict(wanted=[[0]], junk=[[1], [2]]), '1 lists of wanted items, 2 lists of junk items'),
])
def test_bad_lists(lists, message):
    with pytest.raises(ValueError, match=message):
        outranking(np.zeros((1, 3)), **lists)


@pytest.mark.parametrize('limit', [1, 7, 100])
def test_best_pairs(limit):
    scores = np.random.default_rng(limit).permutation(60).reshape(5, 12).astype(np.float32)
    rows, columns, values = best_pairs(torch.from_numpy(scores).split(4, dim=1), limit)
    wanted = np.argsort(-scores.ravel())[:limit]
    assert (rows * 12 + columns == wanted).all() and (values == scores.ravel()[wanted]).all()
    scores[3, 11] = np.nan
    with pytest.raises(ValueError, match='scores contain NaN'):
        best_pairs(torch.from_numpy(scores).split(4, dim=1), limit)
