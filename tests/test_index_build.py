"""Indexing real files: one pass against the slow way, updates, bad images, kills, changing files, other models."""
import hashlib
import io
import json
import os
import shutil
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.pixels import UnreadableImage, read_image
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.index import Index, IndexInUse, OtherModel, build_index
from timm_multigrain.index.store import index_lock

from .pictures import noise, png_header
from .small_index import forked, unit_vectors, write_index
from .test_images_walk import forbid
from .tiny import tiny_model

PROTOCOL = Protocol(size=64)
LABELS = ['boat', 'car', 'tree']
NAMES = ('images', 'new', 'changed', 'moved', 'copied', 'removed', 'unchanged')


def picture(seed: int, size=(90, 70)) -> Image.Image:
    return noise(size, (9, 7), seed)


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    return str(save_pretrained(tiny_model(), tmp_path_factory.mktemp('models') / 'tiny', LABELS))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'pictures'
    (folder / 'sub').mkdir(parents=True)
    for i in range(8):
        picture(i).save(folder / ('sub' if i % 2 else '.') / f'{i}.png')
    return folder


@pytest.fixture
def embedded(monkeypatch):
    """Names of the files that go through the model."""
    names, load = [], ImageFiles.load

    def counted(self, i, exif=True):
        names.append(os.path.basename(self.paths[i]))
        return load(self, i, exif)
    monkeypatch.setattr(ImageFiles, 'load', counted)
    return names


def update(folders, model=None, **options):
    """Update the index beside the pictures; of one folder or several."""
    folders = folders if isinstance(folders, list) else [folders]
    return build_index(folders, options.pop('index', folders[0].parent / 'index'), model,
                       **{'workers': 0, 'progress': False, **options})


def make(pictures, model_folder, **options):
    return update(pictures, model_folder, protocol=PROTOCOL, **options)


def opened(pictures):
    return Index(pictures.parent / 'index')


def counts(report):
    return [getattr(report, name) for name in NAMES]


def files_in(folder):
    return sorted(str(path) for path in folder.rglob('*.png'))


def check_against_the_slow_way(index):
    """Every row recomputed image by image."""
    model, protocol = tiny_model(), index.protocol()
    for row, path in enumerate(index.paths):
        image, record = read_image(path), index.records(row)
        with torch.no_grad():
            x = protocol.normalize(protocol.pixels(image))[None]
            vector, probabilities = model.embed(x)[0], model(x)[0].double().softmax(0)
        assert np.allclose(index.vectors[row], vector, atol=1e-6)
        order = probabilities.argsort(descending=True)
        assert [name for name, _ in record.classes] == [LABELS[i] for i in order]
        assert np.allclose([p for _, p in record.classes], probabilities[order], atol=1e-6)
        with open(path, 'rb') as file:
            assert record.sha256 == hashlib.sha256(file.read()).hexdigest()
        status = os.stat(path)
        assert (record.width, record.height) == image.size
        assert (record.bytes, record.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_one_pass_against_the_slow_way(pictures, model_folder):
    report = make(pictures, model_folder, workers=1)
    assert counts(report) == [8, 8, 0, 0, 0, 0, 0] and '8 images: 8 new' in str(report)
    index = opened(pictures)
    assert sorted(index.paths) == files_in(pictures)
    check_against_the_slow_way(index)
    info = index.info
    assert info['images'] == 8 and info['folders'] == [str(pictures)] and info['protocol']['size'] == 64
    assert info['model']['p'] and info['model']['source'] == model_folder and info['versions']['timm']


def test_update(pictures, model_folder, embedded):
    for name in ('twin.png', 'twin-gone.png'):
        picture(50).save(pictures / name)
    (pictures / 'bad.png').write_bytes(b'b')
    (pictures / 'bad-gone.png').touch()
    make(pictures, model_folder)
    assert len(embedded) == 12
    embedded.clear()
    assert update(pictures).unchanged == 10 and not embedded

    times = os.stat(pictures / '4.png')
    picture(100).save(pictures / '0.png')
    os.utime(pictures / '2.png', ns=(5, 5))
    (pictures / '4.png').write_bytes(bytes(times.st_size))  # of the same size, and no picture any more
    os.rename(pictures / 'sub', pictures / 'elsewhere')
    os.rename(pictures / 'twin-gone.png', pictures / 'zz.png')  # moved, though its twin is still there
    (pictures / 'bad-gone.png').unlink()
    shutil.copy(pictures / '6.png', pictures / 'copy.png')
    picture(101).save(pictures / 'new.png')
    (pictures / '6.png').unlink()  # what was copied has moved
    report = update(pictures)
    assert sorted(embedded) == ['0.png', '4.png', 'new.png']
    assert counts(report) == [10, 1, 1, 6, 0, 1, 2] and 'unchanged' in str(report)
    assert {os.path.basename(path) for path in report.skipped} == {'bad.png', '4.png'}
    index = opened(pictures)
    assert sorted(index.paths) == sorted(set(files_in(pictures)) - {str(pictures / f'{n}.png') for n in ('bad', '4')})
    shutil.copy(pictures / 'new.png', pictures / 'copy of new.png')
    assert counts(update(pictures)) == [11, 0, 0, 0, 1, 0, 10] and len(embedded) == 3
    check_against_the_slow_way(opened(pictures))
    assert index.records(index.paths.index(str(pictures / '2.png'))).mtime_ns == 5


def test_images_elsewhere_and_in_closed_folders_stay(pictures, model_folder, monkeypatch):
    make(pictures, model_folder)
    for path in (pictures / 'sub' / '1.png', pictures / '0.png'):
        path.unlink()
    index = pictures.parent / 'index'
    assert counts(update(pictures / 'sub', index=index)) == [7, 0, 0, 0, 0, 1, 3]
    (pictures / 'sub' / '3.png').unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'scandir', forbid(os.fsencode(pictures / 'sub')))
        report = update(pictures)
    assert report.unreadable == {str(pictures / 'sub'): 'Permission denied'}
    assert counts(report) == [6, 0, 0, 0, 0, 1, 3] and update(pictures).removed == 1


