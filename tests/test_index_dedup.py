"""Copies in an indexed folder: what is found, what is suggested to be kept, the command and its page; files stay."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.images.sources import holds_several
from timm_multigrain.index import Index
from timm_multigrain.index.dedup import EDITS, find_copies, measure_recall

from .copies_folder import make_index, make_pictures
from .small_index import unit_vectors, write_files, write_index

NASTY = '<img src=x onerror=alert(1)> & "q"\n\udcff.png'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp('dedup') / 'pictures')
    shutil.copyfile(folder / '5.png', folder / NASTY)
    return folder


@pytest.fixture(scope='module')
def index(pictures):
    return make_index(pictures, pictures.parent / 'index')


def names(group):
    return [os.path.basename(file.record.path) for file in group.files]


def state_of(folder):
    return {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in os.listdir(folder)}


def test_groups(index, pictures):
    before = state_of(pictures)
    copies = find_copies(index)
    assert [names(group) for group in copies.of_kind('exact')] == [['0.png', 'a longer name.png'], ['5.png', NASTY]]
    near = [set(names(group)) for group in copies.of_kind('near')]
    assert {'1.png', 'small.jpg'} in near and any({'2.png', 'mirror.png'} <= group for group in near)
    [small] = [group for group in copies.of_kind('near') if 'small.jpg' in names(group)]
    assert names(small)[0] == '1.png' and small.keep == str(pictures / '1.png')  # more pixels
    kept = {os.path.basename(group.keep) for group in copies.groups}
    assert {'0.png', '1.png', '5.png'} <= kept and not set(copies.surplus) & {str(pictures / '1.png')}
    assert len(copies.surplus) == len(set(copies.surplus))
    assert copies.surplus_bytes == sum(os.path.getsize(os.fsencode(path)) for path in copies.surplus)
    for group in copies.groups:
        scores = [file.score for file in group.files]
        assert scores[0] == 1 and (np.diff(scores[1:]) <= 0).all()
    assert find_copies(index) == copies and state_of(pictures) == before
    assert f'{len(copies.surplus)} surplus files' in str(copies) and '2 groups of identical files' in str(copies)


def test_keep_is_largest_then_least_compressed_then_shortest_name(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    picture = Image.effect_noise((80, 80), 90).convert('RGB')
    picture.save(folder / 'copy of it.jpg', quality=95)
    picture.save(folder / 'it.jpg', quality=60)
    picture.resize((70, 70)).save(folder / 'a.png')
    copies = find_copies(make_index(folder, tmp_path / 'index'), 0.9)
    [group] = copies.groups
    assert names(group)[0] == 'copy of it.jpg' and set(names(group)[1:]) == {'it.jpg', 'a.png'}


def test_identical_files_alone_and_pictures_that_are_not_looked_at(index, monkeypatch):
    monkeypatch.setattr('timm_multigrain.index.dedup.read_image', lambda *a, **k: pytest.fail('it was read'))
    copies = find_copies(index, exact_only=True)
    assert {group.kind for group in copies.groups} == {'exact'} and copies.thresholds is None
    json.dumps(copies.to_dict())
    copies = find_copies(index, look=False)
    assert copies.unreadable == 0 and copies.of_kind('exact') and copies.thresholds


def test_pictures_that_are_gone(index, tmp_path, capfd):
    moved = tmp_path / 'index'
    shutil.copytree(index.path, moved)  # its pictures are looked for beside it, and are not there
    copies = find_copies(Index.open(moved))
    assert copies.groups == () and copies.surplus == [] and copies.left_out == 2 and len(copies.changed) == 4
    assert '2 groups left out' in str(copies)
    assert main(['dedup', str(moved), '--list', '--identical']) == 1
    out, err = capfd.readouterr()
    assert out == '' and '4 of the files, such as' in err
    assert f'Run timm-multigrain index -o {moved}, then this again' in err


def scan(name, seed, cover):
    """A file of two pages, the first of which is the cover."""
    page = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((60, 60))
    cover.save(name, save_all=True, append_images=[page], **({} if name.suffix == '.tif' else {'lossless': True}))


def test_files_of_several_pictures_are_copies_only_if_identical(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    cover = Image.fromarray(np.random.default_rng(9).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((60, 60))
    for kind in ('tif', 'webp', 'png', 'gif'):
        for seed in (1, 2):
            scan(folder / f'{seed}.{kind}', seed, cover)
            assert holds_several(folder / f'{seed}.{kind}')
    shutil.copyfile(folder / '1.tif', folder / 'same.tif')
    cover.save(folder / 'single.tif')
    cover.save(folder / 'single.png')
    assert not holds_several(folder / 'single.tif') and not holds_several(tmp_path / 'nothing.tif')
    copies = find_copies(make_index(folder, tmp_path / 'index'), 0.99)
    assert [(group.kind, set(names(group))) for group in copies.groups] == [
        ('exact', {'1.tif', 'same.tif'}), ('near', {'single.tif', 'single.png'})]
    assert copies.several == 8 and '8 files of several pictures' in str(copies)


def test_a_file_is_not_surplus_to_itself(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    Image.effect_noise((40, 40), 90).save(folder / 'a.png')
    os.link(folder / 'a.png', folder / 'second name.png')
    index = make_index(folder, tmp_path / 'index')
    assert len(index) == 2 and find_copies(index, 0.9).groups == ()
    shutil.copy2(folder / 'a.png', folder / 'copy.png')
    copies = find_copies(make_index(folder, tmp_path / 'index2'), 0.9)
    assert copies.surplus == [str(folder / 'copy.png')]
    # the copy becomes a link to the other, with the size and time that were indexed
    (folder / 'copy.png').unlink()
    os.symlink(folder / 'a.png', folder / 'copy.png')
    assert find_copies(Index.open(tmp_path / 'index2'), 0.9).groups == ()


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def contents(folder):
    return {digest(path) for path in folder.rglob('*.png') if path.is_file()}


def disturb(folder, rng, same_time):
    """Something that happens to a collection between its indexing and the deletion of its copies."""
    files = sorted(path for path in folder.rglob('*.png') if path.is_file())
    path, other = (files[i] for i in rng.choice(len(files), 2, replace=False))
    times, action = (path.stat().st_atime_ns, path.stat().st_mtime_ns), rng.integers(8 + same_time)
    if action == 0:
        os.rename(path.parent, folder / f'renamed{rng.integers(1 << 30)}')
    elif action == 1:
        path.unlink()
    elif action in (2, 8):  # another content of the same size
        path.write_bytes(path.read_bytes()[:-1] + b'?')
        os.utime(path, ns=times if action == 8 else (1, 1))
    elif action == 3:
        os.utime(path, ns=(2, 2))
    elif action in (4, 5):
        path.unlink()
        (os.symlink if action == 4 else os.link)(other, path)
    elif action == 6:
        spare = folder / 'spare'
        os.rename(path, spare)
        os.rename(other, path)
        os.rename(spare, other)
    else:
        os.rename(path, path.with_name(f'moved{rng.integers(1 << 30)}.png'))


@pytest.fixture(scope='module')
def nest(tmp_path_factory):
    """Four pictures, each three times in several folders, of each a near copy; and their index beside them."""
    base = tmp_path_factory.mktemp('nest')
    rng = np.random.default_rng(0)
    for name in 'abc':
        (base / 'pictures' / name).mkdir(parents=True)
    for i in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((60, 60))
        for name in 'abc':
            picture.save(base / 'pictures' / name / f'{i}.png')
        picture.resize((50, 50)).save(base / 'pictures' / 'c' / f'near{i}.png')
    make_index(base / 'pictures', base / 'index')
    return base


@pytest.mark.parametrize('exact', [True, False])
def test_deleting_what_is_listed_loses_nothing_whatever_has_happened(nest, tmp_path, exact):
    listed = left_out = 0
    for seed in range(40):
        rng, base = np.random.default_rng(seed), tmp_path / str(seed)
        shutil.copytree(nest, base)
        folder = base / 'pictures'
        for i in range(2):  # of two pictures, two of the files are one
            (folder / 'b' / f'{i}.png').unlink()
            os.link(folder / 'a' / f'{i}.png', folder / 'b' / f'{i}.png')
        for _ in range(rng.integers(1, 4)):
            disturb(folder, rng, same_time=exact)
        before = contents(folder)
        copies = find_copies(Index.open(base / 'index'), 0.9, look=False, exact_only=exact)
        now = {path: digest(path) for path in copies.surplus}
        for path in copies.surplus:
            os.unlink(path)
        if exact:
            assert contents(folder) == before, seed
        for group in copies.groups:
            for file in group.files[1:]:
                assert now[file.record.path] == file.record.sha256, seed
            if group.keep not in copies.surplus:
                assert digest(group.keep) == group.files[0].record.sha256, seed
        listed, left_out = listed + len(now), left_out + copies.left_out
    assert listed > 40 and left_out > 40


def test_order_of_indexing_decides_nothing(tmp_path):
    vectors = unit_vectors(60, dim=8)
    vectors[30:] = vectors[:30]
    found = []
    for i, order in enumerate((np.arange(60), np.random.default_rng(0).permutation(60))):
        folder = write_index(tmp_path / f'index{i}', vectors[order], [f'{j}.jpg' for j in order],
                             root=tmp_path / f'{i}' / 'pictures')
        write_files(Index.open(folder))
        groups = find_copies(Index.open(folder), 0.9, look=False).groups
        found.append({frozenset(map(os.path.basename, (group.keep, *group.others))) for group in groups})
    assert len(found[0]) == 30 and found[0] == found[1]


def test_empty_and_tiny_indexes(tmp_path):
    for count in (0, 1, 2):
        index = Index.open(write_index(tmp_path / str(count), unit_vectors(count)))
        assert find_copies(index).groups == ()
    with pytest.raises(ValueError, match='above -1 and at most 1'):
        find_copies(index, 1.5)
    with pytest.raises(ValueError, match='share above 0'):
        find_copies(Index.open(write_index(tmp_path / 'ten', unit_vectors(10))), false_positives=0)


def test_command(index, pictures, tmp_path, capfdbinary):
    folder = str(index.path)
    assert main(['dedup', folder, '--html', str(tmp_path / 'copies.html'), '--json', '-']) == 0
    told = json.loads(capfdbinary.readouterr().out)
    assert told == json.loads(json.dumps(find_copies(index).to_dict()))
    assert (tmp_path / 'copies.html').stat().st_size > 10_000
    assert {file['path'] for group in told['groups'] for file in group['files']} >= {str(pictures / NASTY)}
    assert main(['dedup', folder, '--list', '-0', '--identical']) == 0
    assert capfdbinary.readouterr().out == b''.join(
        os.fsencode(pictures / name) + b'\0' for name in ('a longer name.png', NASTY))
    for arguments, code, message in (
            ([folder], 0, b'surplus files'),
            ([folder, '--list', '--identical'], 2, b'control characters in its name: take --list -0'),  # two lines
            ([folder, '--threshold', '2'], 2, b'at most 1'), ([str(tmp_path / 'nothing')], 2, b'was not found')):
        assert main(['dedup', *arguments]) == code
        out, err = capfdbinary.readouterr()
        assert message in (err if code else out) and not (code and out)
    assert set(os.listdir(pictures)) == {Path(path).name for path in index.paths}


def test_recall_of_edits(index, capfd):
    edits = {name: EDITS[name] for name in ('jpeg 90', 'mirror', 'rotate 15')}
    recall = measure_recall(index, 6, false_positives=0.01, edits=edits)
    assert recall.images == 6 and set(recall.recall) == set(edits)
    assert recall.recall['mirror'] >= 0.5 and all(0 <= share <= 1 for share in recall.recall.values())
    everything = measure_recall(index, 6, -0.99, false_positives=0.01, edits=edits)
    assert set(everything.recall.values()) == {1} and 'mean' in str(everything)
    with pytest.raises(ValueError, match='nothing to measure'):
        measure_recall(index, 0, false_positives=0.01)
