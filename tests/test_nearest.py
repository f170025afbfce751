"""Exact search in pieces against sorting the whole matrix of similarities."""
import numpy as np
import pytest
import torch

from timm_multigrain.search.exact import nearest, similarity_chunks


@pytest.fixture
def vectors():
    """Small integers, so that similarities are exact in any order of summation, and often tied."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-2, 3, (n, 6), generator=generator).float() for n in (5, 97))


@pytest.mark.parametrize('k', [1, 10, 97, 500])
@pytest.mark.parametrize('chunk_size', [1, 7, 97, None])
def test_equals_stable_sort(vectors, k, chunk_size):
    queries, database = vectors
    expected = (queries @ database.T).sort(dim=1, descending=True, stable=True)
    for given in (database, database.numpy(), database.half(), list(database.split(13)), iter(database.split(40))):
        scores, indices = nearest(queries, given, k, chunk_size)
        assert torch.equal(scores, expected.values[:, :k])
        assert torch.equal(indices, expected.indices[:, :k])
    assert indices.dtype == torch.int64


def test_chunks_are_the_matrix(vectors):
    queries, database = vectors
    chunks = similarity_chunks(queries.numpy(), list(database.split(30)), chunk_size=8)
    pieces = list(chunks)
    assert torch.equal(torch.cat(pieces, 1), queries @ database.T)
    assert max(piece.shape[1] for piece in pieces) == 8
    assert len(list(chunks)) == len(pieces)


def test_pieces_of_one_size_stay_small():
    chunks = similarity_chunks(torch.randn(100, 8), torch.randn(200_000, 8))
    assert max(piece.nbytes for piece in chunks) <= 32 << 20


@pytest.mark.filterwarnings('error')
def test_memory_mapped_database(vectors, tmp_path):
    queries, database = vectors
    np.save(tmp_path / 'vectors.npy', database.numpy())
    mapped = np.load(tmp_path / 'vectors.npy', mmap_mode='r')
    assert torch.equal(nearest(queries, mapped, 3)[1], nearest(queries, database, 3)[1])


def test_bad_input(vectors):
    queries, database = vectors
    with pytest.raises(ValueError, match='k is 0'):
        nearest(queries, database, 0)
    with pytest.raises(ValueError, match='chunk_size is 0'):
        nearest(queries, database, 1, 0)
    with pytest.raises(ValueError, match=r'queries must have shape \(vectors, dimensions\), got \(6,\)'):
        nearest(queries[0], database, 1)
    with pytest.raises(ValueError, match=r'database must have shape \(vectors, 6\), .* got \(97, 3\)'):
        nearest(queries, database[:, :3], 1)
    with pytest.raises(ValueError, match='database is empty'):
        nearest(queries, database[:0], 1)
    database[3, 2] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        nearest(queries, database, 1)
    once = similarity_chunks(queries, iter([database]))
    list(once)
    with pytest.raises(ValueError, match='read already'):
        list(once)
