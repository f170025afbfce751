"""Images of one set that are copies of images of another: in one index, and in two."""
import json
import os
import shutil

import pytest
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.index import Index
from timm_multigrain.index.between import ImageSet, find_copies_between

from .test_index_dedup import drawing
from .tiny import tiny_model


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """train/{cat,dog}/0.png to 3.png; in val other pictures and six copies, two of them in train as well."""
    base = tmp_path_factory.mktemp('between')
    for i, name in enumerate(('train/cat', 'train/dog', 'val/cat', 'val/dog')):
        (base / name).mkdir(parents=True)
        for j in range(4):
            drawing(10 * i + j).save(base / name / f'{j}.png')
    train, val = base / 'train', base / 'val'
    shutil.copyfile(train / 'cat/0.png', train / 'cat/again.png')  # of no interest: both are in one set
    shutil.copyfile(train / 'cat/0.png', val / 'cat/same.png')
    shutil.copyfile(train / 'cat/1.png', val / 'dog/same of a cat.png')
    os.link(train / 'dog/0.png', val / 'dog/linked.png')
    drawing(11).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(val / 'dog/mirrored.png')
    for name in ('twin', 'other twin'):
        drawing(12).resize((120, 90)).save(val / f'dog/{name}.png')
    model = tiny_model()
    Index.build([train, val], base / 'index', model, Protocol(64), workers=0, progress=False)
    for part in (train, val):
        Index.build([part], base / f'{part.name}.index', model, Protocol(64), workers=0, progress=False)
    return base


EXPECTED = {
    'cat/same.png': ('cat/0.png', ['identical']), 'dog/same of a cat.png': ('cat/1.png', ['identical']),
    'dog/linked.png': ('dog/0.png', ['identical']), 'dog/mirrored.png': ('dog/1.png', ['details', 'mirrored']),
    'dog/twin.png': ('dog/2.png', ['details', 'smaller']), 'dog/other twin.png': ('dog/2.png', ['details', 'smaller'])}


def found(copies):
    """Those that are certain; the tiny model knows little."""
    first, second = copies.first, copies.second
    return {second.name_of(copy.record.path): (first.name_of(kept.record.path).replace('again', '0'),
                                               [copy.basis, *copy.edits])
            for copy, kept in copies.pairs() if copy.certain}


def test_copies_between_two_sets(base):
    index = Index(base / 'index')
    one = find_copies_between(ImageSet(index, base / 'train'), ImageSet(index, base / 'val'), 0.8)
    assert found(one) == EXPECTED
    two = [ImageSet(Index(base / f'{name}.index')) for name in ('train', 'val')]
    assert found(find_copies_between(*two, 0.8)) == EXPECTED
    identical = find_copies_between(*two, exact_only=True)
    assert found(identical) == {name: how for name, how in EXPECTED.items() if how[1] == ['identical']}
    told = [pair for pair in json.loads(json.dumps(one.to_dict()))['pairs'] if pair['certain']]
    assert [pair['class_of_copy'] != pair['class'] for pair in told].count(True) == 1
    lines = str(one).splitlines()
    assert ' among 14 images: 6 for certain, ' in lines[-1]
    assert str(identical).splitlines()[-1].endswith('3 for certain, 0 likely; 1 of another class')
    assert 'mirrored' in next(line for line in lines if 'dog/mirrored.png' in line)
    with pytest.raises(ValueError, match='images in common'):
        find_copies_between(ImageSet(index), ImageSet(index, base / 'val'))


def test_command(base, tmp_path, capfd):
    folders = [str(base / 'train'), str(base / 'val')]
    assert main(['dedup', str(base / 'index'), '--between', *folders, '--identical', '--list', '--html',
                 str(tmp_path / 'page.html')]) == 0
    assert capfd.readouterr().out.splitlines() == [str(base / 'val' / name) for name in (
        'cat/same.png', 'dog/same of a cat.png', 'dog/linked.png')]
    assert (tmp_path / 'page.html').read_text().count('<li>') == 1  # how many; the pairs are seen
    for arguments, message in (
            ([], 'Name an index, or two'), (['--between', *folders], 'is not an index'),
            ([str(base / 'index'), '--between', folders[0], str(base)], 'images in common'),
            ([str(base / 'index'), '--between', folders[0], str(tmp_path)], 'has no images in'),
            ([str(base / 'index'), '--between', *folders, '--keep', 'oldest'], 'leave --keep')):
        assert main(['dedup', *arguments]) == 2
        assert message in capfd.readouterr().err
