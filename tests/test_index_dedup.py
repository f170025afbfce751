"""Copies in an indexed folder: what is found, what is suggested to be kept, the command and its page; files stay."""
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from timm_multigrain.cli.main import main
from timm_multigrain.images.copies import EDITS
from timm_multigrain.images.pixels import holds_several
from timm_multigrain.index import Index
from timm_multigrain.index.dedup import find_copies, measure_recall
from timm_multigrain.index.detail import Picture, _is_inset, compare
from timm_multigrain.index.keep import KEEP, write_script

from .copies_folder import make_index, make_pictures
from .pictures import noise
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


def paths(surplus):
    return [file.record.path for file, _ in surplus]


def state_of(folder):
    return {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in os.listdir(folder)}


def test_groups(index, pictures):
    before, states = state_of(pictures), []
    copies = find_copies(index, progress=states.append)
    assert states[0] == f'Reading pictures: 0 of {len(index) - 2}' and states[-1].startswith('Checking files: ')
    assert [names(group) for group in copies.of_kind('exact')] == [['0.png', 'a longer name.png'], ['5.png', NASTY]]
    near = [set(names(group)) for group in copies.of_kind('near')]
    assert {'1.png', 'small.jpg'} in near and any({'2.png', 'mirror.png'} <= group for group in near)
    [small] = [group for group in copies.of_kind('near') if 'small.jpg' in names(group)]
    assert names(small)[0] == '1.png' and small.keep == str(pictures / '1.png')  # more pixels
    assert {file.basis for group in copies.of_kind('near') for file in group.others} <= {'details', 'look'}
    kept = {os.path.basename(group.keep) for group in copies.groups}
    surplus = paths(copies.surplus(likely=True))
    assert {'0.png', '1.png', '5.png'} <= kept and not set(surplus) & {str(pictures / '1.png')}
    assert len(surplus) == len(set(surplus)) and set(paths(copies.surplus())) <= set(surplus)
    assert copies.surplus_bytes(likely=True) == sum(os.path.getsize(os.fsencode(path)) for path in surplus)
    for group in copies.groups:
        scores = [file.score for file in group.files]
        assert scores[0] == 1 and (np.diff(scores[1:]) <= 0).all()
    assert find_copies(index) == copies and state_of(pictures) == before
    for text in (f'{len(copies.surplus())} surplus files for certain', '2 groups of identical files'):
        assert text in str(copies)


def drawing(seed=0, size=(160, 120)):
    """Something with details, in colour."""
    return noise(size, (32, 24), seed)


def exif_of_a_camera():
    exif = Image.Exif()
    exif[0x110] = 'a camera'
    return exif


# what is done to it.jpg, the other file, why it.jpg is kept, and which edit the other one is
@pytest.mark.parametrize('save, why, edit', [
    (lambda it, f: it.save(f / 'it.png'), 'the other was made from it', ('same pixels',)),
    (lambda it, f: it.convert('L').resize((320, 240)).save(f / 'scan.png'), 'in colour', ('enlarged', 'grey')),
    (lambda it, f: it.resize((130, 98)).save(f / 'a.png'), 'more pixels', ('smaller',)),
    (lambda it, f: it.save(f / 'a.jpg', quality=95), 'with data of the camera', ('recompressed',)),
    (lambda it, f: it.save(f / 'Kopie von it.jpg', quality=95, exif=exif_of_a_camera()), 'not named a copy',
     ('recompressed',)),
    (lambda it, f: it.save(f / 'a.jpg', quality=95, exif=exif_of_a_camera()), 'older', ('recompressed',)),
    (lambda it, f: it.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(f / 'a.jpg', exif=exif_of_a_camera()), 'older',
     ('mirrored',)),
    (lambda it, f: it.rotate(90, expand=True).save(f / 'a.png'), 'with data of the camera', ('turned by 90 degrees',)),
    (lambda it, f: it.crop((16, 12, 144, 108)).save(f / 'a.png'), 'more pixels', ('cropped to 64 %',)),
])
def test_what_is_kept_and_why(tmp_path, save, why, edit):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    drawing().save(folder / 'it.jpg', quality=80, exif=exif_of_a_camera())
    save(Image.open(folder / 'it.jpg').convert('RGB'), folder)
    os.utime(folder / 'it.jpg', (10 ** 9, 10 ** 9))
    [group] = find_copies(make_index(folder, tmp_path / 'index'), 0.3).groups
    assert names(group)[0] == 'it.jpg' and group.reasons == (why,)
    assert (group.others[0].basis, group.others[0].edits) == ('details', edit)


