"""Finding images: every name a file can have, links, folders that cannot be entered or lie deep."""
import inspect
import os
import sys

import pytest
from PIL import Image

from timm_multigrain.images.walk import scan_folders
from timm_multigrain.index.store import is_index

from .small_index import unit_vectors, write_index

ODD_NAMES = [b'new\nline.jpg', b'bad\xff\xfebyte.png', b' space .jpg ', b'-rf.jpg', 'ü\u202e.JPEG'.encode(),
             b'a;b$(c).gif', b'..jpg', b'%s.webp', b'"\'.tif']


def found(scan):
    return [(file.root, file.path) for file in scan.files]


def touch(path, content=b'x'):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(content)


def forbid(folder, scandir=os.scandir):
    """A scandir that may not enter a folder; root may enter all."""
    def guarded(path):
        if path == folder:
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    return guarded


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
    for name in (b'a.jpg', b'@eaDir/b.jpg', b'x/#recycle/c.jpg', b'.thumbnails/d.jpg', b'.e.jpg'):
        touch(root + b'/more/' + name)
    assert [path for _, path in found(scan_folders([root + b'/more']))] == [b'a.jpg']
    assert len(found(scan_folders([root + b'/more'], everything=True))) == 5


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
    monkeypatch.setattr(os, 'scandir', forbid(root + b'/closed'))
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