def test_many_updates_against_a_new_index(pictures, model_folder):
    make(pictures, model_folder, kind='hnsw')
    rng = np.random.default_rng(0)
    for turn in range(12):
        files = sorted(pictures.rglob('*.png'))
        for _ in range(3):
            path = files[rng.integers(len(files))]
            action = rng.integers(4)
            if action == 0 and path.exists() and len(files) > 4:
                path.unlink()
            elif action == 1 and path.exists():
                os.rename(path, pictures / f'moved{turn}-{rng.integers(1 << 30)}.png')
            elif action == 2 and path.exists():
                shutil.copy(path, pictures / f'copy{turn}-{rng.integers(1 << 30)}.png')
            else:
                picture(turn, size=(40 + turn, 50)).save(path)
        update(pictures)
        index = opened(pictures)
        index.store.check()
        assert sorted(index.paths) == files_in(pictures)
    check_against_the_slow_way(index)
    assert index.store.state['generation'] > 1


def test_bad_and_odd_images(pictures, model_folder):
    (pictures / 'empty.jpg').touch()
    (pictures / 'text.jpg').write_text('no picture')
    picture(1, (400, 300)).save(pictures / 'cut.jpg')
    os.truncate(pictures / 'cut.jpg', 2000)
    (pictures / 'bomb.png').write_bytes(png_header(30_000, 30_000))
    (pictures / 'photo.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
    bad = {'empty.jpg', 'text.jpg', 'cut.jpg', 'bomb.png', 'photo.heic'}
    picture(2).convert('CMYK').save(pictures / 'cmyk.jpg')
    picture(4).save(pictures / 'animated.webp', save_all=True, append_images=[picture(5), picture(6)])
    odd = [os.fsdecode(name) for name in (b'new\nline.png', b'bad\xffbyte.png', b'"quoted" \'$x.png')]
    for i, name in enumerate(odd):
        picture(10 + i).save(pictures / 'x.png')
        os.rename(pictures / 'x.png', pictures / name)
    report = make(pictures, model_folder, workers=1)
    reasons = {os.path.basename(path): reason for path, reason in report.skipped.items()}
    assert set(reasons) == bad and report.new_skipped == 5
    assert reasons['empty.jpg'] == 'is empty' and '900000000 pixels' in reasons['bomb.png']
    assert 'truncated' in reasons['cut.jpg']
    assert ('not an image' if find_spec('pillow_heif') else '[photos]') in reasons['photo.heic']
    index = opened(pictures)
    assert len(index) == 13 and {str(pictures / name) for name in odd} <= set(index.paths)
    assert index.skipped == report.skipped
    check_against_the_slow_way(index)

    again = update(pictures)
    assert again.new_skipped == 0 and again.skipped == report.skipped
    assert update(pictures, retry=True).new_skipped == 5
    picture(7).save(pictures / 'empty.jpg')
    (pictures / 'text.jpg').unlink()
    report = update(pictures)
    assert report.new == 1 and {os.path.basename(path) for path in report.skipped} == bad - {'empty.jpg', 'text.jpg'}


def test_heic_where_there_is_a_decoder(pictures, model_folder):
    pytest.importorskip('pillow_heif').register_heif_opener()
    picture(0).save(pictures / 'photo.HEIC')
    report = make(pictures, model_folder, workers=1)
    assert report.images == 9 and not report.skipped
    assert opened(pictures).search_images([pictures / 'photo.HEIC'], 1)[0][0].path == str(pictures / 'photo.HEIC')


@pytest.mark.parametrize('vanishes', [False, True])
def test_a_file_that_changes_or_vanishes_while_it_is_read(pictures, model_folder, monkeypatch, vanishes):
    load = ImageFiles.load

    def disturbed(self, i, exif=True):
        image = load(self, i, exif)
        if self.paths[i].endswith('/0.png'):
            os.unlink(self.paths[i]) if vanishes else picture(50, (91, 71)).save(self.paths[i])
        return image
    monkeypatch.setattr(ImageFiles, 'load', disturbed)
    report = make(pictures, model_folder)
    assert report.images == 7
    assert report.skipped == ({} if vanishes else {str(pictures / '0.png'): 'it was changing while it was read'})
    monkeypatch.undo()
    assert update(pictures).new == (not vanishes) and not opened(pictures).skipped
    check_against_the_slow_way(opened(pictures))


def test_other_model_and_other_protocol(pictures, model_folder, tmp_path):
    make(pictures, model_folder)
    other = str(save_pretrained(tiny_model(seed=5), tmp_path / 'other', LABELS))
    for call in (lambda: update(pictures, other), lambda: opened(pictures).model(other),
                 lambda: opened(pictures).model(tiny_model(seed=5))):
        with pytest.raises(OtherModel, match=r'is not the model that .* was built with'):
            call()
    with pytest.raises(OtherModel, match='was built with crop 64, not crop 96'):
        update(pictures, protocol=Protocol(size=96))
    with pytest.raises(ValueError, match='was built with its own model: leave p out'):
        update(pictures, model_options={'p': 2})
    assert update(pictures, model_folder, protocol=PROTOCOL).unchanged == 8
    shutil.move(model_folder, tmp_path / 'moved')
    try:
        with pytest.raises(FileNotFoundError, match='name it with --model'):
            opened(pictures).search_images([picture(0)])
        index = opened(pictures)
        index.model(str(tmp_path / 'moved'))
        assert index.search_images([picture(0)], 1)[0][0].path.endswith('/0.png')
    finally:
        shutil.move(tmp_path / 'moved', model_folder)


def test_a_model_without_a_name_is_kept_inside(pictures):
    make(pictures, tiny_model(num_classes=0), half=True)
    index = opened(pictures)
    assert index.records(0).classes == () and index.label_names is None and index.vectors.dtype == np.float16
    hit = index.search_images([pictures / '0.png'], 1)[0][0]
    assert hit.path == str(pictures / '0.png') and hit.score == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match='predicts no classes'):
        index.search(index.vectors[:1], class_name='boat')
    index.config['model']['num_classes'] = 3
    with pytest.raises(ValueError, match='have no names: give a number from 0 to 2'):
        index.search(index.vectors[:1], class_name='boat')
    picture(9).save(pictures / '9.png')
    assert update(pictures).new == 1