def test_rules_that_the_user_says(tmp_path):
    first, second = tmp_path / 'b', tmp_path / 'a'
    for i, folder in enumerate((first, second)):
        folder.mkdir()
        drawing(size=(160 + 20 * i, 120)).save(folder / f'{i}.png')
        os.utime(folder / f'{i}.png', (10 ** 9 + i, 10 ** 9 + i))
    outside = tmp_path / 'outside.png'
    shutil.copyfile(second / '1.png', outside)
    os.symlink(outside, first / 'link.png')
    index = Index.build([first, second], tmp_path / 'index', make_index(first, tmp_path / 'other').model(), workers=0,
                        progress=False)
    near = {keep: find_copies(index, 0.3, keep=keep).of_kind('near')[0] for keep in KEEP}
    assert {keep: names(group)[0] for keep, group in near.items()} == {
        'largest': '1.png', 'oldest': '0.png', 'newest': '1.png', 'first-folder': '0.png'}
    [exact] = find_copies(index, exact_only=True).groups
    assert names(exact) == ['1.png', 'link.png'] and exact.reasons == ('not a link',)
    preferred = find_copies(index, 0.3, prefer=[first])
    assert set(paths(preferred.surplus(likely=True))) == {str(second / '1.png')}
    assert find_copies(index, 0.3, prefer=[first, second], exact_only=True).groups == ()
    with pytest.raises(FileNotFoundError, match='give one whose files are to be kept'):
        find_copies(index, prefer=[tmp_path / 'nothing'])
    with pytest.raises(ValueError, match=r"keep is 'best': give one of largest, oldest"):
        find_copies(index, keep='best')


def test_what_is_never_certain():
    """A part with more pixels, as of a photograph from nearer; something else in it; another view of a place."""
    it = drawing(size=(320, 240))
    covered, moved = it.copy(), it.copy()
    covered.paste('white', (0, 170, 320, 240))
    moved.paste(it.crop((0, 0, 290, 240)), (30, 0))
    for other in (it.crop((32, 24, 288, 216)).resize((400, 300)), covered, moved, drawing(1, (320, 240))):
        for pair in ((it, other), (other, it)):
            assert not compare(*map(Picture, pair)).certain
    assert 'partly covered' in compare(Picture(it), Picture(covered)).edits
    assert compare(Picture(it), Picture(it.rotate(8).crop((40, 40, 280, 200)))).certain
    assert not compare(Picture(Image.new('RGB', (90, 90))), Picture(it)).edits
    shot = compare(Picture(it), Picture(EDITS['screenshot'](it)))  # nobody wants to keep that one
    assert shot.alike and not shot.certain and shot.edits == ('shows more, of which this is 50 %', 'inset')
    collage = ImageOps.expand(it, (0, 0, 0, 240))
    collage.paste(drawing(1, it.size), (0, 240))
    for page in (ImageOps.expand(it, (0, 80), 'navy'), ImageOps.expand(it, (0, 0, 0, 60), 'white'), collage):
        compared = compare(Picture(it), Picture(page))
        assert compared.alike and not compared.certain and 'inset' in compared.edits
        assert 'inset' not in compare(Picture(page), Picture(it)).edits
    beside = np.array([[0.625, 0, 0.8156], [0, 0.5, 0], [0, 0, 1]])  # of which the whole shows the left edge only
    assert _is_inset(Picture(it), beside) in (True, False)
    for part in ((0, 0, 320, 120), (0, 60, 320, 240), (80, 0, 320, 240)):
        assert compare(Picture(it), Picture(it.crop(part))).certain


