"""The measures against slow loops that rank every item, the public evaluator's figures, and figures by hand."""
import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.measure.metrics import (
    RevisitedQuery,
    average_precision,
    clustering_nmi,
    knn_accuracy,
    mean_average_precision,
    micro_average_precision,
    revisited_scores,
    ukb_score,
)
from timm_multigrain.measure.ranks import best_pairs, count_above
from timm_multigrain.search import exact
from timm_multigrain.search.exact import SimilarityChunks

PROTOCOLS = {'easy': (('easy',), ('junk', 'hard')), 'medium': (('easy', 'hard'), ('junk',)),
             'hard': (('hard',), ('junk', 'easy'))}


def slow_query(scores, relevant, ignore, kappas=()):
    """Average precision and precisions at k. Ranks all items one by one, irrelevant ones first among equal scores."""
    if not len(relevant):
        return math.nan, *[math.nan] * len(kappas)
    items = sorted((i for i in range(len(scores)) if i not in ignore), key=lambda i: (-float(scores[i]), i in relevant))
    ranks = [rank for rank, i in enumerate(items) if i in relevant]
    ap = 0.
    for found, rank in enumerate(ranks):
        before = 1. if rank == 0 else found / rank
        ap += (before + (found + 1.) / (rank + 1.)) / 2. / len(relevant)
    depths = [min(k, ranks[-1] + 1) for k in kappas]
    return ap, *[sum(rank < depth for rank in ranks) / depth for depth in depths]


def slow_revisited(scores, queries, protocol, kappas=(1, 5, 10)):
    wanted, junk = PROTOCOLS[protocol]
    return np.array([slow_query(row, *({int(i) for name in names for i in getattr(query, name)}
                                       for names in (wanted, junk)), kappas)
                     for row, query in zip(scores, queries, strict=True)]).T


def slow_ukb(scores, groups):
    orders = [sorted(range(len(row)), key=lambda i: (-row[i], groups[i] == groups[query]))
              for query, row in enumerate(scores)]
    return [sum(groups[i] == groups[query] for i in order[:4]) for query, order in enumerate(orders)]


def slow_pairs(pairs, truth):
    """pairs: (query, reference, score). Everything recomputed at each place of the list."""
    order = sorted(pairs, key=lambda pair: (-pair[2], pair[:2] in truth))
    uap, recall_at_p90, true = 0., 0., 0
    for place, (query, reference, _) in enumerate(order, 1):
        if (query, reference) in truth:
            true += 1
            uap += true / place / len(truth)
        if true / place >= 0.9 and true / len(truth) > recall_at_p90:
            recall_at_p90 = true / len(truth)
    return uap, recall_at_p90


def slow_figures(scores, relevant, ignore, ks=(1, 2, 5)):
    """Recall@K, mAP@K and MAP@R in per cent, by walking down each ranking; right ones last among equal scores."""
    figures = {}
    for row, right, out in zip(scores, relevant, ignore, strict=True):
        order = sorted(set(range(len(row))) - set(out), key=lambda i: (-row[i], i in right))
        hits = [i in right for i in order]
        precisions = [sum(hits[:n + 1]) / (n + 1) if hit else 0 for n, hit in enumerate(hits)]
        for k in ks:
            figures.setdefault(f'Recall@{k}', []).append(any(hits[:k]))
            figures.setdefault(f'mAP@{k}', []).append(sum(precisions[:k]) / min(k, len(right)))
        figures.setdefault('MAP@R', []).append(sum(precisions[:len(right)]) / len(right))
    return {name: 100 * np.mean(values) for name, values in figures.items()}


@st.composite
def problems(draw):
    """Scores, and for each query three lists of items, the first not empty."""
    queries, items = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    scores = rng.integers(0, levels, (queries, items)) / levels - 0.3
    special = rng.random(scores.shape) < draw(st.sampled_from([0, 0, 0.2]))
    scores[special] = rng.choice([np.inf, -np.inf, 1e300, -1e-300, 0., -0.], special.sum())
    lists = [np.split(rng.permutation(items), np.cumsum([rng.integers(1, items + 1), *rng.integers(0, 4, 2)]))[:3]
             for _ in range(queries)]
    return scores, *zip(*lists, strict=True)