def test_places_that_cannot_be(pictures, model_folder, tmp_path):
    (tmp_path / 'empty').mkdir()
    for folders, out, model, error, message in (
            ([tmp_path / 'nothing'], 'i', model_folder, FileNotFoundError, 'is not a folder'),
            ([pictures], 'pictures', model_folder, FileExistsError, 'holds other things'),
            ([pictures], 'pictures/0.png', model_folder, NotADirectoryError, '0.png'),
            ([tmp_path / 'empty'], 'i', model_folder, ValueError, 'No images in .*empty: nothing was made'),
            ([pictures], 'i', 'no model', FileNotFoundError, 'neither a folder'),
            ([], 'i', model_folder, ValueError, 'give the folders')):
        with pytest.raises(error, match=message):
            build_index(folders, tmp_path / out, model)
    assert not (tmp_path / 'i').exists()
    make(pictures, model_folder, index=pictures / 'index')
    assert update(pictures, index=pictures / 'index').unchanged == 8
    with index_lock(pictures / 'index'), pytest.raises(IndexInUse):
        update(pictures, index=pictures / 'index')


def test_an_empty_folder_is_taken_for_a_disk_that_is_not_there(pictures, model_folder):
    make(pictures, model_folder)
    shutil.rmtree(pictures)
    for folders in ([pictures], []):
        with pytest.raises(FileNotFoundError, match=r'with 8 images was not found: mount the disk; if it was moved'):
            build_index(folders, pictures.parent / 'index', workers=0)
    pictures.mkdir()
    with pytest.raises(FileNotFoundError, match='None of the 8 indexed images'):
        update(pictures)
    assert update(pictures, remove_missing=True).removed == 8 and len(opened(pictures)) == 0
    assert opened(pictures).search(np.ones((1, 96), dtype=np.float32))[1].shape == (1, 0)


