"""Exact search by chunks against the sorted matrix; expansion, augmentation and normalisation against loops."""
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from timm_multigrain.search import rerank
from timm_multigrain.search.exact import SimilarityChunks, nearest
from timm_multigrain.search.rerank import (
    Background,
    RerankedChunks,
    alpha_query_expansion,
    database_augmentation,
    rerank_candidates,
    score_offsets,
)


@pytest.fixture
def integers():
    """Small integers, so that similarities are exact in any order of summation, and often tied."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-2, 3, (n, 6), generator=generator).float() for n in (5, 97))


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return tuple(normalize(torch.randn(n, 12, generator=generator), dim=1) for n in (9, 61))


@pytest.mark.parametrize('k, chunk_size', [(1, 1), (10, 7), (97, None), (500, 7), (10, None)])
def test_nearest_equals_a_stable_sort(integers, k, chunk_size):
    queries, database = integers
    expected = (queries @ database.T).sort(dim=1, descending=True, stable=True)
    for given in (database, database.numpy(), database.half(), list(database.split(13)), iter(database.split(40))):
        scores, indices = nearest(queries, given, k, chunk_size)
        assert torch.equal(scores, expected.values[:, :k])
        assert torch.equal(indices, expected.indices[:, :k])
    assert indices.dtype == torch.int64


@pytest.mark.filterwarnings('error')
def test_memory_mapped_database(integers, tmp_path):
    queries, database = integers
    np.save(tmp_path / 'vectors.npy', database.numpy())
    mapped = np.load(tmp_path / 'vectors.npy', mmap_mode='r')
    assert torch.equal(nearest(queries, mapped, 3)[1], nearest(queries, database, 3)[1])


def test_bad_vectors(integers):
    queries, database = integers
    for arguments, message in (
            ((queries, database, 0), 'k is 0'),
            ((queries[0], database, 1), r'queries must have shape \(vectors, dimensions\), got \(6,\)'),
            ((queries, database[:, :3], 1), r'database must have shape \(vectors, 6\), .* got \(97, 3\)'),
            ((queries, database[:0], 1), 'database is empty'),
            ((queries, torch.full((2, 6), math.nan), 1), 'NaN')):
        with pytest.raises(ValueError, match=message):
            nearest(*arguments)
    once = SimilarityChunks(queries, iter([database]))
    list(once)
    with pytest.raises(ValueError, match='read already'):
        list(once)


def slow_expansion(query, database, k, alpha, own=None):
    candidates = [i for i in range(len(database)) if i != own]
    similarity = [math.fsum((query.double() * row.double()).tolist()) for row in database]
    total = query.double()
    for i in sorted(candidates, key=lambda i: -similarity[i])[:k]:
        if similarity[i] > 0:
            total = total + similarity[i] ** alpha * database[i].double()
    return (total / total.norm()).float()


@pytest.mark.parametrize('k, alpha', [(1, 0.), (5, 3.), (100, 1.5)])
def test_query_expansion(vectors, k, alpha):
    queries, database = vectors
    expected = torch.stack([slow_expansion(query, database, k, alpha) for query in queries])
    for given in (database, database.numpy(), list(database.split(13))):
        result = alpha_query_expansion(queries, given, k, alpha)
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)


def test_a_query_is_not_its_own_neighbor(vectors):
    """More equal vectors than neighbours asked for: the query's own row may not be among the nearest."""
    _, database = vectors
    database[:6] = database[5].clone()
    result = alpha_query_expansion(database[5:6], database, 2, 1., query_rows=torch.tensor([5]))
    torch.testing.assert_close(result, database[5:6], atol=5e-6, rtol=0)


@pytest.mark.parametrize('k, at_a_time', [(3, 10), (3, 1024), (100, 10)])
def test_database_augmentation(vectors, monkeypatch, k, at_a_time):
    monkeypatch.setattr(rerank, 'AUGMENTED', at_a_time)
    _, database = vectors
    database[8] = database[7]  # a duplicate is a neighbour
    kept = database.clone()
    result = database_augmentation(database, k, 2.)
    expected = torch.stack([slow_expansion(row, kept, k, 2., own) for own, row in enumerate(kept)])
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)
    assert torch.equal(database, kept)


def slow_background(vectors):
    mean = vectors.mean(0)
    about = vectors - mean
    cosines = [float(cosine(a, b)) for i, a in enumerate(about) for j, b in enumerate(about) if i != j]
    return mean, math.sqrt(sum(value ** 2 for value in cosines) / len(cosines))


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def slow_rerank(query, candidates, mean, spread, k):
    """By loops over pairs of vectors, in float64."""
    about = [normalize(x - mean, dim=0) for x in candidates]

    def refined(vector, others):
        similar = sorted(((float(vector @ other), other) for other in others), key=lambda pair: -pair[0])[:k]
        return normalize(vector + sum(max(0, (c - spread) / (1 - spread)) * other for c, other in similar), dim=0)

    better = [refined(x, [y for j, y in enumerate(about) if j != i]) for i, x in enumerate(about)]
    expanded = refined(normalize(query - mean, dim=0), better)
    expanded = mean + (query - mean).norm() * expanded
    return [float(cosine(expanded, mean + (x - mean).norm() * y)) for x, y in zip(candidates, better, strict=True)]


