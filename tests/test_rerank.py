"""Query expansion, database-side augmentation and score normalisation against loops over single vectors."""
import math

import pytest
import torch
from torch.nn.functional import normalize

from timm_multigrain.search.exact import similarity_chunks
from timm_multigrain.search.rerank import (
    alpha_query_expansion,
    database_augmentation,
    normalize_scores,
    score_offsets,
)


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    queries, database = (normalize(torch.randn(n, 12, generator=generator), dim=1) for n in (9, 61))
    return queries, database


def slow_expansion(query, database, k, alpha, own=None):
    candidates = [i for i in range(len(database)) if i != own]
    similarity = [math.fsum((query.double() * row.double()).tolist()) for row in database]
    nearest = sorted(candidates, key=lambda i: -similarity[i])[:k]
    total = query.double()
    for i in nearest:
        if similarity[i] > 0:
            total = total + similarity[i] ** alpha * database[i].double()
    return (total / total.norm()).float()


@pytest.mark.parametrize('k, alpha', [(1, 0.), (5, 3.), (7, 1.5), (100, 3.)])
def test_query_expansion(vectors, k, alpha):
    queries, database = vectors
    expected = torch.stack([slow_expansion(query, database, k, alpha) for query in queries])
    for given in (database, database.numpy(), list(database.split(13))):
        result = alpha_query_expansion(queries, given, k, alpha, chunk_size=7)
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)


def test_query_is_no_neighbor_of_itself(vectors):
    _, database = vectors
    rows = torch.tensor([3, 60, 7])
    database[8] = database[7]  # a duplicate is
    expected = torch.stack([slow_expansion(database[row], database, 4, 2., int(row)) for row in rows])
    result = alpha_query_expansion(database[rows], database, 4, 2., query_rows=rows)
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)


def test_itself_hidden_behind_duplicates(vectors):
    """More equal vectors than neighbours asked for: the query's own row may not be among the nearest."""
    _, database = vectors
    database[:6] = database[5].clone()
    result = alpha_query_expansion(database[5:6], database, 2, 1., query_rows=torch.tensor([5]))
    torch.testing.assert_close(result, database[5:6], atol=5e-6, rtol=0)


@pytest.mark.parametrize('k, batch_size', [(3, 1), (3, 10), (3, 1024), (60, 10), (100, 10)])
def test_database_augmentation(vectors, k, batch_size):
    _, database = vectors
    kept = database.clone()
    result = database_augmentation(database, k, 2., chunk_size=9, batch_size=batch_size)
    expected = torch.stack([slow_expansion(row, kept, k, 2., own) for own, row in enumerate(kept)])
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=0)
    assert torch.equal(database, kept)


@pytest.mark.parametrize('weight, first, last', [(1., 0, 2), (2., 9, 9), (0.5, 0, 0)])
def test_score_normalisation(vectors, weight, first, last):
    queries, background = vectors
    offsets = score_offsets(queries, background, weight, first, last, chunk_size=10)
    for query, offset in zip(queries, offsets, strict=True):
        ranked = sorted((float(query @ row) for row in background), reverse=True)[first:last + 1]
        assert float(offset) == pytest.approx(-weight * sum(ranked) / len(ranked), abs=1e-6)
    assert torch.equal(score_offsets(queries, iter(background.split(20)), weight, first, last, 10), offsets)
    scores = queries @ background.T
    shifted = normalize_scores(scores, offsets)
    assert torch.equal(shifted, scores + offsets[:, None])
    pieces = normalize_scores(similarity_chunks(queries, background, 11), offsets)
    for _ in range(2):
        torch.testing.assert_close(torch.cat(list(pieces), 1), shifted, atol=1e-6, rtol=0)


def test_bad_input(vectors):
    queries, database = vectors
    for arguments, message in (
            ((queries, database, 0), 'k is 0'),
            ((queries, database, 3, -1.), 'alpha is -1.0'),
            ((queries, database, 3, float('nan')), 'alpha is nan'),
            ((queries, iter([database]), 3), 'read twice'),
            ((queries, database[:, :5], 3), r'\(vectors, 12\)'),
            ((queries, database[:0], 3), 'empty'),
            ((queries, database, 3, 1., torch.tensor([1])), r'query_rows must have shape \(9,\)'),
    ):
        with pytest.raises(ValueError, match=message):
            alpha_query_expansion(*arguments)
    with pytest.raises(ValueError, match='0 <= first <= last'):
        score_offsets(queries, database, first=3, last=2)
    with pytest.raises(ValueError, match='has 61 vectors, and neighbour 61'):
        score_offsets(queries, database, first=0, last=61)
    with pytest.raises(ValueError, match='for 9 rows'):
        normalize_scores(torch.zeros(9, 3), torch.zeros(1))