def test_a_folder_that_was_moved_and_one_that_is_gone(pictures, model_folder, tmp_path, embedded, capsys):
    other, index = tmp_path / 'other', tmp_path / 'index'
    other.mkdir()
    picture(20).save(other / 'other.png')
    (pictures / 'bad.png').touch()
    make([pictures, other], model_folder)
    assert len(Index(index).skipped) == 1
    moved = tmp_path / 'elsewhere' / 'renamed'
    moved.parent.mkdir()
    os.rename(pictures, moved)
    (moved / '0.png').unlink()
    embedded.clear()
    report = update(moved, index=index)
    assert counts(report) == [9, 0, 0, 7, 0, 0, 0] and embedded == ['bad.png']
    here = [*map(str, moved.rglob('[1-9].png')), str(other / 'other.png')]
    assert sorted(Index(index).paths) == sorted([*here, str(pictures / '0.png')])
    # what has not moved with it stays until it is given up, by name or with all that is missing
    with pytest.raises(FileNotFoundError, match='with 1 image was not found'):
        build_index([], index, workers=0, progress=False)
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        build_index([tmp_path / 'typo'], index, remove_missing=True, workers=0, progress=False)
    assert build_index([moved], index, remove_missing=True, workers=0, progress=False).removed == 0
    assert main(['index', str(pictures), '-o', str(index), '--remove-missing', '--workers', '0']) == 0
    assert '8 images: 1 removed' in capsys.readouterr().out
    assert Index(index).skipped == {str(moved / 'bad.png'): 'is empty'}
    shutil.rmtree(other)
    report = build_index([], index, remove_missing=True, workers=0, progress=False)
    assert counts(report) == [7, 0, 0, 0, 0, 1, 7]
    assert build_index([], index, workers=0, progress=False).unchanged == 7


def test_search_images(pictures, model_folder):
    make(pictures, model_folder)
    index = opened(pictures)
    canvas = Image.new('RGB', (200, 150), 'white')
    canvas.paste(picture(3), (50, 30))
    hits, others = index.search_images([pictures / 'sub' / '5.png', picture(3)], 3)
    assert len(hits) == len(others) == 3 and hits[0].path.endswith('/5.png') and hits[0].score > 0.9999
    assert hits[0].score >= hits[1].score >= hits[2].score
    found = index.search_images([canvas], 1, crop=(50, 30, 90, 70))[0][0]
    assert found.path.endswith('/3.png') and found.score > 0.9999
    name = index.records(0).classes[0][0]
    rows = [i for i in range(8) if index.records(i).classes[0][0] == name]
    hits = index.search_images([picture(0)], 99, class_name=name)[0]
    assert sorted(hit.path for hit in hits) == sorted(index.paths[i] for i in rows)
    for error, message, arguments in (
            (ValueError, r"does not know the class 'bot'.*'boat'", {'class_name': 'bot'}),
            (ValueError, 'has nothing of picture 1, which is 90 x 70', {'crop': (90, 0, 5, 5)}),
            (UnreadableImage, 'no such file', {'images': ['nothing.jpg']}),
            (ValueError, 'at least one', {'k': 0})):
        with pytest.raises(error, match=message):
            index.search_images(**{'images': [picture(0)], **arguments})
    with pytest.raises(ValueError, match='the index'):
        index.search(np.ones((1, 3)))


