"""Local descriptors kept in an index: those that are computed without it, brought up to date, and checked."""
import os
import shutil

import numpy as np
import pytest

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.index import DamagedIndex, Index, build, build_index
from timm_multigrain.index.store import PCA
from timm_multigrain.search import local
from timm_multigrain.search.local import LocalDescriber, match_images, verified_score

from .pictures import noise
from .small_index import writer_of
from .test_index_build import picture
from .tiny import tiny_model

pytest.importorskip('cv2')
PROTOCOL = Protocol(size=64)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(local, 'DIM', 16)
    (tmp_path / 'pictures' / 'sub').mkdir(parents=True)
    for i in range(6):
        picture(i).save(tmp_path / 'pictures' / f'{i}.png')
    shutil.copy(tmp_path / 'pictures' / '5.png', tmp_path / 'pictures' / 'sub')  # the same file twice
    return tmp_path / 'pictures'


@pytest.fixture
def described(monkeypatch):
    """Names of the pictures whose details are computed."""
    names, details = [], LocalDescriber.describe

    def describe(self, source, indices=None):
        for name, found in zip(source.names, details(self, source, indices), strict=True):
            names.append(os.path.basename(name))
            yield found
    monkeypatch.setattr(LocalDescriber, 'describe', describe)
    return names


def make(pictures, **options):
    build_index([pictures], pictures.parent / 'index', tiny_model(), PROTOCOL, workers=0, progress=False, **options)
    return Index(pictures.parent / 'index')


def files_of(folder):
    return ImageFiles(sorted(map(str, folder.rglob('*.png'))))


def test_a_search_reads_them(pictures, described):
    source = files_of(pictures)
    describer = LocalDescriber(tiny_model(), PROTOCOL, workers=0).fit(ImageFiles(source.paths[:6]))  # each file once
    expected = dict(zip(source.names, describer.describe(source), strict=True))
    described.clear()
    index = make(pictures, local=True)
    assert len(described) == 6 == index.info['local']
    described.clear()
    query = str(pictures / '2.png')
    plain = index.search_images([query], 7)[0]
    for name in source.names:  # they are needed no more
        os.rename(name, name + '.away')
    os.rename(query + '.away', query)
    found = index.search_images([query], 7, local=5)[0]
    assert described == ['2.png']  # the query
    for hit in plain[:5]:
        verified, = (other for other in found if other.path == hit.path)
        match = match_images(expected[query], expected[hit.path])
        np.testing.assert_array_equal(verified.match.first, match.first)
        np.testing.assert_array_equal(verified.match.second, match.second)
    assert [hit.path for hit in found] == [hit.path for hit in sorted(
        plain[:5], key=lambda hit: -verified_score(hit.score, match_images(expected[query], expected[hit.path])))
        ] + [hit.path for hit in plain[5:]]


def test_updates(pictures, described, monkeypatch):
    monkeypatch.setattr(build, 'BATCH', 2)
    keep, added = build.Writer.set_details, []

    def until_killed(self, sha256, data):
        added.append(sha256)
        if len(added) == 5:  # details of what an image is now, not of what was indexed, are not kept
            picture(7).save(pictures / '4.png')
        if len(added) == 6:
            raise KeyboardInterrupt
        keep(self, sha256, data)

    monkeypatch.setattr(build.Writer, 'set_details', until_killed)
    with pytest.raises(KeyboardInterrupt):
        make(pictures, local=True)
    monkeypatch.setattr(build.Writer, 'set_details', keep)
    before = Index(pictures.parent / 'index').store
    assert len(before.local) == 1 + 4 and described == [f'{i}.png' for i in range(6)]
    described.clear()
    (pictures / '0.png').rename(pictures / 'sub' / 'moved.png')
    (pictures / '1.png').unlink()
    picture(8).save(pictures / '2.png')
    picture(9).save(pictures / 'new.png')
    kept = before.details(before.local)
    index = make(pictures)  # goes on by itself
    assert sorted(described) == ['2.png', '4.png', '5.png', 'new.png']
    assert len(index) == 7 and set(index.store.local) == {PCA, *(row.tobytes() for row in index.columns['sha256'])}
    again = index.store.details(index.store.local)
    left = {key: value for key, value in kept.items() if again.get(key) == value}
    assert len(kept) == 1 + 4 and len(left) == 1 + 2 and len(again) == 1 + 6
    assert before.details(before.local) == left  # of whoever has the index open meanwhile
    described.clear()
    make(pictures)
    assert not described
    shutil.move(pictures.parent / 'index', pictures.parent / 'elsewhere')
    assert Index(pictures.parent / 'elsewhere').store.details(again) == again


def test_without_them_they_are_computed(pictures, described, tmp_path):
    model = save_pretrained(tiny_model(), tmp_path / 'model')
    index, query = str(tmp_path / 'index'), str(pictures / '0.png')
    arguments = ['index', str(pictures), '-o', index, '--model', str(model), '--size', '64', '--workers', '0']
    assert main(arguments) == 0 and not described
    assert main(['search', index, query, '--local', '3']) == 0 and len(described) == 1 + 3
    described.clear()
    assert main([*arguments, '--local']) == 0 and len(described) == 6


def test_odd_ones_are_refused(pictures):
    """With the checksum that belongs to them, as anybody can write."""
    index = make(pictures, local=True)

    def put(key, data):
        with writer_of(index.path) as writer:
            writer.set_details(key, data)
            writer.commit()

    pca, picture = index.store.details()[PCA], index.columns['sha256'][0].tobytes()
    put(PCA, b'x' * 23)
    noise().save(pictures / 'new.png')  # an update does not go on with it either
    with pytest.raises(DamagedIndex, match='is damaged'):
        make(pictures)
    put(PCA, pca)
    for key, odd in ((PCA, b''), (PCA, b'x' * 23), (PCA, b'\xff' * 512), (PCA, pca * 2),
                     (picture, b'x' * 23), (picture, b'\xff' * 24), (picture, bytes(501 * 24)), (PCA, None)):
        original = index.store.details([key])[key]
        put(key, odd)
        with pytest.raises(DamagedIndex, match='is damaged'):
            Index(index.path).search_images([pictures / '0.png'], local=7)
        if odd is not None:
            put(key, original)


def test_a_trunk_without_maps_is_refused_before_the_work(pictures):
    model = tiny_model()
    model.feature_info = []
    with pytest.raises(ValueError, match='take another trunk'):
        build_index([pictures], pictures.parent / 'index', model, PROTOCOL, local=True, workers=0, progress=False)
    assert len(Index(pictures.parent / 'index')) == 0
