"""Archives of image sets: what they may write, and what a download is checked against."""
import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.measure.archives import RemoteFile, fetch_files, unpack
from timm_multigrain.models.download import download

pytestmark = pytest.mark.skipif(not hasattr(tarfile, 'data_filter'), reason='this Python cannot unpack a tar safely')
FILES = {'jpg/a.jpg': b'aaa' * 50, 'jpg/b.jpg': b'', 'c.txt': os.urandom(5000)}


def tar(entries, mode='w:gz'):
    """Bytes of a tar archive; an entry is content, or a TarInfo for what is not a plain file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo()
            info.name, info.size = name, 0 if info is content else len(content)
            file.addfile(info, None if info is content else io.BytesIO(content))
    return buffer.getvalue()


def zipped(entries, mode=0):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, mode << 16
            file.writestr(info, content)
    return buffer.getvalue()


def special(kind, link=''):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def write(path, content):
    path.write_bytes(content)
    return path


ENDS_WITH_ZIP = {'c.txt': b'x', 'z.zip': zipped(FILES)}


@pytest.mark.parametrize('content, files', [
    (tar(FILES), FILES), (tar(FILES, 'w'), FILES), (zipped(FILES), FILES), (zipped(FILES, stat.S_IFREG | 0o777), FILES),
    (tar(ENDS_WITH_ZIP, 'w'), ENDS_WITH_ZIP)], ids=['tgz', 'tar', 'zip', 'unix zip', 'tar that ends with a zip'])
def test_unpacks_what_is_in_it(tmp_path, content, files):
    for _ in range(2):  # the second time over itself
        unpack(write(tmp_path / 'archive', content), tmp_path / 'out')
        assert tree(tmp_path / 'out') == files
    assert not os.stat(tmp_path / 'out' / 'c.txt').st_mode & stat.S_IXUSR


@pytest.mark.parametrize('make', [tar, zipped])
@pytest.mark.parametrize('name', ['../up.txt', 'jpg/../../up.txt', '..', '/tmp/absolute.txt', 'C:/x.txt', 'a\\..\\up'])
def test_paths_that_lead_out(tmp_path, make, name):
    archive = write(tmp_path / 'archive', make({'first.jpg': b'x', name: b'y'}))
    if make is tar and '..' in name.split('/'):
        with pytest.raises(ValueError, match='was not unpacked'):
            unpack(archive, tmp_path / 'out')
        assert tree(tmp_path) == {'archive': archive.read_bytes()}  # not even the good file before it
    with contextlib.suppress(ValueError):
        unpack(archive, tmp_path / 'out')
    assert set(tree(tmp_path)) - {'archive'} <= {f'out/{path}' for path in tree(tmp_path / 'out')}
    assert not os.path.exists('/tmp/absolute.txt') and not list((tmp_path / 'out').glob('.*'))


@pytest.mark.parametrize('content', [
    tar({'a.jpg': b'x', 'b': special(kind, link)}) for kind, link in [
        (tarfile.SYMTYPE, '/etc/passwd'), (tarfile.SYMTYPE, '../up'), (tarfile.LNKTYPE, '../up'),
        (tarfile.FIFOTYPE, ''), (tarfile.CHRTYPE, '')]],
    ids=['symlink', 'symlink out', 'hard link', 'fifo', 'device'])
def test_links_and_devices(tmp_path, content):
    with pytest.raises(ValueError, match='was not unpacked'):
        unpack(write(tmp_path / 'archive', content), tmp_path / 'out')
    assert not tree(tmp_path / 'out')
    unpack(write(tmp_path / 'archive', zipped({'b': b'/etc/passwd'}, stat.S_IFLNK | 0o777)), tmp_path / 'out')
    assert not (tmp_path / 'out' / 'b').is_symlink()


def test_a_link_that_was_there_before(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'out' / 'jpg').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match='through a link'):
        unpack(write(tmp_path / 'archive', tar(FILES)), tmp_path / 'out')
    assert not tree(tmp_path / 'elsewhere')


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_bytes(tmp_path_factory, data):
    """Whatever the bytes, files or a ValueError, and nothing outside of the folder."""
    make = data.draw(st.sampled_from([tar, zipped, lambda files: tar(files, 'w')]))
    content = bytearray(make({**FILES, 'd/../e' * 30: b'e'}))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp('a')
    archive = write(folder / 'archive', bytes(content[:data.draw(st.integers(0, len(content)))]))
    with contextlib.suppress(ValueError):
        unpack(archive, folder / 'out')
    assert sorted(os.listdir(folder)) == ['archive', 'out']


def test_what_a_killed_download_left_goes_and_nothing_else(server, tmp_path):
    names = ['.w.pth-0123abcd', '.w.pth-0123abce', '.w.pth-backup', '.x.pth-0123abcd']
    for name in names:
        write(tmp_path / name, b'')
        os.utime(tmp_path / name, None if name.endswith('e') else (1, 1))
    download(server.add('w.pth', b'weights'), tmp_path / 'w.pth')
    assert sorted(os.listdir(tmp_path)) == [*names[1:], 'w.pth']


def test_fetch(server, tmp_path, capsys):
    """An archive and a plain file, the second after a failure; called again, nothing is asked for."""
    archive, plain = tar(FILES), b'ground truth'
    first = RemoteFile(server.add('set.tar.gz', archive), 'images')
    second = RemoteFile(first.url.replace('set.tar.gz', 'gnd.pkl'))
    with pytest.raises(FileNotFoundError, match=r'gnd\.pkl could not be downloaded.*unpack it into'):
        fetch_files([first, second], tmp_path / 'set')
    server.add('gnd.pkl', plain)
    asked = len(server.requests)
    fetch_files([first, second], tmp_path / 'set')
    assert len(server.requests) == asked + 1
    found = tree(tmp_path / 'set')
    manifest = json.loads(found.pop('downloads.json'))
    assert found == {'gnd.pkl': plain, **{f'images/{name}': content for name, content in FILES.items()}}
    assert manifest[first.url] == {'bytes': len(archive), 'sha256': hashlib.sha256(archive).hexdigest(), 'done': True}
    fetch_files([first, second], tmp_path / 'set')
    assert 'there already' in capsys.readouterr().out and manifest[second.url]['done']
    assert len(server.requests) == asked + 1


def test_content_that_changed_since_it_was_first_trusted(server, tmp_path):
    """An unsafe archive is not kept, but its hash is: what comes next from there has to be equal."""
    remote = RemoteFile(server.add('a.tar', tar({'../a': b''}, 'w')))
    with pytest.raises(ValueError, match='was not unpacked'):
        fetch_files([remote], tmp_path / 'set')
    server.add('a.tar', tar(FILES, 'w'))
    with pytest.raises(ValueError, match=r'downloads\.json has from its first download.*was deleted'):
        fetch_files([remote], tmp_path / 'set')
    assert list(tree(tmp_path / 'set')) == ['downloads.json']


def test_a_python_without_the_filter_of_tarfile(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, 'data_filter')
    with pytest.raises(RuntimeError, match='safely: take'):
        unpack(write(tmp_path / 'a.tar', tar(FILES)), tmp_path / 'set')
    with pytest.raises(RuntimeError, match='by hand'):  # before anything is downloaded
        fetch_files([RemoteFile('http://127.0.0.1:9/a.tar.gz')], tmp_path / 'set')
    unpack(write(tmp_path / 'a.zip', zipped(FILES)), tmp_path / 'set')
    assert tree(tmp_path / 'set') == FILES
