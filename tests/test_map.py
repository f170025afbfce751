"""The map of a collection: neighbours stay neighbours, and the page shows a picture that is pointed at."""
import numpy as np
import pytest

from timm_multigrain.cli.main import main
from timm_multigrain.index import Index
from timm_multigrain.report import collection as collection_map

from .copies_folder import make_index, make_pictures

pytest.importorskip('sklearn')


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp('map') / 'pictures', 8)
    return make_index(folder, folder.parent / 'index')


def nearest(places, k):
    distances = ((places[:, None].astype(np.float64) - places) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return distances.argsort(axis=1)[:, :k]


@pytest.mark.parametrize('up_to, at_least', [(5000, 0.8), (10, 0.4)], ids=['t-SNE', 'PCA'])
def test_neighbours_stay_neighbours(monkeypatch, up_to, at_least):
    """Of six groups of 20, each around a place of its own; of what is nearest, a twelfth would be so by chance."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(6, 64)), 20, axis=0) + 0.4 * rng.normal(size=(120, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr(collection_map, 'TSNE_UP_TO', up_to)
    places = collection_map.map_layout(vectors)
    assert places.shape == (120, 2) and places.min(axis=0).tolist() == [0, 0] and places.max(axis=0).tolist() == [1, 1]
    kept = [len(set(a) & set(b)) / 5 for a, b in zip(nearest(places, 5), nearest(vectors, 20), strict=True)]
    assert np.mean(kept) > at_least
    assert np.array_equal(collection_map.map_layout(vectors), places)


def test_few_and_equal_pictures():
    rng = np.random.default_rng(0)
    for vectors in (rng.normal(size=(3, 8)), np.ones((5, 8))):
        places = collection_map.map_layout(vectors.astype(np.float32))
        assert np.isfinite(places).all() and places.min() >= 0 and places.max() <= 1
    with pytest.raises(ValueError, match='three pictures or more, not 2'):
        collection_map.map_layout(np.ones((2, 8), np.float32))


def test_command(index, tmp_path, capsys):
    assert main(['map', str(index.path), '-o', str(tmp_path / 'map.html'), '-n', '4']) == 0
    page = (tmp_path / 'map.html').read_text()
    assert '4 of 11 pictures' in page and page.count('class="dot ') == page.count('data:image') == 4
    assert 'map.html' in capsys.readouterr().err and 'car ' in page
    assert main(['map', str(index.path), '-o', str(tmp_path / 'map.html'), '-n', '2']) == 2


@pytest.mark.slow
@pytest.mark.parametrize('width', [1400, 390])
def test_what_is_pointed_at_is_seen(index, tmp_path, width):
    from .browser import BROWSER, browsing
    if not BROWSER:
        pytest.skip('Chromium is not installed')
    path = collection_map.write_map(tmp_path / 'map.html', Index(index.path))

    def seen():
        return [i for i, figure in enumerate(page.all('.dot + figure')) if figure.is_displayed()]

    with browsing(tmp_path, width) as page:
        page.driver.get(path.as_uri())
        assert not seen()
        if width > 500:  # a finger does not point
            page.act('.dot', 3).perform()
            page.wait(lambda: seen() == [3])
            small = page.find('.dot + figure', 3).rect
            page.press('\ue004')  # Tab
            page.act('h1').perform()
            page.run('document.querySelectorAll(".dot")[5].focus({focusVisible: true})')
            page.wait(lambda: seen() == [5])
        page.click('.dot', 3)
        page.wait(lambda: index.path_of(3) in page.text('figure:popover-open'))
        large = page.find('figure:popover-open').rect
        assert large['x'] >= 0 and large['x'] + large['width'] <= width and large['width'] > 300
        assert page.run('return document.querySelectorAll(".dot + figure img")[3].naturalWidth') == 96
        assert width < 500 or large['width'] > 2 * small['width']
        page.screenshot('map')
        page.check(path.as_uri())