@given(problems())
@settings(max_examples=200, deadline=None)
def test_equals_slow_loop(problem):
    scores, first, second, third = problem
    chunks = [torch.from_numpy(chunk) for chunk in np.array_split(scores, 3, axis=1)]
    result = mean_average_precision(scores, first, second)
    expected = [slow_query(*query)[0] for query in zip(scores, first, second, strict=True)]
    assert result.ap == pytest.approx(expected, abs=1e-12) and result.ap.dtype == np.float64
    assert result.map == pytest.approx(np.mean(expected), abs=1e-12) and result.num_queries == len(scores)
    assert (mean_average_precision(chunks, first, second).ap == result.ap).all()
    no_ignore = [slow_query(row, own, ())[0] for row, own in zip(scores, first, strict=True)]
    assert mean_average_precision(scores, first).ap == pytest.approx(no_ignore, abs=1e-12)

    queries = [RevisitedQuery(*lists) for lists in zip(second, first, third, strict=True)]  # easy may be empty
    result = revisited_scores(chunks, queries)
    for protocol in ('Easy', 'Medium', 'Hard'):
        part, (ap, *precisions) = result.get(protocol), slow_revisited(scores, queries, protocol.lower())
        if np.isnan(ap).all():
            assert part is None
            continue
        assert part.ap == pytest.approx(ap, abs=1e-12, nan_ok=True)
        assert part.map == pytest.approx(np.nanmean(ap), abs=1e-12)
        assert part.num_queries == np.isfinite(ap).sum()
        assert [part.mp_at(k) for k in (1, 5, 10)] == pytest.approx(np.nanmean(precisions, axis=1), abs=1e-12)