def test_a_photograph_is_kept_before_its_screenshots(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    it = drawing(0, (320, 240))
    it.save(folder / '0.png')
    ImageOps.expand(it, (0, 90), 'navy').save(folder / 'phone.png')  # more pixels
    ImageOps.expand(it, (0, 0, 0, 140), 'white').save(folder / 'caption.png')
    [group] = find_copies(make_index(folder, tmp_path / 'index'), 0.3).of_kind('near')
    kept, *others = names(group)
    assert kept == '0.png' and set(others) == {'phone.png', 'caption.png'}
    assert 'the other shows it among other things' in group.reasons and not group.certain


@pytest.mark.parametrize('edit, mirrored, degrees', [
    (lambda it: it.transpose(Image.Transpose.FLIP_LEFT_RIGHT), True, None),
    (lambda it: it.transpose(Image.Transpose.ROTATE_180), False, 180),
    (lambda it: it.transpose(Image.Transpose.TRANSPOSE), True, 90),
    (EDITS['rotate 10'], False, 10)])
def test_small_versions_and_features_see_the_same(edit, mirrored, degrees, monkeypatch):
    it = drawing(size=(320, 240))
    assert degrees == 10 or Picture(it).upright @ Picture(edit(it)).upright > 0.99
    expected = (*['mirrored'] * mirrored, *[f'turned by {degrees} degrees'] * bool(degrees))
    compared = compare(Picture(it), Picture(edit(it)))
    assert compared.certain and compared.edits[:len(expected)] == expected
    monkeypatch.setattr('timm_multigrain.index.detail.cv2', None)
    alone = compare(Picture(it), Picture(edit(it)))
    expected = (False, False, ()) if degrees == 10 else (True, False, expected)
    assert (alone.alike, alone.certain, alone.edits) == expected


def test_without_opencv(index, monkeypatch):
    monkeypatch.setattr('timm_multigrain.index.detail.cv2', None)
    with pytest.warns(UserWarning, match=r"pip install 'timm_multigrain\[local\]'"):
        copies = find_copies(index)
    assert {'2.png', 'mirror.png'} in [set(names(group)) for group in copies.of_kind('near')]
    assert {file.basis for group in copies.of_kind('near') for file in group.others} == {'look'}


def run_script(script, to):
    return subprocess.run(['sh', str(script), str(to)], capture_output=True, text=True, errors='replace', timeout=60)


def test_script_moves_what_is_still_so(tmp_path):
    folder, to, script = tmp_path / 'pictures', tmp_path / 'to', tmp_path / 'move.sh'
    folder.mkdir()
    names = ["it's $HOME `x`.png", 'changed.png', 'gone.png', 'kept changed.png', 'linked.png', '-new\nline \udcff.png']
    for i, name in enumerate(names):
        drawing(i).save(os.fsencode(folder / name), format='png')
        shutil.copyfile(folder / name, folder / f'{name[:-4]} (1).png')
    copies = find_copies(make_index(folder, tmp_path / 'index'), exact_only=True)
    write_script(script, copies.surplus())
    (folder / 'changed (1).png').write_bytes(b'x')
    (folder / 'gone (1).png').unlink()
    (folder / 'kept changed.png').write_bytes(b'x')
    (folder / 'linked.png').unlink()
    os.link(folder / 'linked (1).png', folder / 'linked.png')
    before = sorted(os.listdir(folder))
    result = run_script(script, to)
    moved = [names[0][:-4] + ' (1).png', names[-1][:-4] + ' (1).png']
    assert result.returncode == 1 and f'2 files moved to {to}, 4 left' in result.stdout
    for reason in ('changed (1).png: it has changed', 'not there any more', 'the file to keep has changed',
                   'it is the file to keep itself'):
        assert reason in result.stderr
    assert sorted(os.listdir(folder)) == [name for name in before if name not in moved]
    assert sorted(os.listdir(f'{to}{folder}')) == sorted(moved)
    shutil.copyfile(folder / names[0], folder / moved[0])  # nothing in the folder is overwritten
    assert 'such a file in the folder already' in run_script(script, to).stderr and (folder / moved[0]).exists()


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
    copies = find_copies(Index(moved))
    assert (copies.groups, copies.surplus(likely=True), copies.left_out, len(copies.changed)) == ((), [], 2, 4)
    assert '2 groups left out' in str(copies)
    assert main(['dedup', str(moved), '--list', '--identical']) == 1
    out, err = capfd.readouterr()
    assert out == '' and '4 of the files, such as' in err
    assert f'Run timm-multigrain index -o {moved}, then this again' in err


def scan(name, seed, cover):
    """A file of two pages, the first of which is the cover."""
    page = noise((60, 60), (8, 8), seed)
    cover.save(name, save_all=True, append_images=[page], **({} if name.suffix == '.tif' else {'lossless': True}))


def test_files_of_several_pictures_are_copies_only_if_identical(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    cover = noise((60, 60), (8, 8), seed=9)
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
    assert paths(copies.surplus()) == [str(folder / 'copy.png')]
    # the copy becomes a link to the other, with the size and time that were indexed
    (folder / 'copy.png').unlink()
    os.symlink(folder / 'a.png', folder / 'copy.png')
    assert find_copies(Index(tmp_path / 'index2'), 0.9).groups == ()


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
    for name in 'abc':
        (base / 'pictures' / name).mkdir(parents=True)
    for i in range(4):
        picture = noise((60, 60), (8, 8), i)
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
        copies = find_copies(Index(base / 'index'), 0.9, look=False, exact_only=exact)
        surplus = paths(copies.surplus(likely=True))
        now = {path: digest(path) for path in surplus}
        for path in surplus:
            os.unlink(path)
        if exact:
            assert contents(folder) == before, seed
        for group in copies.groups:
            for file in group.files[1:]:
                assert now[file.record.path] == file.record.sha256, seed
            if group.keep not in surplus:
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
        write_files(Index(folder))
        groups = find_copies(Index(folder), 0.9, look=False).groups
        found.append({frozenset(names(group)) for group in groups})
    assert len(found[0]) == 30 and found[0] == found[1]


def test_tiny_indexes(tmp_path):
    for count in (0, 1, 2):
        assert find_copies(Index(write_index(tmp_path / str(count), unit_vectors(count)))).groups == ()
    ten = Index(write_index(tmp_path / 'ten', unit_vectors(10)))
    assert find_copies(ten, false_positives=0, look=False).groups == ()


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
            ([folder, '--measure', '--identical'], 2, b'a table only'),
            ([folder, '--threshold', '2'], 2, b'at most 1'), ([folder, '--threshold', 'nan'], 2, b'at most 1'),
            ([str(tmp_path / 'nothing')], 2, b'was not found')):
        assert main(['dedup', *arguments]) == code
        out, err = capfdbinary.readouterr()
        assert message in (err if code else out) and not (code and out)
    assert main(['dedup', folder, '--false-positives', '0']) == 0
    assert b'no effect without --no-look' in capfdbinary.readouterr().err
    assert set(os.listdir(pictures)) == {Path(path).name for path in index.paths}


def test_a_page_that_cannot_be_written_is_refused_before_the_work(index, tmp_path, monkeypatch, capsys):
    (tmp_path / 'locked').mkdir()
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path).name != 'locked')
    for page, says in ((tmp_path, 'is a folder'), (tmp_path / 'file' / 'a.html', 'is a file'),
                       (tmp_path / 'locked' / 'new' / 'a.html', 'cannot be written to')):
        with pytest.raises(SystemExit):
            main(['dedup', str(index.path), '--html', str(page)])
        assert says in capsys.readouterr().err


def test_recall_of_edits(index, capfd):
    edits = {name: EDITS[name] for name in ('jpeg 90', 'mirror', 'rotate 15')}
    recall = measure_recall(index, 6, false_positives=0.01, edits=edits)
    assert recall.images == 6 and set(recall.recall) == set(edits)
    assert recall.recall['mirror'] >= 0.5 and all(0 <= share <= 1 for share in recall.recall.values())
    everything = measure_recall(index, 6, -0.99, false_positives=0.01, edits=edits)
    assert set(everything.recall.values()) == {1} and 'mean' in str(everything)
    with pytest.raises(ValueError, match='nothing to measure'):
        measure_recall(index, 0, false_positives=0.01)