def groups_of(number, size, noise, seed=0, dim=16):
    """Vectors in groups around centres that have a mean in common."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(number, 1, dim, generator=generator) + 2
    return normalize(centres + noise * torch.randn(number, size, dim, generator=generator), dim=2).flatten(0, 1)


@pytest.mark.parametrize('k', ['auto', 1, 7, 100])
def test_reranking(k):
    vectors = groups_of(15, 2, noise=0.3)
    query, candidates = vectors[0], vectors[1:]
    background = Background.of(vectors)
    mean, spread = slow_background(vectors.double())
    torch.testing.assert_close(background.mean, mean.float())
    assert background.spread == pytest.approx(spread, abs=1e-5)
    scores, agreement = rerank_candidates(query, candidates, background, k)
    assert 0.5 < agreement <= 1
    expected = slow_rerank(query.double(), candidates.double(), mean, spread, min(3 if k == 'auto' else k, 28))
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_reranking_is_left_out_where_neighbours_are_chance():
    """By half of the channels the nearest image is another one than by the other half."""
    vectors = groups_of(40, 1, noise=0.)
    query, candidates, background = vectors[0], vectors[1:], Background.of(vectors)
    about = [normalize(x[half] - background.mean[half], dim=0) for half in (slice(0, None, 2), slice(1, None, 2))
             for x in candidates]
    nearest_of = [max((j for j in range(39) if j != i), key=lambda j, i=i, part=part: float(part[i] @ part[j]))
                  for part in (about[:39], about[39:]) for i in range(39)]
    same = sum(a == b for a, b in zip(nearest_of[:39], nearest_of[39:], strict=True)) / 39
    scores, agreement = rerank_candidates(query, candidates, background)
    assert agreement == pytest.approx(same) and same < 0.5
    assert torch.equal(scores, candidates @ query)
    assert not torch.allclose(rerank_candidates(query, candidates, background, 3)[0], scores, atol=1e-3)
    assert '0 of 1 query;' in rerank.chosen([agreement], 'auto') and '1 of 1' in rerank.chosen([agreement], 3)


def test_reranked_chunks(monkeypatch):
    """The first images re-ranked, the query, where it is one of them, left out, and all others behind."""
    monkeypatch.setattr(rerank, 'TOP', 12)
    database = groups_of(23, 2, noise=0.3)
    rows = torch.tensor([3, 40])
    for given in (database, list(database.split(7))):
        for own in (rows, None):
            chunks = RerankedChunks(database[rows], given, own)
            result = torch.cat(list(chunks), 1)
            assert torch.equal(result, torch.cat(list(chunks), 1)) and len(chunks.agreements) == 2
            for row, query in zip(result, rows, strict=True):
                plain = database @ database[query]
                order = [i for i in plain.argsort(descending=True, stable=True).tolist() if own is None or i != query]
                scores, _ = rerank_candidates(database[query], database[order[:12]], Background.of(database))
                torch.testing.assert_close(row[order[:12]], scores, atol=1e-6, rtol=0)
                torch.testing.assert_close(row[order[12:]], plain[order[12:]] - 3, atol=1e-6, rtol=0)
                assert own is None or row[query] == pytest.approx(1, abs=1e-5)
    moved = torch.cat(list(RerankedChunks(database[rows], database, offsets=torch.tensor([.5, -.5]))), 1)
    torch.testing.assert_close(moved - result, torch.tensor([[.5], [-.5]]).expand_as(result), atol=1e-5, rtol=0)


def test_reranking_of_few_and_of_equal_images():
    vectors = groups_of(1, 3, noise=0.5)
    background = Background.of(vectors)
    for number in (0, 1, 2):
        scores, _ = rerank_candidates(vectors[2], vectors[:number], background)
        assert scores.shape == (number,) and scores.isfinite().all()
    same = vectors[:1].repeat(4, 1)
    scores, _ = rerank_candidates(same[0], same[1:], Background.of(same), 2)
    torch.testing.assert_close(scores, torch.ones(3), atol=1e-5, rtol=0)
    assert Background.of(vectors[:1]).spread == 0
    with pytest.raises(ValueError, match='rerank=0: give a number of neighbours'):
        rerank_candidates(vectors[0], vectors, background, 0)


@pytest.mark.parametrize('weight, first, last', [(1., 0, 2), (2., 9, 9)])
def test_score_normalisation(vectors, weight, first, last):
    queries, background = vectors
    offsets = score_offsets(queries, background, weight, first, last)
    for query, offset in zip(queries, offsets, strict=True):
        ranked = sorted((float(query @ row) for row in background), reverse=True)[first:last + 1]
        assert float(offset) == pytest.approx(-weight * sum(ranked) / len(ranked), abs=1e-6)
    chunks = SimilarityChunks(queries, background, 11, offsets)
    torch.testing.assert_close(torch.cat(list(chunks), 1), queries @ background.T + offsets[:, None],
                               atol=1e-6, rtol=0)


def test_bad_reranking(vectors):
    queries, database = vectors
    for arguments, message in (
            ((queries, database, 3, -1.), 'alpha is -1.0'), ((queries, database, 0), 'k is 0'),
            ((queries, iter([database]), 3), 'read twice')):
        with pytest.raises(ValueError, match=message):
            alpha_query_expansion(*arguments)
    with pytest.raises(ValueError, match='has 61 vectors, and neighbour 61'):
        score_offsets(queries, database, first=0, last=61)
