"""The revisited measures against the public evaluator's figures and a slow ranking of every image."""
import json
import math
import pickle

import numpy as np
import pytest

from timm_multigrain.retrieval.revisited import RevisitedQuery, revisited_scores

PROTOCOLS = {'easy': (('easy',), ('junk', 'hard')), 'medium': (('easy', 'hard'), ('junk',)),
             'hard': (('hard',), ('junk', 'easy'))}


def slow(scores, query, protocol, kappas=(1, 5, 10)):
    """Average precision and precisions of one query, wrong images first among equal scores."""
    wanted, junk = ({i for name in names for i in getattr(query, name)} for names in PROTOCOLS[protocol])
    if not wanted:
        return math.nan, [math.nan] * len(kappas)
    kept = sorted((i for i in range(len(scores)) if i not in junk), key=lambda i: (-scores[i], i in wanted))
    ranks = [rank for rank, i in enumerate(kept) if i in wanted]
    ap = 0.
    for found, rank in enumerate(ranks):
        ap += ((found / rank if rank else 1.) + (found + 1) / (rank + 1)) / 2 / len(wanted)
    depths = [min(k, ranks[-1] + 1) for k in kappas]
    return ap, [sum(rank < depth for rank in ranks) / depth for depth in depths]


def random_problem(seed, ties, empty=False):
    rng = np.random.default_rng(seed)
    scores, queries = rng.standard_normal((6, 80)), []
    if ties:
        scores = scores.round(1)
    for number in range(6):
        images = rng.permutation(80)
        easy, hard, junk = images[:5], images[5:14], images[14:20]
        queries.append(RevisitedQuery(easy, [] if empty and number % 2 else hard.tolist(), junk))
    return scores, queries


@pytest.mark.parametrize('name', ['rparis6k', 'rparis6k_subset'])
@pytest.mark.parametrize('ranking', ['random', 'noisy'])
def test_equals_the_public_evaluator(shared_data, name, ranking):
    reference = json.loads((shared_data / 'gt' / 'reference_outputs.json').read_text())[name][ranking]
    if name == 'rparis6k':
        with open(shared_data / 'gt' / 'gnd_rparis6k.pkl', 'rb') as file:
            truth = pickle.load(file)
    else:
        truth = json.loads((shared_data / 'instances' / 'paris' / 'gnd_rparis6k_subset.json').read_text())
    scores = np.stack([np.random.RandomState(q).randn(len(truth['imlist'])) for q in range(len(truth['gnd']))])
    if ranking == 'noisy':
        for row, entry in zip(scores, truth['gnd'], strict=True):
            row[np.concatenate([entry['easy'], entry['hard']]).astype(int)] += 2
    queries = [RevisitedQuery(entry['easy'], entry['hard'], entry['junk']) for entry in truth['gnd']]
    for given in (scores, np.array_split(scores, 7, axis=1)):
        result = revisited_scores(given, queries)
        for protocol, expected in reference.items():
            part = getattr(result, protocol)
            assert part.map == pytest.approx(expected['mAP'], abs=1e-12)
            assert list(part.mp_at.values()) == pytest.approx(expected['mP@k'], abs=1e-12)
            assert part.ap[:5] == pytest.approx(expected['ap_first5'], abs=1e-12, nan_ok=True)
            assert len(queries) - part.num_queries == expected['queries_without_positives']


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('ties', [False, True])
def test_equals_slow_ranking(seed, ties):
    scores, queries = random_problem(seed, ties, empty=seed % 2 == 1)
    result = revisited_scores(scores, queries)
    for protocol in PROTOCOLS:
        part = getattr(result, protocol)
        expected = [slow(row, query, protocol) for row, query in zip(scores, queries, strict=True)]
        assert part.ap == pytest.approx([ap for ap, _ in expected], abs=1e-12, nan_ok=True)
        for column, values in enumerate(part.precisions.values()):
            assert values == pytest.approx([p[column] for _, p in expected], abs=1e-12, nan_ok=True)
        assert part.map == pytest.approx(np.nanmean([ap for ap, _ in expected]), abs=1e-12)
    pieces = [scores[:, :3], scores[:, 3:70], scores[:, 70:]]
    assert np.array_equal(revisited_scores(iter(pieces), queries).hard.ap, result.hard.ap, equal_nan=True)


def test_by_hand():
    """Order of the images: junk 3, easy 0, wrong 4, hard 1, wrong 5, easy 2."""
    scores = np.array([[0.8, 0.5, 0.3, 0.9, 0.7, 0.4]])
    result = revisited_scores(scores, [RevisitedQuery([0, 2], [1], [3])], kappas=(1, 2, 10))
    assert result.easy.ap[0] == pytest.approx(((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2)  # ranks 0 and 3: 1 is out
    assert result.medium.ap[0] == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 4 + 3 / 5) / 2) / 3)
    assert result.hard.ap[0] == pytest.approx((0 + 1 / 2) / 2)  # rank 1: 0 is out
    assert result.easy.mp_at == pytest.approx({1: 1, 2: 1 / 2, 10: 2 / 4})  # of 10 no more than to the last one found
    assert result.hard.mp_at == pytest.approx({1: 0, 2: 1 / 2, 10: 1 / 2})


def test_protocol_without_anything_to_find(tmp_path):
    scores, _ = random_problem(0, False)
    result = revisited_scores(scores, [RevisitedQuery([number], []) for number in range(6)])
    assert result.hard is None and len(result.parts) == 2 and 'Hard' not in str(result)
    saved = json.loads(result.save(tmp_path / 'result.json').read_text())
    assert list(saved) == ['easy', 'medium'] and saved['easy']['map'] == result.easy.map


def test_prints_saves_and_draws(tmp_path):
    scores, queries = random_problem(1, False, empty=True)
    result = revisited_scores(scores, queries)
    assert str(result).splitlines()[2].startswith('Hard   mAP ') and str(result).endswith('over 3 queries')
    assert json.loads(result.to_json())['hard']['ap'][1] is None
    pytest.importorskip('matplotlib')
    assert result.draw(tmp_path / 'ap.svg').read_text().startswith('<?xml')


@pytest.mark.parametrize('queries, message', [
    ([RevisitedQuery([0], [1], [0])], 'Query 0: item 0 is in more than one list of easy, hard, junk'),
    ([RevisitedQuery([0, 0], [1])], r'easy\[0\] holds a value more than once'),
    ([RevisitedQuery([0], [-1])], r'hard\[0\] holds the negative value -1'),
    ([RevisitedQuery([0], [1.5])], r'hard\[0\] must be a list of integers'),
    ([RevisitedQuery([0], [4])], 'Query 0: index 4 is out of range for 4 items'),
    ([RevisitedQuery([], [], [1])], 'nothing to find'),
    ([RevisitedQuery([0], [1])] * 2, 'There are 1 rows of scores for 2 queries'),
    ([], 'nothing to find'),
])
def test_bad_ground_truth(queries, message):
    with pytest.raises(ValueError, match=message):
        revisited_scores(np.zeros((1, 4)), queries)


def test_bad_kappas():
    with pytest.raises(ValueError, match='1 or more'):
        revisited_scores(np.zeros((1, 4)), [RevisitedQuery([0], [1])], kappas=(0, 5))