def test_commands(pictures, model_folder, tmp_path, capsys, monkeypatch):
    os.rename(pictures / '0.png', os.fsencode(pictures) + b'/<b>\n\xff.png')
    index, page = str(tmp_path / 'index'), tmp_path / 'out' / 'page.html'
    assert main(['index', str(pictures), '-o', index, '--model', model_folder, '--size', '64', '--workers', '0']) == 0
    queries = [str(pictures / '2.png'), str(pictures / '4.png')]
    capsys.readouterr()
    assert main(['search', index, *queries, '-k', '8', '--html', str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith('<b>\\n\\udcff.png') for line in lines) and len(lines) == 2 * (1 + 8) + 1
    assert lines[1].endswith('/2.png') and lines[11].endswith('/4.png')
    text = page.read_text(encoding='utf-8')
    assert text.count('<img src="data:image/jpeg;base64,') == 18 and '&lt;b&gt;' in text and '<b>' not in text
    assert main(['search', index, queries[0], '-k', '2', '--json', '-', '--crop', '0,0,50,50', '--rerank', '3']) == 0
    out, err = capsys.readouterr()
    assert 'Re-ranked by 3 neighbours: 1 of 1 query;' in err and [hit['rank'] for hit in json.loads(out)] == [1, 2]
    page.unlink()
    assert main(['search', index, queries[0], '--crop', '0,0,50,50', '--html', str(page), '--local', '3']) == 0
    counts = [int(line.split()[2]) if 'details' in line else -1 for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(counts) == 8 and max(counts) == counts[0] and counts.count(-1) == 5 == counts[3:].count(-1)
    assert page.read_text(encoding='utf-8').count('details in common') == 3
    for arguments, message in [
            ([index, queries[0], '--local', '0'], 'local=0: give a number of images to verify'),
            ([index, 'nothing.png'], 'nothing.png: no such file'),
            ([str(tmp_path / 'no'), queries[0]], 'was not found'),
            ([queries[0], index], 'is a file, and an index is a folder'), ([index, queries[0], '-k', '-1'], 'k is -1'),
            ([index, queries[0], '--class', 'x'], 'does not know the class')]:
        assert main(['search', *arguments]) == 2 and message in capsys.readouterr().err
    (pictures / '4.png').unlink()
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(f'{queries[0]}\n\nnothing.png\n'.encode())))
    assert main(['search', index, '-', queries[1], '-k', '8']) == 1
    out, err = capsys.readouterr()
    assert err.count('nothing.png: no such file') == err.count('4.png: no such file') == 1
    lines = out.splitlines()
    assert lines[0] == f'{queries[0]}:' and len(lines) == 1 + 8
    assert [line.endswith('4.png  (gone)') for line in lines].count(True) == out.count('(gone)') == 1
    for flag, value, message in (('--crop', '1,2,3', 'is not left,top,width,height'),
                                 ('--rerank', '0', "'0' is not a number of neighbours")):
        with pytest.raises(SystemExit):
            main(['search', index, queries[0], flag, value])
        assert message in capsys.readouterr().err


def test_killed_indexing_goes_on(pictures, model_folder):
    for i in range(60):
        picture(i).save(pictures / f'many{i}.bmp')
    index = pictures.parent / 'index'
    with forked(lambda pipe: make(pictures, model_folder, batch_size=4)):
        while count(index) < 20:
            time.sleep(0.01)
    with pytest.warns(UserWarning, match=r'not complete; .* \d+ pictures. .* timm-multigrain index'):
        killed = Index(index)
    killed.store.check()
    seen = count(index)
    assert killed.pending == 68 - len(killed)
    report = update(pictures)
    assert Index(index).pending == 0
    assert 20 <= seen < 68 and counts(report)[:2] == [68, 68 - report.unchanged] and report.unchanged >= seen
    check_against_the_slow_way(Index(index))


def count(index):
    try:
        return len(Index(index))
    except (FileNotFoundError, ValueError):
        return 0


def test_one_name_of_a_class_will_do(tmp_path):
    index = Index(write_index(tmp_path / 'index', unit_vectors(6), classes=[0, 1, 2] * 2))
    index.config['model']['label_names'] = ['tench, Tinca tinca', 'car', 'Car, automobile']
    for name, rows in (('Tench', {0, 3}), ('tench, Tinca tinca', {0, 3}), ('car', {1, 4}), ('automobile', {2, 5})):
        assert set(index.search(index.vectors[:1], class_name=name)[1][0].tolist()) == rows
