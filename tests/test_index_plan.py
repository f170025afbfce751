"""Finding images: every name a file can have, links, folders that cannot be entered; and telling what has changed."""
import inspect
import os
import sys

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.images.walk import scan_folders
from timm_multigrain.index.build import make_plan, sha256_of
from timm_multigrain.index.records import RECORD
from timm_multigrain.index.store import Store, is_index

from .small_index import record, unit_vectors, write_index, writer_of

ODD_NAMES = [b'new\nline.jpg', b'bad\xff\xfebyte.png', b' space .jpg ', b'-rf.jpg', 'ü\u202e.JPEG'.encode(),
             b'a;b$(c).gif', b'..jpg', b'%s.webp', b'"\'.tif']


def found(scan):
    return [(file.root, file.path) for file in scan.files]


def touch(path, content=b'x'):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(content)


def test_names_and_kinds(tmp_path):
    root = os.fsencode(tmp_path)
    for name in ODD_NAMES:
        touch(root + b'/sub/' + name)
    for name in (b'note.txt', b'.hidden.jpg', b'.git/a.jpg', b'movie.mp4', b'paper.pdf', b'deep/er/x.heic'):
        touch(root + b'/' + name)
    os.mkdir(root + b'/cache')
    Image.new('L', (1, 1)).save(tmp_path / 'cache' / '0123abcd', 'JPEG')
    touch(root + b'/cache/README', b'no picture')
    os.mkfifo(root + b'/pipe.jpg')
    scan = scan_folders([root], by_content=True)
    images = [name for name in ODD_NAMES if name not in (b'..jpg', b' space .jpg ')]  # hidden; another extension
    assert sorted(path for _, path in found(scan)) == sorted(
        [b'cache/0123abcd', b'deep/er/x.heic', *(b'sub/' + name for name in images)])
    assert scan.other == 5 and not scan.unreadable
    assert all(file.size == os.stat(os.path.join(root, file.path)).st_size for file in scan.files)
    assert found(scan_folders([root], by_content=True)) == found(scan)
    assert len(found(scan_folders([root]))) == len(found(scan)) - 1


def test_links(tmp_path):
    root = os.fsencode(tmp_path / 'a')
    touch(root + b'/x/1.jpg')
    touch(root + b'/x/2.jpg')
    touch(os.fsencode(tmp_path) + b'/outside/3.jpg')
    touch(os.fsencode(tmp_path) + b'/single.jpg')
    os.symlink(b'..', root + b'/x/loop')
    os.symlink(b'loop2', root + b'/x/loop2')
    os.symlink(root + b'/x', root + b'/again')
    os.symlink(os.fsencode(tmp_path) + b'/outside', root + b'/away')
    os.symlink(root + b'/x/1.jpg', root + b'/0-first.jpg')
    os.symlink(os.fsencode(tmp_path) + b'/single.jpg', root + b'/single.jpg')
    os.symlink(b'nowhere', root + b'/dangling.jpg')
    scan = scan_folders([root])
    assert found(scan) == [(0, b'x/1.jpg'), (0, b'x/2.jpg'), (0, b'away/3.jpg'), (0, b'single.jpg')]
    assert set(scan.unreadable) == {root + b'/dangling.jpg', root + b'/x/loop2'}


def test_several_folders(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b'a/1.jpg', b'a/b/2.jpg', b'c/3.jpg', b'c/index/4.jpg'):
        touch(root + b'/' + name)
    write_index(tmp_path / 'c' / 'other', unit_vectors(2))
    touch(root + b'/c/other/5.jpg')
    folders = [root + b'/a/b', root + b'/a', root + b'/c', root + b'/a']
    scan = scan_folders(folders, leave_out=[root + b'/c/index'], skip=is_index)
    assert found(scan) == [(0, b'2.jpg'), (1, b'1.jpg'), (2, b'3.jpg')]
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        scan_folders([root + b'/nothing'])
    with pytest.raises(NotADirectoryError):
        scan_folders([root + b'/a/1.jpg'])


def test_folders_that_cannot_be_entered(tmp_path, monkeypatch):
    root = os.fsencode(tmp_path)
    touch(root + b'/closed/1.jpg')
    touch(root + b'/open/2.jpg')
    scandir = os.scandir

    def guarded(path):
        if path == root + b'/closed':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', guarded)
    scan = scan_folders([root])
    assert found(scan) == [(0, b'open/2.jpg')] and scan.unreadable == {root + b'/closed': 'Permission denied'}