@given(st.integers(0, 10 ** 6), st.sampled_from([1, 3, 1000]))
@settings(max_examples=60, deadline=None)
def test_measures_of_labels_equal_slow_loop(seed, levels):
    """Images of labels as queries among each other: ties, negative scores, labels with one image or many."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(6), rng.integers(1, 6, 6)))
    scores = rng.integers(-levels, levels, (len(labels), len(labels))) / levels
    queries = [i for i in range(len(labels)) if (labels == labels[i]).sum() > 1]
    if not queries:
        return
    relevant = [np.setdiff1d(np.flatnonzero(labels == labels[i]), [i]) for i in queries]
    own = [[i] for i in queries]
    result = mean_average_precision(np.array_split(scores[queries], 3, axis=1), relevant, own)
    wanted = slow_figures(scores[queries], relevant, own, ks=(1, 2, 5, 100))
    found = {'MAP@R': result.map_at_r} | {
        f'{name}@{k}': measure(k) for name, measure in (('Recall', result.recall_at), ('mAP', result.map_at))
        for k in (1, 2, 5, 100)}
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(wanted, abs=1e-9)


def slow_knn(row, labels, wanted, k, own):
    """Votes of the k nearest; the label wins only if its votes are more than those of each other."""
    order = sorted((i for i in range(len(row)) if i != own), key=lambda i: (-row[i], i))[:k]
    votes = {}
    for i in order:
        votes[labels[i]] = votes.get(labels[i], 0) + np.exp(float(row[i]) / 0.07)
    return votes.get(wanted, 0) > max([0, *(vote for label, vote in votes.items() if label != wanted)])


@pytest.mark.parametrize('all_against_all', [True, False])
def test_knn_equals_slow_loop(all_against_all, monkeypatch):
    monkeypatch.setattr(exact, 'MOST_QUERIES', 16)  # in blocks
    generator = torch.Generator().manual_seed(0)
    database = torch.nn.functional.normalize(torch.randn(70, 5, generator=generator))
    database[20:30] = database[40:50] = database[30:40]  # ties, which the query itself may lose against
    labels = np.arange(60) % 4  # ten distractors after them
    queries = database if all_against_all else torch.nn.functional.normalize(torch.randn(30, 5, generator=generator))
    own = np.arange(60) if all_against_all else None
    queries = queries[:60]
    wanted = np.arange(len(queries)) % 4
    scores = SimilarityChunks(queries, database, chunk_size=33)
    known = [*labels, *[-1] * 10]
    for k in (1, 3, 20, 100):
        expected = np.mean([slow_knn(row, known, wanted[q], k, q if all_against_all else None)
                            for q, row in enumerate(torch.cat(list(scores), 1).numpy())])
        assert knn_accuracy(scores, wanted, labels, k, own) == pytest.approx(expected)


def test_nmi():
    pytest.importorskip('sklearn')
    labels = np.repeat([4, 7, 9], 20)
    noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    assert clustering_nmi(torch.eye(3).repeat_interleave(20, 0) + 0.01 * noise, labels) == pytest.approx(1)
    assert clustering_nmi(noise, labels) < 0.3


@pytest.mark.parametrize('block_bytes', [4 * 50 * 128, 0])
def test_many_queries_in_blocks(block_bytes, monkeypatch):
    """The same numbers from whole rows or chunks of some queries as from all of them, offsets among them."""
    vectors = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).repeat(6, 1)
    lists, offsets = [[i % 50, (i + 7) % 50] for i in range(300)], torch.arange(300.)
    expected = [own.tolist() for own in count_above(vectors @ vectors[:50].T + offsets[:, None], lists)]
    monkeypatch.setattr(exact, 'BLOCK_BYTES', block_bytes)
    monkeypatch.setattr(exact, 'MOST_QUERIES', 77 if not block_bytes else 4096)
    scores = SimilarityChunks(vectors, vectors[:50], offsets=offsets)
    shapes = [part.shape if isinstance(part, torch.Tensor) else (len(part.queries),) for _, part in scores.blocks()]
    assert shapes == ([(128, 50), (128, 50), (44, 50)] if block_bytes else [(77,), (77,), (77,), (69,)])
    assert [own.tolist() for own in count_above(scores, lists)] == expected


def test_average_precision_by_hand():
    for ranks in ([3, 0], torch.tensor([3, 0]), np.array([0, 3], dtype=np.uint8)):
        assert average_precision(ranks, 2) == pytest.approx(((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
    assert average_precision([0], 4) == 0.25 and average_precision([], 4) == 0
    assert mean_average_precision(np.zeros((1, 10)), [[0]]).map == average_precision([9], 1)  # ties are lost


@pytest.mark.parametrize('name', ['rparis6k', 'rparis6k_subset'])
@pytest.mark.parametrize('ranking', ['random', 'noisy'])
def test_revisited_equals_the_public_evaluator(shared_data, name, ranking):
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
    for given_scores in (scores, np.array_split(scores, 7, axis=1)):
        result = revisited_scores(given_scores, queries)
        for protocol, expected in reference.items():
            part = result[protocol.capitalize()]
            assert part.map == pytest.approx(expected['mAP'], abs=1e-12)
            assert [part.mp_at(k) for k in (1, 5, 10)] == pytest.approx(expected['mP@k'], abs=1e-12)
            assert part.ap[:5] == pytest.approx(expected['ap_first5'], abs=1e-12, nan_ok=True)
            assert len(queries) - part.num_queries == expected['queries_without_positives']


@pytest.mark.parametrize('digits', [0, 9])
def test_ukb_equals_slow_ranking(digits):
    rng = np.random.default_rng(digits)
    groups = rng.permutation(np.repeat([5, 2, 9, 0, 7], 4))
    scores = (rng.standard_normal((20, 20)) + 1.5 * (groups == groups[:, None])).round(digits)
    assert ukb_score(np.array_split(scores, 6, axis=1), groups.tolist()) == np.mean(slow_ukb(scores, groups))


@pytest.mark.parametrize('digits', [1, 12])
def test_pairs_equal_slow_list(digits):
    rng = np.random.default_rng(digits)
    truth = {(f'Q{i}', f'R{i % 7}') for i in range(12)}
    everything = [(f'Q{q}', f'R{r}') for q in range(15) for r in range(7)]
    chosen = [everything[i] for i in rng.permutation(len(everything))[:90]]
    pairs = [(*pair, round(rng.standard_normal() + 4 * (pair in truth), digits)) for pair in chosen]
    result = micro_average_precision(*map(list, zip(*pairs, strict=True)), truth)
    assert (result.uap, result.recall_at_p90) == pytest.approx(slow_pairs(pairs, truth), abs=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool])
def test_every_dtype(dtype):
    """The number of unlabelled items that score at least as much, by comparing all."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(40, 12, (3, 500))).to(dtype)
    if dtype == torch.int64:
        scores += 2 ** 60  # float64 does not tell these apart
    lists = [rng.permutation(500)[:n] for n in (20, 0, 30)]
    rows = (scores if dtype == torch.int64 else scores.double()).numpy()
    expected = [[(np.delete(row, own) >= row[i]).sum() for i in own] for row, own in zip(rows, lists, strict=True)]
    scores.requires_grad_(dtype.is_floating_point)
    for given_scores in (scores, scores.split(77, dim=1)):
        assert [own.tolist() for own in count_above(given_scores, lists)] == expected


