"""Micro average precision and recall at 90 % precision against slow loops, by hand, and on DISC21's pairs."""
import csv
import json

import numpy as np
import pytest

from timm_multigrain.retrieval.copies import micro_average_precision


def slow(pairs, truth):
    """pairs: (query, reference, score). Everything recomputed at each place of the list."""
    order = sorted(pairs, key=lambda pair: (-pair[2], pair[:2] in truth))
    uap, recall_at_p90, threshold, true = 0., 0., None, 0
    for place, (query, reference, score) in enumerate(order, 1):
        if (query, reference) in truth:
            true += 1
            uap += true / place / len(truth)
        if true / place >= 0.9 and true / len(truth) > recall_at_p90:
            recall_at_p90, threshold = true / len(truth), score
    return uap, recall_at_p90, threshold


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('digits', [1, 12])
def test_equals_slow_list(seed, digits):
    rng = np.random.default_rng(seed)
    truth = {(f'Q{i}', f'R{i % 7}') for i in range(12)}
    everything = [(f'Q{q}', f'R{r}') for q in range(15) for r in range(7)]
    chosen = [everything[i] for i in rng.permutation(len(everything))[:90]]
    pairs = [(*pair, round(rng.standard_normal() + 4 * (pair in truth), digits)) for pair in chosen]
    result = micro_average_precision(*map(list, zip(*pairs, strict=True)), truth)
    uap, recall, threshold = slow(pairs, truth)
    assert result.uap == pytest.approx(uap, abs=1e-12)
    assert result.recall_at_p90 == pytest.approx(recall, abs=1e-12)
    assert result.threshold_at_p90 == threshold


def test_by_hand():
    """Right, wrong, right, and one true pair that was not predicted."""
    truth = [('a', 'x'), ('c', 'y'), ('d', 'z')]
    result = micro_average_precision(['a', 'b', 'c'], ['x', 'x', 'y'], [0.9, 0.8, 0.7], truth)
    assert result.uap == pytest.approx((1 + 2 / 3) / 3)
    assert (result.recall_at_p90, result.threshold_at_p90) == (pytest.approx(1 / 3), 0.9)
    tied = micro_average_precision(['a', 'b'], ['x', 'x'], [1, 1], [('a', 'x')])
    assert (tied.uap, tied.recall_at_p90, tied.threshold_at_p90) == (0.5, 0, None)
    missed = micro_average_precision(['a'], ['y'], [1.], [('a', 'x')])
    assert (missed.uap, missed.recall_at_p90) == (0, 0)


def test_pairs_of_disc21(shared_data):
    with open(shared_data / 'gt' / 'disc21_subset_1_ground_truth.csv', newline='') as file:
        truth = [(row['query_id'], row['reference_id']) for row in csv.DictReader(file)]
    rng = np.random.default_rng(0)
    wrong = [(f'Q{i:05}', f'R{rng.integers(10 ** 6):06}') for i in range(20_000)]
    found = [pair for pair in truth if rng.random() < 0.8]
    pairs = list(dict.fromkeys([*found, *wrong]))
    scores = rng.standard_normal(len(pairs))
    scores[:len(found)] += 3
    result = micro_average_precision(*map(list, zip(*pairs, strict=True)), scores, truth)
    uap, recall, threshold = slow([(*pair, score) for pair, score in zip(pairs, scores, strict=True)], set(truth))
    assert result.num_true == 4991
    assert (result.uap, result.recall_at_p90) == pytest.approx((uap, recall), abs=1e-12)
    assert result.threshold_at_p90 == threshold
    perfect = micro_average_precision(*zip(*truth, strict=True), np.ones(len(truth)), truth)
    assert (perfect.uap, perfect.recall_at_p90) == (pytest.approx(1, abs=1e-12), 1)


def test_prints_saves_and_draws(tmp_path):
    result = micro_average_precision(['a', 'b'], ['x', 'y'], [1., 0.], [('a', 'x'), ('b', 'x')])
    assert str(result) == 'uAP 50.00 %, recall at 90 % precision 50.00 % of 2 true pairs'
    assert json.loads(result.save(tmp_path / 'r.json').read_text()) == {
        'uap': 0.5, 'recall_at_p90': 0.5, 'threshold_at_p90': 1., 'num_true': 2, 'num_found': 1}
    pytest.importorskip('matplotlib')
    assert result.draw(tmp_path / 'curve.png').stat().st_size > 1000


@pytest.mark.parametrize('queries, references, scores, truth, message', [
    (['a'], ['x', 'y'], [1., 2.], [('a', 'x')], '1 query_ids, 2 reference_ids'),
    (['a'], ['x'], [[1.]], [('a', 'x')], r'shape \(1, 1\)'),
    (['a'], ['x'], [float('nan')], [('a', 'x')], r'scores\[0\] is NaN'),
    (['a'], ['x'], [1.], [], 'true_pairs is empty'),
    (['a'], ['x'], [1.], [('a', 'x')] * 2, 'true_pairs holds a pair more than once'),
    (['a', 'a'], ['x', 'x'], [1., 2.], [('a', 'x')], r"\('a', 'x'\) is predicted more than once"),
])
def test_bad_pairs(queries, references, scores, truth, message):
    with pytest.raises(ValueError, match=message):
        micro_average_precision(queries, references, scores, truth)
