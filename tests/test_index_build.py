"""Indexing real files: one pass against the slow way, updates, bad images, kills, changing files, other models."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multigrain.cli.main import main
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.sources import ImageFiles, UnreadableImage, read_image
from timm_multigrain.index import Index, IndexInUse, OtherModel, build, build_index
from timm_multigrain.index.store import index_lock

from .tiny import tiny_model

PROTOCOL = Protocol(size=64)
LABELS = ['boat', 'car', 'tree']


def picture(seed: int, size=(90, 70), mode='RGB') -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return image.convert(mode)


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


def update(pictures, model=None, **options):
    return build_index([pictures], pictures.parent / 'index', model, **{'workers': 0, 'progress': False, **options})


def make(pictures, model_folder, **options):
    return update(pictures, model_folder, protocol=PROTOCOL, **options)


def opened(pictures):
    return Index.open(pictures.parent / 'index')


def check_against_the_slow_way(index, model=None):
    """Every row recomputed image by image."""
    model, protocol = tiny_model() if model is None else model, index.protocol()
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
    assert (report.images, report.new, report.unchanged, report.other) == (8, 8, 0, 0)
    assert '8 images: 8 new' in str(report)
    index = opened(pictures)
    assert sorted(index.paths) == sorted(str(p) for p in pictures.rglob('*.png'))
    check_against_the_slow_way(index)
    info = index.info
    assert info['images'] == 8 and info['folders'] == [str(pictures)] and info['protocol']['size'] == 64
    assert info['model']['p'] and info['model']['source'] == model_folder and info['versions']['timm']


def test_update(pictures, model_folder, monkeypatch):
    make(pictures, model_folder)
    embedded = []
    init = ImageFiles.__init__

    def counted(self, paths, *args, **kwargs):
        init(self, paths, *args, **kwargs)
        embedded.extend(map(os.path.basename, self.paths))
    monkeypatch.setattr(ImageFiles, '__init__', counted)
    again = update(pictures)
    assert again.unchanged == 8 and not embedded and 'unchanged' in str(again)

    picture(100).save(pictures / '0.png')
    os.utime(pictures / '2.png', ns=(5, 5))
    os.rename(pictures / 'sub', pictures / 'elsewhere')
    (pictures / '4.png').unlink()
    shutil.copy(pictures / '6.png', pictures / 'copy.png')
    picture(101).save(pictures / 'new.png')
    report = update(pictures)
    assert sorted(embedded) == ['0.png', 'new.png']
    names = ('images', 'new', 'changed', 'moved', 'copied', 'removed', 'unchanged')
    assert [getattr(report, name) for name in names] == [9, 1, 1, 4, 1, 1, 2]
    index = opened(pictures)
    assert sorted(index.paths) == sorted(str(p) for p in pictures.rglob('*.png'))
    check_against_the_slow_way(index)
    assert index.records(index.paths.index(str(pictures / '2.png'))).mtime_ns == 5


def test_many_updates_against_a_new_index(pictures, model_folder, tmp_path):
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
        assert sorted(index.paths) == sorted(str(p) for p in pictures.rglob('*.png'))
    check_against_the_slow_way(index)
    assert index.store.state['generation'] > 1


def png_of_size(width, height):
    """A picture of one colour whose header states any size, cheap to store."""
    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    header = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([8, 0, 0, 0, 0])
    row = zlib.compress(bytes(width + 1))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', row) + chunk(b'IEND', b'')


def test_bad_and_odd_images(pictures, model_folder):
    (pictures / 'empty.jpg').touch()
    (pictures / 'text.jpg').write_text('no picture')
    picture(1, (400, 300)).save(pictures / 'cut.jpg')
    os.truncate(pictures / 'cut.jpg', 2000)
    (pictures / 'bomb.png').write_bytes(png_of_size(30_000, 30_000))
    (pictures / 'photo.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
    bad = {'empty.jpg', 'text.jpg', 'cut.jpg', 'bomb.png', 'photo.heic'}
    picture(2, mode='CMYK').save(pictures / 'cmyk.jpg')
    Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(pictures / '16bit.png')
    picture(3, mode='P').save(pictures / 'palette.png')
    for name in ('animated.gif', 'animated.webp'):
        picture(4).save(pictures / name, save_all=True, append_images=[picture(5), picture(6)])
    odd = [os.fsdecode(name) for name in (b'new\nline.png', b'bad\xffbyte.png', b'"quoted" \'$x.png')]
    for i, name in enumerate(odd):
        picture(10 + i).save(pictures / 'x.png')
        os.rename(pictures / 'x.png', pictures / name)
    report = make(pictures, model_folder, workers=1)
    assert {os.path.basename(path) for path in report.skipped} == bad and report.new_skipped == 5
    reasons = {os.path.basename(path): reason for path, reason in report.skipped.items()}
    assert reasons['empty.jpg'] == 'is empty' and '900000000 pixels' in reasons['bomb.png']
    assert 'truncated' in reasons['cut.jpg'] and 'pillow-heif' in reasons['photo.heic']
    index = opened(pictures)
    assert len(index) == 16 and {str(pictures / name) for name in odd} <= set(index.paths)
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


def test_an_image_that_becomes_unreadable_goes(pictures, model_folder):
    make(pictures, model_folder)
    (pictures / '0.png').write_bytes(b'')
    report = update(pictures)
    assert report.images == 7 and list(report.skipped.values()) == ['is empty']


def test_a_file_that_changes_while_it_is_read(pictures, model_folder, monkeypatch):
    load = ImageFiles.load

    def changing(self, i, exif=True):
        image = load(self, i, exif)
        if self.paths[i].endswith('/0.png'):
            picture(50, (91, 71)).save(self.paths[i])
        return image
    monkeypatch.setattr(ImageFiles, 'load', changing)
    report = make(pictures, model_folder)
    assert report.skipped == {str(pictures / '0.png'): 'it was changing while it was read'}
    assert len(opened(pictures)) == 7
    monkeypatch.undo()
    assert update(pictures).new == 1 and not opened(pictures).skipped
    check_against_the_slow_way(opened(pictures))


def test_a_file_that_vanishes(pictures, model_folder, monkeypatch):
    load = ImageFiles.load

    def vanishing(self, i, exif=True):
        if self.paths[i].endswith('/0.png'):
            os.unlink(self.paths[i])
        return load(self, i, exif)
    monkeypatch.setattr(ImageFiles, 'load', vanishing)
    report = make(pictures, model_folder)
    assert report.images == 7 and not report.skipped


def test_other_model_and_other_protocol(pictures, model_folder, tmp_path):
    make(pictures, model_folder)
    other = str(save_pretrained(tiny_model(seed=5), tmp_path / 'other', LABELS))
    for call in (lambda: update(pictures, other), lambda: opened(pictures).model(other),
                 lambda: opened(pictures).model(tiny_model(seed=5))):
        with pytest.raises(OtherModel, match=r'is not the model that .* was built with'):
            call()
    with pytest.raises(OtherModel, match='was built with crop 64, not crop 96'):
        update(pictures, protocol=Protocol(size=96))
    with pytest.raises(ValueError, match='without a model'):
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
    with pytest.raises(ValueError, match='the index'):
        opened(pictures).search(np.ones((1, 3)))


def test_a_model_without_a_name_is_kept_inside(pictures):
    model = tiny_model(num_classes=0)
    make(pictures, model)
    index = opened(pictures)
    assert index.records(0).classes == () and index.label_names is None
    assert index.search_images([pictures / '0.png'], 1)[0][0].path == str(pictures / '0.png')
    with pytest.raises(ValueError, match='predicts no classes'):
        index.search(index.vectors[:1], class_name='boat')
    picture(9).save(pictures / '9.png')
    assert update(pictures).new == 1


def test_places_that_cannot_be(pictures, model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        build_index([tmp_path / 'nothing'], tmp_path / 'i', model_folder)
    with pytest.raises(FileExistsError, match='holds other things'):
        build_index([pictures], pictures, model_folder)
    with pytest.raises(FileExistsError, match='is a file'):
        build_index([pictures], pictures / '0.png', model_folder)
    with pytest.raises(ValueError, match='name the model'):
        build_index([pictures], tmp_path / 'i')
    with pytest.raises(ValueError, match='give the folders'):
        build_index([], tmp_path / 'i', model_folder)
    assert not (tmp_path / 'i').exists()
    build_index([pictures], pictures / 'index', model_folder, PROTOCOL, workers=0, progress=False)
    assert build_index([pictures], pictures / 'index', workers=0).unchanged == 8


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


def test_a_folder_that_was_moved_and_one_that_is_gone(pictures, model_folder, tmp_path, monkeypatch, capsys):
    other, index = tmp_path / 'other', tmp_path / 'index'
    other.mkdir()
    picture(20).save(other / 'other.png')
    (pictures / 'bad.png').touch()
    build_index([pictures, other], index, model_folder, PROTOCOL, workers=0, progress=False)
    assert len(Index.open(index).skipped) == 1
    moved = tmp_path / 'elsewhere' / 'renamed'
    moved.parent.mkdir()
    os.rename(pictures, moved)
    (moved / '0.png').unlink()
    monkeypatch.setattr(build._Update, '_embed', lambda self, files, *args, **kwargs: [] if [
        os.path.basename(file.path) for file in files] == [b'bad.png'] else pytest.fail('something is embedded again'))
    report = build_index([moved], index, workers=0, progress=False)
    assert (report.moved, report.new, report.removed, report.images) == (7, 0, 0, 9)
    here = [*map(str, moved.rglob('[1-9].png')), str(other / 'other.png')]
    assert sorted(Index.open(index).paths) == sorted([*here, str(pictures / '0.png')])
    # what has not moved with it stays until it is given up, by name or with all that is missing
    with pytest.raises(FileNotFoundError, match='with 1 images was not found'):
        build_index([], index, workers=0, progress=False)
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        build_index([tmp_path / 'typo'], index, remove_missing=True, workers=0, progress=False)
    assert build_index([moved], index, remove_missing=True, workers=0, progress=False).removed == 0
    assert main(['index', str(pictures), '-o', str(index), '--remove-missing', '--workers', '0']) == 0
    assert '8 images: 1 removed' in capsys.readouterr().out and not Index.open(index).skipped
    shutil.rmtree(other)
    report = build_index([], index, remove_missing=True, workers=0, progress=False)
    assert (report.removed, report.unchanged, report.images) == (1, 7, 7)
    assert build_index([], index, workers=0, progress=False).unchanged == 7


def test_half(pictures, model_folder):
    make(pictures, model_folder, half=True)
    index = opened(pictures)
    assert index.vectors.dtype == np.float16 and len(index) == 8
    with torch.no_grad():
        for row, path in enumerate(index.paths):
            vector = tiny_model().embed(PROTOCOL.normalize(PROTOCOL.pixels(read_image(path)))[None])[0].numpy()
            assert np.allclose(index.vectors[row], vector, atol=1e-3)
    scores, rows = index.search(np.asarray(index.vectors)[:4], 8)
    assert np.allclose(scores, np.sort(scores)[:, ::-1]) and (np.sort(rows) == np.arange(8)).all()


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
    with pytest.raises(ValueError, match=r"does not know the class 'bot'.*'boat'"):
        index.search_images([picture(0)], class_name='bot')
    with pytest.raises(ValueError, match='has nothing of picture 1, which is 90 x 70'):
        index.search_images([picture(0)], crop=(90, 0, 5, 5))
    with pytest.raises(UnreadableImage, match='no such file'):
        index.search_images(['nothing.jpg'])
    for k in (0, -1):
        with pytest.raises(ValueError, match='at least one'):
            index.search_images([picture(0)], k)


def cli(*args, **kwargs):
    return subprocess.run([sys.executable, '-m', 'timm_multigrain', *map(str, args)], capture_output=True, **kwargs)


@pytest.mark.slow
def test_commands(pictures, model_folder, tmp_path, capsys):
    os.rename(pictures / '0.png', os.fsencode(pictures) + b'/<b>\n\xff.png')
    index = tmp_path / 'index'
    options = ['--model', model_folder, '--size', '64', '--workers', '0']
    run = cli('index', pictures, '-o', index, *options)
    assert run.returncode == 0 and b'8 images: 8 new' in run.stdout, run.stderr
    run = cli('search', index, pictures / '2.png', pictures / '4.png',
              '-k', '8', '--html', tmp_path / 'out' / 'page.html')
    assert run.returncode == 0, run.stderr
    text = run.stdout.decode()
    assert '<b>\\n\\udcff.png' in text and len(text.splitlines()) == 2 * (1 + 8) + 1
    assert [text.splitlines()[i].endswith(name) for i, name in ((1, '/2.png'), (11, '/4.png'))] == [True, True]
    page = (tmp_path / 'out' / 'page.html').read_text(encoding='utf-8')
    assert page.count('<img src="data:image/jpeg;base64,') == 18 and "default-src 'none'" in page
    assert page.count('>The query<') == 2 and '&lt;b&gt;' in page and '<b>' not in page and 'http:' not in page
    capsys.readouterr()
    assert main(['search', str(index), str(pictures / '2.png'), '-k', '2', '--json', '-', '--crop', '0,0,50,50']) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line['rank'] for line in lines] == [1, 2] and {'query', 'path', 'score', 'classes'} <= lines[0].keys()
    for arguments, message in [
            ([index, 'nothing.png'], 'nothing.png: no such file'),
            ([tmp_path / 'no', pictures / '2.png'], 'was not found'),
            ([index, pictures / '2.png', '--class', 'x'], 'does not know the class')]:
        assert main(['search', *map(str, arguments)]) == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['search', str(index), str(pictures / '2.png'), '--crop', '1,2,3'])
    assert 'is not left,top,width,height' in capsys.readouterr().err
    with index_lock(index):
        run = cli('index', pictures, '-o', index)
    assert run.returncode == 2 and b'being written to by another process' in run.stderr


@pytest.mark.slow
def test_killed_indexing_goes_on(pictures, model_folder, tmp_path):
    for i in range(200):
        picture(i).save(pictures / f'many{i}.bmp')
    index, seen = tmp_path / 'index', [0]
    arguments = [sys.executable, '-m', 'timm_multigrain', 'index', str(pictures), '-o', str(index), '--model',
                 model_folder, '--size', '64', '--batch-size', '4', '--workers', '1']
    for _ in range(2):
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and count(index) < seen[-1] + 40:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        Index.open(index).store.check()
        seen.append(len(Index.open(index)))
        assert seen[-1] >= seen[-2]
    report = build_index([pictures], index, workers=0, progress=False)
    assert report.unchanged >= seen[-1] and report.images == 208 and report.unchanged + report.new == 208
    check_against_the_slow_way(Index.open(index))


def count(index):
    try:
        return len(Index.open(index))
    except (FileNotFoundError, ValueError):
        return 0


def test_two_threads(pictures, model_folder):
    make(pictures, model_folder)
    with index_lock(pictures.parent / 'index'), pytest.raises(IndexInUse):
        update(pictures)