def test_very_deep_folders(tmp_path):
    path = os.fsencode(tmp_path)
    for _ in range(300):
        path += b'/d'
    touch(path + b'/x.jpg')
    limit, depth = sys.getrecursionlimit(), len(inspect.stack())
    sys.setrecursionlimit(depth + 100)
    try:
        assert len(scan_folders([os.fsencode(tmp_path)]).files) == 1
    finally:
        sys.setrecursionlimit(limit)


def index_of(tmp_path, files):
    """An index that holds these files as they are now."""
    path = write_index(tmp_path / 'index', unit_vectors(0), root=tmp_path / 'pictures')
    rows = []
    for name in files:
        status, digest = os.stat(tmp_path / 'pictures' / name), sha256_of(tmp_path / 'pictures' / name)
        rows.append(record(bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=list(digest)))
    with writer_of(path) as writer:
        writer.add([os.fsencode(name) for name in files], np.array(rows, dtype=RECORD), unit_vectors(len(files)))
        writer.skip(0, b'bad.jpg', 'is empty', 1, os.stat(tmp_path / 'pictures' / 'bad.jpg').st_mtime_ns)
        writer.skip(0, b'bad-gone.jpg', 'is empty', 0, 5)
        writer.commit()
    return Store(path)


def test_plan(tmp_path):
    pictures = tmp_path / 'pictures'
    names = ['same.jpg', 'touched.jpg', 'changed.jpg', 'resized.jpg', 'moved.jpg', 'gone.jpg', 'twin.jpg',
             'twin-gone.jpg']
    for i, name in enumerate(names):
        touch(str(pictures / name), b'twin' if name.startswith('twin') else b'content %d' % i)
    touch(str(pictures / 'bad.jpg'), b'b')
    store = index_of(tmp_path, names)
    os.utime(pictures / 'touched.jpg', ns=(1, 1))
    touch(str(pictures / 'changed.jpg'), b'CONTENT 2')
    os.utime(pictures / 'changed.jpg', ns=(2, 2))
    touch(str(pictures / 'resized.jpg'), b'longer content')
    os.makedirs(pictures / 'sub')
    os.rename(pictures / 'moved.jpg', pictures / 'sub' / 'elsewhere.jpg')
    (pictures / 'gone.jpg').unlink()
    os.rename(pictures / 'twin-gone.jpg', pictures / 'zz.jpg')
    touch(str(pictures / 'copy.jpg'), b'content 0')
    touch(str(pictures / 'new.jpg'), b'new')
    folders = [os.fsencode(pictures)]
    plan = make_plan(store, scan_folders(folders), folders)
    names = [file.path for file in plan.embed]
    assert plan.unchanged == 2 and names == [b'changed.jpg', b'resized.jpg', b'new.jpg']
    assert {os.path.basename(path): number for path, number in plan.replaces.items()} == {
        b'changed.jpg': 2, b'resized.jpg': 3}
    assert [(file.path, row) for file, row in plan.renew] == [
        (b'touched.jpg', 1), (b'zz.jpg', 7), (b'sub/elsewhere.jpg', 4)]
    assert [(file.path, row) for file, row in plan.copy] == [(b'copy.jpg', 0)]
    assert plan.gone == [5] and plan.moved == 2
    assert plan.recovered == [(0, b'bad-gone.jpg')]
    assert len(make_plan(store, scan_folders(folders), folders, retry=True).embed) == 4


def test_images_elsewhere_are_left_alone(tmp_path):
    for name in ('a/1.jpg', 'b/2.jpg', 'bad.jpg'):
        touch(str(tmp_path / 'pictures' / name), name.encode())
    store = index_of(tmp_path, ['a/1.jpg', 'b/2.jpg'])
    (tmp_path / 'pictures' / 'b' / '2.jpg').unlink()
    (tmp_path / 'pictures' / 'a' / '1.jpg').unlink()
    folders = [os.fsencode(tmp_path / 'pictures' / 'a')]
    assert make_plan(store, scan_folders(folders), folders).gone == [0]
    folders = [os.fsencode(tmp_path / 'pictures')]
    scan = scan_folders(folders)
    scan.unreadable[folders[0] + b'/a'] = 'Permission denied'
    assert make_plan(store, scan, folders).gone == [1]
