"""Places of labelled items against plain comparisons, for matrices and streams, every dtype, and odd levels."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.retrieval import counting, ranking
from timm_multigrain.retrieval.counting import count_reaching
from timm_multigrain.retrieval.ranking import Labelled, outranking
from timm_multigrain.retrieval.search import similarity_chunks


def slow(scores, items):
    """For each item, the number of other items than those that score at least as much."""
    others = np.delete(np.asarray(scores, dtype=object), items)
    return [sum(other >= scores[item] for other in others) for item in items]


@st.composite
def problems(draw):
    queries, items = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([1, 3, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    scores = rng.integers(0, levels, (queries, items)) / levels - 0.3
    special = rng.random(scores.shape) < draw(st.sampled_from([0, 0, 0.2]))
    scores[special] = rng.choice([np.inf, -np.inf, 1e300, -1e-300, 0., -0.], special.sum())
    lists = [rng.permutation(items)[:rng.integers(0, items + 1)] for _ in range(queries)]
    cuts = sorted(rng.integers(0, items + 1, draw(st.integers(0, 4))))
    return scores, lists, cuts


@pytest.mark.parametrize('few, piece', [(0, 7), (16, 7), (0, 1 << 17)])
@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_equals_comparing_all(few, piece, problem):
    scores, lists, cuts = problem
    labelled = Labelled.of([lists], ['wanted'])
    expected = [count for row, items in zip(scores, lists, strict=True) for count in slow(row, items)]
    pieces = np.split(scores, cuts, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, 'FEW_LEVELS', few)
        patch.setattr(counting, 'PIECE', piece)
        for given_scores in (scores, torch.from_numpy(scores), pieces, iter(pieces), np.asfortranarray(scores)):
            assert outranking(given_scores, labelled).tolist() == expected
        patch.setattr(ranking, 'HELD_BYTES', 0)
        assert outranking(pieces, labelled).tolist() == expected


@pytest.mark.parametrize('few', [0, 16])
@pytest.mark.parametrize('dtype', [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.int64, torch.bool])
def test_every_dtype(monkeypatch, dtype, few):
    monkeypatch.setattr(counting, 'FEW_LEVELS', few)
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(40, 12, (3, 500))).to(dtype)
    if dtype == torch.int64:
        scores += 2 ** 60  # float64 does not tell these apart
    lists = [rng.permutation(500)[:n] for n in (20, 0, 30)]
    exact = scores.numpy() if dtype == torch.int64 else scores.double().numpy()
    expected = [count for row, items in zip(exact, lists, strict=True) for count in slow(row, items)]
    labelled = Labelled.of([lists], ['wanted'])
    assert outranking(scores, labelled).tolist() == expected
    assert outranking(scores.split(77, dim=1), labelled).tolist() == expected


@pytest.mark.parametrize('levels', [
    [0., 0.], [-3e38, 3e38], [0., 1e-45], [-np.inf, 0., np.inf], [1., np.nextafter(np.float32(1), np.float32(2))]])
def test_levels_out_of_the_ordinary(monkeypatch, levels):
    monkeypatch.setattr(counting, 'FEW_LEVELS', 0)
    levels = np.array(levels, dtype=np.float32)
    neighbors = [np.nextafter(levels, np.float32(side)) for side in (np.inf, -np.inf)]
    scores = np.concatenate([levels, *neighbors, np.linspace(-2, 2, 300, dtype=np.float32)])[None]
    counts = count_reaching(scores, levels, np.zeros(len(levels), dtype=np.int64))
    assert counts.tolist() == [(scores >= level).sum() for level in levels]


@pytest.mark.slow
def test_many_scores():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 1_200_000), dtype=np.float32)
    rows = np.repeat([0, 1], 300)
    levels = np.sort(scores[:, :300], axis=1).ravel()
    expected = [(scores[row] >= level).sum() for row, level in zip(rows, levels, strict=True)]
    assert count_reaching(scores, levels, rows).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_on_a_gpu(dtype):
    scores = torch.randn(4, 3000).to(dtype)
    labelled = Labelled.of([[np.arange(40)] * 4], ['wanted'])
    assert (outranking(scores.cuda(), labelled) == outranking(scores, labelled)).all()
    scores[2, 7] = float('nan')
    with pytest.raises(ValueError, match=r'scores\[2\] holds NaN'):
        outranking(scores.cuda(), labelled)


def test_stream_is_read_once_if_labels_come_first():
    scores = np.random.default_rng(0).random((2, 100))
    labelled = Labelled.of([[[3, 1], [5]]], ['wanted'])
    assert (outranking(iter(np.split(scores, 10, axis=1)), labelled) == outranking(scores, labelled)).all()


def test_reused_buffer():
    scores = np.random.default_rng(0).random((2, 100))

    def pieces():
        buffer = np.empty((2, 10))
        for start in range(0, 100, 10):
            buffer[:] = scores[:, start:start + 10]
            yield buffer

    labelled = Labelled.of([[[3, 99], [5]]], ['wanted'])
    assert (outranking(pieces(), labelled) == outranking(scores, labelled)).all()


def test_label_too_far_into_a_generator(monkeypatch):
    monkeypatch.setattr(ranking, 'HELD_BYTES', 100)
    labelled = Labelled.of([[[19]]], ['wanted'])
    with pytest.raises(ValueError, match='Item 19 of the scores is labelled, too far'):
        outranking((np.zeros((1, 2)) for _ in range(30)), labelled)


def test_second_reading_differs(monkeypatch):
    monkeypatch.setattr(ranking, 'HELD_BYTES', 0)

    class Once:
        pieces = iter([np.zeros((1, 2))] * 3)

        def __iter__(self):
            return self.pieces

    with pytest.raises(ValueError, match='6 items when read first and 0 when read again'):
        outranking(Once(), Labelled.of([[[5]]], ['wanted']))


def test_similarities_stream():
    queries, database = torch.randn(3, 8), torch.randn(50, 8)
    labelled = Labelled.of([[[3, 49], [5], [0]]], ['wanted'])
    chunks = similarity_chunks(queries, database, chunk_size=50)
    assert (outranking(chunks, labelled) == outranking(queries @ database.T, labelled)).all()


@pytest.mark.parametrize('scores, message', [
    (np.zeros(3), r'shape .* got \(3,\)'),
    ([np.zeros((2, 3)), np.zeros((1, 3))], 'There are 2 rows of scores for 1 queries'),
    ([np.zeros((1, 3)), np.zeros((2, 3))], 'There are 2 rows of scores for 1 queries'),
    ([np.zeros((1, 3)), np.zeros((1, 3), np.float32)], 'float64 and float32: they must have one dtype'),
    ([[0., 1.]], r'got list'),
    (np.zeros((1, 0)), 'Query 0: index 1 is out of range for 0 items'),
    ([], 'Query 0: index 1 is out of range for 0 items'),
    (np.zeros((1, 4), complex), 'real numbers'),
    (np.full((1, 4), None), 'real numbers'),
    (np.array([[0., 1., 0., np.nan]]), r'scores\[0\] holds NaN'),
    (np.array([[0., np.nan, 0., 0.]]), r'scores\[0\] holds NaN'),
])
@pytest.mark.parametrize('few', [0, 16])
def test_bad_scores(monkeypatch, few, scores, message):
    monkeypatch.setattr(counting, 'FEW_LEVELS', few)
    with pytest.raises(ValueError, match=message):
        outranking(scores, Labelled.of([[[1, 0]]], ['wanted']))
