"""Exact search by chunks against the sorted matrix; expansion, augmentation and normalisation against loops."""
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from timm_multigrain.search.exact import SimilarityChunks, nearest
from timm_multigrain.search.rerank import alpha_query_expansion, database_augmentation, score_offsets


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


def test_chunks_are_the_matrix(integers):
    queries, database = integers
    chunks = SimilarityChunks(queries.numpy(), list(database.split(30)), chunk_size=8)
    for _ in range(2):
        assert torch.equal(torch.cat(list(chunks), 1), queries @ database.T)
    assert max(chunk.shape[1] for chunk in chunks) == 8
    large = SimilarityChunks(torch.randn(100, 8), torch.randn(200_000, 8))
    assert max(chunk.nbytes for chunk in large) <= 32 << 20


@pytest.mark.filterwarnings('error')
def test_memory_mapped_database(integers, tmp_path):
    queries, database = integers
    np.save(tmp_path / 'vectors.npy', database.numpy())
    mapped = np.load(tmp_path / 'vectors.npy', mmap_mode='r')
    assert torch.equal(nearest(queries, mapped, 3)[1], nearest(queries, database, 3)[1])


def test_bad_vectors(integers):
    queries, database = integers
    for arguments, message in (
            ((queries, database, 0), 'k is 0'), ((queries, database, 1, 0), 'chunk_size is 0'),
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
        result = alpha_query_expansion(queries, given, k, alpha, chunk_size=7)
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)


def test_a_query_is_not_its_own_neighbor(vectors):
    _, database = vectors
    rows = torch.tensor([3, 60, 7])
    database[8] = database[7]  # a duplicate is
    expected = torch.stack([slow_expansion(database[row], database, 4, 2., int(row)) for row in rows])
    result = alpha_query_expansion(database[rows], database, 4, 2., query_rows=rows)
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)
    # more equal vectors than neighbours asked for: the query's own row may not be among the nearest
    database[:6] = database[5].clone()
    result = alpha_query_expansion(database[5:6], database, 2, 1., query_rows=torch.tensor([5]))
    torch.testing.assert_close(result, database[5:6], atol=5e-6, rtol=0)


@pytest.mark.parametrize('k, batch_size', [(3, 10), (3, 1024), (100, 10)])
def test_database_augmentation(vectors, k, batch_size):
    _, database = vectors
    kept = database.clone()
    result = database_augmentation(database, k, 2., chunk_size=9, batch_size=batch_size)
    expected = torch.stack([slow_expansion(row, kept, k, 2., own) for own, row in enumerate(kept)])
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)
    assert torch.equal(database, kept)


@pytest.mark.parametrize('weight, first, last', [(1., 0, 2), (2., 9, 9)])
def test_score_normalisation(vectors, weight, first, last):
    queries, background = vectors
    offsets = score_offsets(queries, background, weight, first, last, chunk_size=10)
    for query, offset in zip(queries, offsets, strict=True):
        ranked = sorted((float(query @ row) for row in background), reverse=True)[first:last + 1]
        assert float(offset) == pytest.approx(-weight * sum(ranked) / len(ranked), abs=1e-6)
    chunks = SimilarityChunks(queries, background, 11, offsets)
    torch.testing.assert_close(torch.cat(list(chunks), 1), queries @ background.T + offsets[:, None],
                               atol=1e-6, rtol=0)


def test_bad_reranking(vectors):
    queries, database = vectors
    for arguments, message in (
            ((queries, database, 3, -1.), 'alpha is -1.0'), ((queries, iter([database]), 3), 'read twice'),
            ((queries, database, 3, 1., torch.tensor([1])), r'query_rows must have shape \(9,\)')):
        with pytest.raises(ValueError, match=message):
            alpha_query_expansion(*arguments)
    with pytest.raises(ValueError, match='0 <= first <= last'):
        score_offsets(queries, database, first=3, last=2)
    with pytest.raises(ValueError, match='has 61 vectors, and neighbour 61'):
        score_offsets(queries, database, first=0, last=61)
    with pytest.raises(ValueError, match='for 9 queries'):
        SimilarityChunks(queries, database, offsets=torch.zeros(1))
