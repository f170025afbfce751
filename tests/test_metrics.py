"""Average precision against a slow loop that ranks every database item."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.retrieval.metrics import average_precision, mean_average_precision


def slow_ap(ranks, num_relevant):
    ap = 0.
    for found, rank in enumerate(sorted(ranks)):
        before = 1. if rank == 0 else found / rank
        at = (found + 1.) / (rank + 1.)
        ap += (before + at) / 2. / num_relevant
    return ap


def slow_query(scores, relevant, ignore):
    """Ranks all items one by one, irrelevant ones first among equal scores."""
    items = [i for i in range(len(scores)) if i not in ignore]
    items.sort(key=lambda i: (-float(scores[i]), i in relevant))
    return slow_ap([rank for rank, i in enumerate(items) if i in relevant], len(relevant))


@st.composite
def problems(draw):
    queries, items = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    scores = rng.integers(0, levels, (queries, items)) / levels - 0.3
    relevant, ignore = [], []
    for _ in range(queries):
        order = rng.permutation(items)
        count = rng.integers(1, items + 1)
        relevant.append(order[:count])
        ignore.append(order[count:count + rng.integers(0, 4)])
    return scores, relevant, ignore


@given(problems())
@settings(max_examples=300, deadline=None)
def test_equals_slow_loop(problem):
    scores, relevant, ignore = problem
    result = mean_average_precision(scores, relevant, ignore)
    expected = [slow_query(*query) for query in zip(scores, relevant, ignore, strict=True)]
    assert result.ap == pytest.approx(expected, abs=1e-12)
    assert result.map == pytest.approx(np.mean(expected), abs=1e-12)
    assert result.num_queries == len(scores)
    pieces = np.array_split(scores, 3, axis=1)
    assert (mean_average_precision(pieces, relevant, ignore).ap == result.ap).all()
    no_ignore = [slow_query(row, r, ()) for row, r in zip(scores, relevant, strict=True)]
    assert mean_average_precision(scores, relevant).ap == pytest.approx(no_ignore, abs=1e-12)


@pytest.mark.parametrize('dtype', [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8,
])
def test_tensors_of_every_dtype(dtype):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 100, (5, 60))).to(dtype)
    relevant = [rng.choice(60, 7, replace=False).tolist() for _ in range(5)]
    ignore = [[next(i for i in range(60) if i not in r)] for r in relevant]
    expected = [slow_query(*query) for query in zip(scores.double().numpy(), relevant, ignore, strict=True)]
    assert mean_average_precision(scores, relevant, [torch.tensor(i) for i in ignore]).ap == pytest.approx(expected)
    scores.requires_grad_(dtype.is_floating_point)
    assert mean_average_precision(scores, relevant, ignore).ap.dtype == np.float64


def test_by_hand():
    assert average_precision([0, 1, 2], 3) == 1
    assert average_precision([1], 1) == pytest.approx((0 + 1 / 2) / 2)
    assert average_precision([3, 0], 2) == pytest.approx(((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
    assert average_precision([0], 4) == 0.25
    assert average_precision([], 4) == 0
    assert average_precision(torch.tensor([2, 0]), 2) == average_precision(np.array([0, 2], dtype=np.uint8), 2)


def test_ties_count_against_the_system():
    assert mean_average_precision(np.zeros((1, 10)), [[0]]).map == average_precision([9], 1)
    assert mean_average_precision(np.zeros((1, 10)), [[0, 5]], [[3]]).map == average_precision([7, 8], 2)


def test_holidays_rules():
    """The query is the first image of a group, found or not it does not count; names as INRIA gives them."""
    numbers = [100000, 100001, 100002, 100100, 100101]
    scores = np.array([[1., 0.3, 0.9, 0.8, 0.1], [0.2, 0.7, 0.6, 1., 0.5]])
    relevant = [[i for i, n in enumerate(numbers) if n // 100 == q // 100 and n != q] for q in (100000, 100100)]
    result = mean_average_precision(scores, relevant, [[0], [3]])
    first = ((1 + 1 / 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2  # ranks 0 and 2 of the four others
    second = (0 + 1 / 3) / 2  # rank 2
    assert result.ap == pytest.approx([first, second], abs=1e-12)


def test_holidays_names(shared_data):
    numbers = [int(n.split('.')[0]) for n in (shared_data / 'gt' / 'holidays_images.dat').read_text().split()]
    queries = [i for i, n in enumerate(numbers) if n % 100 == 0]
    relevant = [[i for i, n in enumerate(numbers) if n // 100 == numbers[q] // 100 and i != q] for q in queries]
    scores = np.random.default_rng(0).standard_normal((len(queries), len(numbers)))
    result = mean_average_precision(scores, relevant, [[q] for q in queries])
    assert result.num_queries == 500
    expected = [slow_query(*query) for query in zip(scores, relevant, [[q] for q in queries], strict=True)]
    assert result.ap == pytest.approx(expected, abs=1e-12)


def test_infinite_scores():
    scores = np.array([[-np.inf, np.inf, 0., -np.inf]])
    assert mean_average_precision(scores, [[1, 0]]).map == average_precision([0, 3], 2)


def test_result_prints():
    result = mean_average_precision(np.array([[1., 0.], [0., 1.]]), [[0], [0]])
    assert str(result) == 'mAP 62.50 % over 2 queries'
    assert str(mean_average_precision(np.eye(1), [[0]])) == 'mAP 100.00 % over 1 query'


def test_result_saves_and_draws(tmp_path):
    result = mean_average_precision(np.array([[1., 0.], [0., 1.]]), [[0], [0]])
    saved = json.loads(result.save(tmp_path / 'new' / 'result.json').read_text())
    assert saved == {'map': 0.625, 'num_queries': 2, 'ap': [1., 0.25]}
    pytest.importorskip('matplotlib')
    assert result.draw(tmp_path / 'pictures' / 'ap.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('scores, relevant, ignore, message', [
    (np.zeros((2, 3)), [[0], []], None, r'relevant\[1\] is empty'),
    (np.zeros((1, 3)), [[3]], None, 'index 3 is out of range for 3'),
    (np.zeros((1, 3)), [[0]], [[5]], 'index 5 is out of range'),
    (np.zeros((1, 3)), [[-1]], None, r'relevant\[0\] holds the negative value -1'),
    (np.zeros((1, 3)), [[0, 0]], None, 'more than once'),
    (np.zeros((1, 3)), [[0, 1]], [[2, 1]], 'item 1 is in more than one list of relevant, ignore'),
    (np.zeros((1, 3)), [[True, False, True]], None, 'list of integers'),
    (np.zeros((1, 3)), [[0.]], None, 'list of integers'),
    (np.zeros((1, 3)), [[[0]]], None, 'list of integers'),
    (np.array([[0., np.nan]]), [[0]], None, r'scores\[0\] holds NaN'),
    (torch.tensor([[0., 1.], [float('nan'), 0.]]), [[0], [0]], None, r'scores\[1\] holds NaN'),
    (np.zeros((2, 3)), [[0]], None, '2 rows of scores for 1 queries'),
    (np.zeros((1, 3)), [[0]], [[1], [2]], '2 lists of ignore'),
    (np.zeros(3), [[0]], None, 'shape'),
    (np.zeros((0, 3)), [], None, 'at least one query'),
])
def test_bad_input(scores, relevant, ignore, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(scores, relevant, ignore)


@pytest.mark.parametrize('ranks, num_relevant', [([0], 0), ([0, 1], 1), ([-1], 1), ([1, 1], 3), ([0.5], 1), ([], 0)])
def test_bad_ranks(ranks, num_relevant):
    with pytest.raises(ValueError):
        average_precision(ranks, num_relevant)
