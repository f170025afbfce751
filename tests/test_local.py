"""Local descriptors against loops over the map, matching against loops over pairs, and what becomes of a ranking."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.search import local
from timm_multigrain.search.exact import SimilarityChunks
from timm_multigrain.search.local import LocalDescriber, LocalFeatures, VerifiedChunks, draw_matches, match_images

from .tiny import tiny_model

pytest.importorskip('cv2')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Two pictures of blocks, 96 x 64 pixels, and a file that is not a picture."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for name in 'ab':
        Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)).save(
            root / f'{name}.png')
    (root / 'c.png').write_bytes(b'nothing')
    return ImageFiles([root / f'{name}.png' for name in 'abc'])


def features(seed: int = 0, n: int = 60) -> LocalFeatures:
    """Random details of a picture of 300 x 200 pixels."""
    rng = np.random.default_rng(seed)
    return LocalFeatures(rng.integers(-60, 61, (n, 32), dtype=np.int8),
                         (rng.random((n, 2)) * [300, 200]).astype(np.float32), (300, 200))


def test_descriptors_are_those_of_the_map_of_stride_16(pictures, monkeypatch):
    monkeypatch.setattr(local, 'NUMBER', 20)
    monkeypatch.setattr(local, 'DIM', 8)
    model = tiny_model()
    describer = LocalDescriber(model, Protocol(size=64, kind='crop'), workers=0)
    found = list(describer.fit(pictures).describe(pictures, [1, 2]))
    vectors, places = [], []
    for side in (128, 90, 64):  # twice the size, 1.4 times, once
        whole = Protocol(size=128, kind='longer-side').transform(pictures.load(1))[None]
        if side != 128:
            whole = torch.nn.functional.interpolate(whole, scale_factor={90: 0.7071, 64: 0.5}[side], mode='bilinear')
        with torch.no_grad():
            maps = model.trunk.forward_intermediates(whole, intermediates_only=True)[3][0]
        assert maps.shape[1:] == ((side * 2 // 3 + 15) // 16, (side + 15) // 16)
        for y in range(maps.shape[1]):
            for x in range(maps.shape[2]):
                vectors.append(maps[:, y, x])
                places.append(((x + 0.5) / maps.shape[2] * 96, (y + 0.5) / maps.shape[1] * 64))
    order = sorted(range(len(vectors)), key=lambda i: -float(vectors[i].norm()))[:20]
    np.testing.assert_allclose(found[0].points, [places[i] for i in order], rtol=1e-5)
    unit = torch.stack([vectors[i] / vectors[i].norm() for i in order])
    reduced = (unit - describer.mean) @ describer.basis
    expected = 254 * reduced / reduced.norm(dim=1, keepdim=True)
    assert found[0].vectors.dtype == np.int8 and found[0].vectors.shape == (20, 8) and found[0].size == (96, 64)
    np.testing.assert_allclose(found[0].vectors, expected.clamp(-127, 127), atol=0.51)
    assert len(found[0].to_bytes()) == 20 * (8 + 8)
    assert len(found[1].vectors) == 0 and len(match_images(*found)) == 0 and len(match_images(*found[::-1])) == 0


def test_the_pca_is_that_of_the_collection(pictures, monkeypatch):
    monkeypatch.setattr(local, 'DIM', 8)
    describer = LocalDescriber(tiny_model(), Protocol(size=64), workers=0).fit(pictures)
    rows = np.concatenate([found[0].numpy() for _, found in describer._read(pictures, range(3), '') if found])
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    np.testing.assert_allclose(np.abs(vectors[:, ::-1][:, :8].T @ describer.basis.numpy()), np.eye(8), atol=1e-3)
    with pytest.raises(ValueError, match='No picture can be read'):
        describer.fit(ImageFiles(pictures.paths[2:]))


def test_matches_are_mutual_and_agree_on_a_transform(monkeypatch):
    first, other = features(0), features(1, 40)
    turn = np.array([[0.6, -0.3], [0.3, 0.6]])
    moved = (first.points[:30] @ turn.T + [50, 20]).astype(np.float32)
    moved[:6] += 80  # the same details elsewhere
    second = LocalFeatures(np.concatenate([first.vectors[:30], other.vectors]),
                           np.concatenate([moved, other.points]), (300, 200))
    match = match_images(first, second)
    kept = {tuple(point) for point in match.first.tolist()}
    assert {tuple(point) for point in first.points[6:30].tolist()} <= kept and len(kept) == len(match) < 30
    assert not kept & {tuple(point) for point in first.points[:6].tolist()}
    np.testing.assert_allclose(match.matrix, np.column_stack([turn, [50, 20]]), atol=0.02 * 300)
    np.testing.assert_allclose(match.first @ match.matrix[:, :2].T + match.matrix[:, 2], match.second, atol=0.03 * 300)
    monkeypatch.setattr(local, 'TOLERANCE', 100)
    everything = match_images(first, second)
    products = first.vectors.astype(int) @ second.vectors.T.astype(int)
    mutual = [(i, j) for i in range(60) for j in range(70)
              if products[i, j] == products[i].max() == products[:, j].max()]
    np.testing.assert_array_equal(everything.first, first.points[[i for i, _ in mutual]])
    np.testing.assert_array_equal(everything.second, second.points[[j for _, j in mutual]])
    assert match_images(first, features(2, 1)).matrix is None


def test_verified_chunks():
    generator, everything = torch.Generator().manual_seed(0), [features(i) for i in range(30)]
    everything[7] = everything[3]
    vectors = torch.nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=1)
    vectors[7] = -vectors[3]
    vectors[8], asked = vectors[3], []
    chunks = SimilarityChunks(vectors[3:5], vectors, chunk_size=7)

    def describe(rows):
        asked.extend(rows)
        return (everything[row] for row in rows)

    scores = torch.cat(list(VerifiedChunks(chunks, everything[3:5], describe, top=10)), 1)
    plain = vectors[3:5] @ vectors.T
    for query in (0, 1):
        first = plain[query].argsort(descending=True, stable=True)[:10].tolist()
        for row in range(30):
            count = len(match_images(everything[3 + query], everything[row])) if row in first else 0
            assert scores[query, row] == pytest.approx(float(plain[query, row]) + min(count, 50) / 50, abs=1e-6)
            assert row not in first or row in asked
    assert 0 < scores[0, 8] < scores[0, 3] == 2 and 7 not in asked
    scores = torch.cat(list(VerifiedChunks(chunks, everything[3:5], describe, top=30)), 1)
    assert scores[0, 7] == pytest.approx(0, abs=1e-6) and sorted(set(asked)) == list(range(30))


def test_drawing():
    points = np.array([[0, 0], [30, 20]], dtype=np.float32)
    drawn = draw_matches(Image.new('RGB', (30, 20), 'blue'), Image.new('RGB', (10, 20), 'red'),
                         local.Match(points, points[::-1] / [3, 1]), side=60)
    assert drawn.size == (120, 60)
    assert [drawn.getpixel(place) for place in ((30, 15), (90, 5), (30, 3), (62, 30))] == [
        (0, 0, 255), (255, 0, 0), (255, 255, 255), (255, 255, 255)]
    assert drawn.getpixel((21, 20)) == (224, 112, 26)  # from the upper left corner to the lower right one of the other
    draw_matches(Image.new('L', (30, 20)), Image.new('L', (1, 400)), local.Match(points[:0], points[:0]))
    wide = draw_matches(Image.new('L', (30, 20)), Image.new('L', (30, 10)), local.Match(points, points))
    assert wide.size == (800, 267)
    far = draw_matches(Image.new('L', (30, 20)), Image.new('L', (30, 10)), local.Match(points, 1e9 * points))
    assert far.size == (800, 267)  # at once: what an index says of a picture's size may be wrong


def test_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    with pytest.raises(ImportError, match=r"pip install 'timm_multigrain\[local\]'"):
        match_images(features(), features())
    model = tiny_model()
    model.feature_info = []
    with pytest.raises(ValueError, match="'test_resnet': take another trunk"):
        LocalDescriber(model, Protocol(size=64))