@pytest.mark.gpu
def test_scores_on_a_gpu():
    scores, lists = torch.randn(4, 3000).half(), [np.arange(40)] * 4
    expected = [own.tolist() for own in count_above(scores, lists)]
    assert [own.tolist() for own in count_above(scores.cuda().split(999, dim=1), lists)] == expected


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
    counts = count_above(chunks, lists)  # 76 MiB of scores in chunks of 3.8 MiB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert chunks.read == 2 + 20  # up to the last labelled item, and all of them
    scores = np.concatenate([chunk.copy() for chunk in chunks], axis=1)
    for row, items, own in zip(scores, lists, counts, strict=True):
        assert own.tolist() == [(np.delete(row, items) >= row[item]).sum() for item in items]


@pytest.mark.parametrize('limit', [1, 7, 100])
def test_best_pairs(limit):
    scores = np.random.default_rng(limit).permutation(60).reshape(5, 12).astype(np.float32)
    rows, columns, values = best_pairs(torch.from_numpy(scores).split(4, dim=1), limit)
    wanted = np.argsort(-scores.ravel())[:limit]
    assert (rows * 12 + columns == wanted).all() and (values == scores.ravel()[wanted]).all()


@pytest.mark.parametrize('measure, arguments, message', [
    (mean_average_precision, (torch.tensor([[0., 1.], [torch.nan, 0.]]), [[0], [0]]), 'scores contain NaN'),
    (mean_average_precision, (np.zeros(3), [[0]]), r'shape \(3,\)'),
    (mean_average_precision, ([np.zeros((1, 3)), np.zeros((2, 3))], [[5]]), r'shape \(2, 3\) .* \(1, items\)'),
    (mean_average_precision, (iter([np.zeros((1, 3))]), [[0]]), 'scores are a generator, and are read twice'),
    (mean_average_precision, (np.zeros((1, 3)), [[0]], [[5]]), 'Item 5 is labelled, and there are 3'),
    (mean_average_precision, (np.zeros((1, 3)), [[-1]]), 'integers from 0'),
    (mean_average_precision, (np.zeros((2, 3)), [[0], []]), r'relevant\[1\] is empty'),
    (revisited_scores, (np.zeros((1, 4)), [RevisitedQuery([], [], [1])]), 'nothing to find'),
    (ukb_score, (np.zeros((5, 5)), [0, 0, 0, 0, 1]), r'groups need 4 images each, not 1: leave'),
    (micro_average_precision, (['a'], ['x'], [math.nan], [('a', 'x')]), 'one number is needed per pair'),
    (micro_average_precision, (['a'], ['x'], [1.], []), 'true_pairs is empty'),
    (best_pairs, ([np.array([[0., np.nan]])], 1), 'scores contain NaN'),
])
def test_bad_input(measure, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(*arguments)
