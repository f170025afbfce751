"""The UKBench score against a slow ranking, with and without ties."""
import json

import numpy as np
import pytest
import torch

from timm_multigrain.retrieval.ukb import ukb_score


def slow(scores, groups):
    found = []
    for query, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda i: (-row[i], groups[i] == groups[query]))
        found.append(sum(groups[i] == groups[query] for i in order[:4]))
    return found


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('digits', [0, 1, 9])
def test_equals_slow_ranking(seed, digits):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat([5, 2, 9, 0, 7], 4))
    scores = (rng.standard_normal((20, 20)) + 1.5 * (groups == groups[:, None])).round(digits)
    result = ukb_score(scores, groups)
    assert result.found.tolist() == slow(scores, groups)
    assert result.score == np.mean(slow(scores, groups))
    pieces = [torch.from_numpy(part) for part in np.array_split(scores, 6, axis=1)]
    assert (ukb_score(pieces, groups.tolist()).found == result.found).all()


def test_by_hand():
    groups = np.arange(8) // 4
    scores = np.equal.outer(groups, groups).astype(np.float32)
    assert ukb_score(scores, groups).score == 4
    assert ukb_score(1 - scores, groups).score == 0
    assert ukb_score(np.zeros((8, 8)), groups).score == 0  # ties count against the system
    assert ukb_score(np.eye(8), groups).score == 1  # the query itself; the others are tied with wrong ones


def test_prints_saves_and_draws(tmp_path):
    result = ukb_score(np.eye(8), np.arange(8) // 4)
    assert str(result) == 'UKB score 1.000 of 4 over 8 queries'
    assert json.loads(result.to_json()) == {'score': 1., 'num_queries': 8, 'found': [1] * 8}
    pytest.importorskip('matplotlib')
    assert result.draw(tmp_path / 'ukb.png').stat().st_size > 1000


@pytest.mark.parametrize('size, groups, message', [
    (5, [0, 0, 0, 0, 1], 'Group 1 has 1 images, not 4: leave it out'),
    (8, [3] * 8, 'Group 3 has 8 images'),
    (8, [0, 0, 0, 0], 'There are 8 rows of scores for 4 queries'),
    (4, [0., 0., 0., 0.], 'list of integers'),
    (4, [], 'list of integers'),
])
def test_bad_groups(size, groups, message):
    with pytest.raises(ValueError, match=message):
        ukb_score(np.zeros((size, size)), groups)
