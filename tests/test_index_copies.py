"""Pairs of similar descriptors against plain loops; groups without chains; thresholds of a collection; edits."""
import numpy as np
import pytest
from PIL import Image

from timm_multigrain.demo.pictures import draw_picture
from timm_multigrain.images.copies import EDITS
from timm_multigrain.index import pairs as pairs_module
from timm_multigrain.index.detail import Picture, compare
from timm_multigrain.index.pairs import NearPairs, find_thresholds, near_pairs, star_groups


def clustered(count=400, dim=24, seed=0):
    """Unit rows, some of them close together, some equal."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim)) + 2 * rng.standard_normal((8, dim))[rng.integers(8, size=count)]
    rows[50:100] = rows[:50] + 0.3 * rng.standard_normal((50, dim))
    rows[100:105] = rows[0]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs_by_loops(vectors, threshold, rows=None):
    rows = range(len(vectors)) if rows is None else rows
    scores = np.asarray(vectors, dtype=np.float64) @ np.asarray(vectors, dtype=np.float64).T
    return {(i, j) for i in rows for j in rows if i < j and scores[i, j] >= threshold}


def as_set(pairs):
    assert (pairs.first < pairs.second).all()
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert found == sorted(set(found))
    return set(found)


@pytest.mark.parametrize('threshold, dtype', [(0.5, 'float32'), (0.8, 'float16')])
def test_pairs_are_those_of_loops(threshold, dtype, monkeypatch):
    monkeypatch.setattr(pairs_module, 'CHUNK', 64)
    vectors = clustered().astype(dtype)
    for rows in (None, np.arange(3, 400, 2)):
        expected = pairs_by_loops(vectors, threshold, rows)
        for in_cells_from in (65_536, 0):
            monkeypatch.setattr(pairs_module, 'EXHAUSTIVE_UP_TO', in_cells_from)
            monkeypatch.setattr(pairs_module, 'PROBES', 1000)
            pairs = near_pairs(vectors, threshold, rows)
            assert as_set(pairs) == expected and pairs.complete
    exact = (vectors[pairs.first].astype(np.float64) * vectors[pairs.second].astype(np.float64)).sum(1)
    assert np.abs(pairs.scores - exact).max(initial=0) < 1e-5
    monkeypatch.setattr(pairs_module, 'PROBES', 1)
    few = near_pairs(vectors, 0.3)
    assert as_set(few) < pairs_by_loops(vectors, 0.3) and not few.complete


@pytest.mark.parametrize('prune_at', [10, 50_000_000])
def test_pairs_of_the_nearest_are_those_of_loops(prune_at, monkeypatch):
    monkeypatch.setattr(pairs_module, 'CHUNK', 64)
    monkeypatch.setattr(pairs_module, 'MAX_PAIRS', max(prune_at * 1000, 10_000))
    vectors = clustered()[:150]
    scores, expected = vectors.astype(np.float64) @ vectors.T.astype(np.float64), set()
    for i, row in enumerate(scores):
        best = [j for j in np.argsort(-row) if j != i][:3]
        expected |= {(min(i, j), max(i, j)) for j in best if row[j] >= 0.6}
    distinct = [pair for pair in expected if not {*pair} & {0, *range(100, 105)}]  # equal rows: any of them will do
    found = as_set(near_pairs(vectors, 0.6, neighbours=3))
    assert set(distinct) <= found and len(found) <= len(expected) + 3


def test_too_many_pairs_and_none(monkeypatch):
    monkeypatch.setattr(pairs_module, 'MAX_PAIRS', 100)
    with pytest.raises(ValueError, match=r'More than 100 pairs .* raise the threshold'):
        near_pairs(clustered(), -0.9)
    assert len(near_pairs(np.empty((0, 4), np.float32), 0.5).first) == 0
    assert len(near_pairs(np.ones((1, 1), np.float32), 0.5).first) == 0


def test_stars_do_not_chain_are_near_their_centres_and_as_large_as_can_be():
    # a chain of ten rows, each a pair with the next one only
    chain = NearPairs(np.arange(9), np.arange(1, 10), np.full(9, 0.9, np.float32))
    groups = [rows.tolist() for rows in star_groups(chain, np.arange(10))]
    assert max(map(len, groups)) == 3 and len({row for rows in groups for row in rows}) == sum(map(len, groups))
    vectors, threshold = clustered(), 0.7
    pairs, order = near_pairs(vectors, threshold), np.random.default_rng(1).permutation(400)
    joined = as_set(pairs)
    groups, taken = star_groups(pairs, order), set()
    for rows in groups:
        centre, *others = rows.tolist()
        assert others and all((min(centre, i), max(centre, i)) in joined for i in others)
        assert not taken & set(rows.tolist())
        taken |= set(rows.tolist())
    assert not [(i, j) for i, j in joined if i not in taken and j not in taken]
    # another order of the same rows gives the same groups
    shuffle = np.random.default_rng(2).permutation(400)
    again = star_groups(near_pairs(vectors[shuffle], threshold), order[shuffle])
    assert [set(rows.tolist()) for rows in groups] == [set(shuffle[rows].tolist()) for rows in again]


def test_thresholds_leave_the_share_of_false_pairs():
    vectors = np.delete(clustered(1005, dim=16), np.arange(100, 105), axis=0)  # no equal rows
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(scores, -2)
    nearest = scores.max(1)
    for share in (0.002, 0.05, 0.5):
        found = find_thresholds(vectors, np.arange(1000), share)
        assert int((nearest >= found.certain - 1e-7).sum()) <= 1000 * share + 2  # both of a pair pass at once
        assert int((nearest >= found.certain - 1e-4).sum()) >= 1000 * share - 2
    assert found.possible == pytest.approx(np.quantile(nearest, 0.05), abs=1e-6)
    assert find_thresholds(vectors, np.arange(2), 0.01) == pairs_module.DEFAULT
    assert find_thresholds(vectors, np.arange(1000), 0).certain > nearest.max() - 1e-6
    for share in (1, -1):
        with pytest.raises(ValueError, match='share from 0 to below 1'):
            find_thresholds(vectors, np.arange(9), share)


def test_what_becomes_of_edits():
    """A copy by any edit looks the same, which is named; a picture of something else does not."""
    picture = draw_picture('tree', 200, np.random.default_rng(3)).convert('RGB')
    other = draw_picture('fish', 200, np.random.default_rng(4)).convert('RGB')
    words = {'crop': 'cropped to', 'rotate': 'turned by', 'grey': 'grey', 'mirror': 'mirrored', 'screenshot': 'inset',
             'bright': 'other colours'}
    for name, edit in EDITS.items():
        if name in ('strong', 'text'):  # which leave too little of a drawing
            continue
        kind, copy = name.split()[0], edit(picture)
        found = compare(Picture(picture), Picture(copy))
        assert found.alike and not compare(Picture(other), Picture(copy)).alike, name
        assert kind not in words or any(words[kind] in edit for edit in found.edits), (name, found)
    shots = [Picture(EDITS['screenshot'](it)) for it in (picture, other)]
    assert not compare(*shots).alike  # though most of a page is like most of another
    assert not compare(Picture(Image.new('RGB', (50, 40), 'red')), Picture(picture)).alike
