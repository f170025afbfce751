"""Pages: complete, well-formed, escaped, in need of nothing else, written in one step."""
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
import urllib.parse
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.index.dedup import Copies, CopyFile, CopyGroup
from timm_multigrain.index.index import Hit
from timm_multigrain.index.records import Record
from timm_multigrain.report import collection, report
from timm_multigrain.report.collection import search_json, search_table, write_copies_page, write_search_page
from timm_multigrain.report.report import Answer, Neighbor, Query, Table, write_report
from timm_multigrain.search.local import Match

VOID = {'meta', 'br', 'img', 'wbr'}
NASTY = '<script>alert("1\')</script> & {{ x }} {% y %} $x_{\x00\n\x1b[31m\u202e\udc80'
SPELLED = '<script>alert("1\')</script> & {{ x }} {% y %} $x_{\\x00\\n\\x1b[31m\\u202e\\udc80'


class Page(HTMLParser):
    """Elements, text and attributes of a page, whose tags must be nested properly and which must load nothing."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.style, self.script = [], Counter(), [], '', '', ''
        self.feed(path.read_text(encoding='utf-8'))
        self.close()
        policy = self.values('content')[0]
        assert not self.open and self.tags['script'] == bool(self.script) and not self.tags['link']
        digest = base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy if self.script else 'script' not in policy
        assert "default-src 'none'" in policy and not re.search('@import|url', self.style)
        assert not any(name.startswith('on') for _, name, _ in self.attributes)
        for name in ('src', 'xlink:href', 'srcset', 'action'):
            assert all(value.startswith(('data:image/jpeg;base64,', '#')) for value in self.values(name))
        assert not any(re.match('[a-zA-Z]+:|//', value) for value in self.values('href'))  # files beside it

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ['style']:
            self.style += data
        elif self.open[-1:] == ['script']:
            self.script += data
        else:
            self.text += data

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]

    def pictures(self):
        return [Image.open(io.BytesIO(base64.b64decode(src.partition(',')[2]))) for src in self.values('src')]


def picture(color='red', size=(40, 30), mode='RGB'):
    return Image.new(mode, size, color)


def write(folder, **changes):
    neighbors = [Neighbor(picture('blue'), 0.987, 'crop', 'copy'), Neighbor(picture(), 0.5, 'cat', 'class'),
                 Neighbor(picture(), -0.25, 'dog', 'other')]
    arguments = {
        'title': 'The title', 'intro': 'The intro.',
        'tables': [Table('Table', ['model', 'top-1', 'time'], [['a', '50.0', '7'], ['b', '62.5', '9']])],
        'curves': {
            'a': {'loss': ([0, 10], [2.0, 1.0])},
            'b': {'loss': ([0, 10], [2.5, 0.5]), 'margin': ([0, 10], [1, 0])},
        },
        'gallery': [Query(picture(), 'cat 1', [Answer(name, neighbors, 'predicted: cat') for name in 'ab'])],
        'notes': ['A note.'], 'command': 'timm-multigrain demo',
    }
    return Page(write_report(folder / 'report.html', **{**arguments, **changes}))


def test_a_report_shows_everything(tmp_path):
    page = write(tmp_path)
    for text in ('The title', 'The intro.', 'Table', '62.5', 'loss', 'margin', 'cat 1', 'Same class', '0.99', '-0.25',
                 'crop', 'predicted: cat', '1 of 3 are copies', 'A note.', 'timm-multigrain demo', 'by step'):
        assert text in page.text
    assert page.tags['article'] == 1 and page.tags['section'] == 2 and page.tags['figure'] == 2 + 1 + 2 * 3
    assert page.values('alt')[:2] == ['Query: cat 1', 'Neighbour 1: crop, copy'] and page.tags['img'] == 1 + 2 * 3
    images = page.pictures()
    assert all(image.format == 'JPEG' and image.size == (40, 30) for image in images)
    assert np.allclose(images[1].getpixel((20, 15)), (0, 0, 255), atol=5)
    empty = Page(write_report(tmp_path / 'new' / 'page.html', 'T', 'I'))
    assert empty.tags['h1'] == 1 and not empty.tags['h2']


def test_names_are_escaped_and_without_control_characters(tmp_path):
    page = write(tmp_path, title=NASTY, intro=NASTY, notes=[NASTY], command=NASTY, curves_x=NASTY,
                 gallery=[Query(picture(), NASTY, [Answer(NASTY, [Neighbor(picture(), 1, NASTY, 'copy')], NASTY)])],
                 tables=[Table(NASTY, [NASTY, 'x'], [[NASTY, NASTY]])], curves={NASTY: {NASTY: ([0, 1], [1, 2])}})
    plain = write(tmp_path)
    assert page.tags.keys() == plain.tags.keys()
    assert {key for _, key, _ in page.attributes} <= {key for _, key, _ in plain.attributes}
    assert page.text.count(SPELLED) == 16
    assert page.values('alt') == [f'Query: {SPELLED}', f'Neighbour 1: {SPELLED}, copy']
    raw = (tmp_path / 'report.html').read_bytes()
    assert not re.search(rb'[\x00-\x09\x0b-\x1f]', raw)


def test_charts(tmp_path):
    page = write(tmp_path, curves={
        'a': {'loss': ([0, 10], [2.0, 1.0]), 'one': ([3], [1.5]), 'none': ([], [])}, 'b': {},
        'c': {'loss': (np.arange(3), np.ones(3))}})
    labels = [label for tag, key, label in page.attributes if (tag, key) == ('figure', 'aria-label')]
    assert labels == ['loss by step: a from 2 to 1; c from 1 to 1', 'one by step: a from 1.5 to 1.5', 'none by step: ']
    assert page.tags['svg'] == 3 + 3
    ids = page.values('id')
    assert len(ids) == len(set(ids))
    references = [value for name in ('href', 'xlink:href') for value in page.values(name)]
    references += re.findall(r'url\((#[^)]*)\)', str(page.attributes))
    assert references and {value[1:] for value in references} <= set(ids)
    assert not {report.INK, '#000000'} & set(re.findall('#[0-9a-f]{6}', str(page.attributes)))


def test_charts_show_the_values():
    """The drawn line is the data up to an affine map, with a gap where a value is not finite."""
    steps, values = [0, 1, 2, 3, 4, 5], [3., 1., math.nan, math.inf, 2., 5.]
    svg = report._chart({'a': (steps, values)}, {'a': ('#2f7fe6', '')}, 'c-')
    path, = re.findall(r'd="([^"]*)"[^>]*stroke: #2f7fe6', svg)
    assert re.findall('[ML]', path) == ['M', 'L', 'M', 'L']
    points = np.array(re.findall(r'[-\d.]+', path), dtype=float).reshape(-1, 2)
    for drawn, data in zip(points.T, ([0, 1, 4, 5], [3, 1, 2, 5]), strict=True):
        assert np.allclose(np.polyval(np.polyfit(data, drawn, 1), data), drawn, atol=1e-3)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r"pip install 'timm_multigrain\[report\]'"):
        write(tmp_path)
    assert not any(tmp_path.iterdir())
    assert 'Training' not in write(tmp_path, curves=None).text


def record(path, size=(40, 30), classes=()):
    return Record(str(path), *size, 2_500_000, '0' * 64, 7, classes)


@pytest.fixture
def found(tmp_path):
    """Three results: the query itself, one with a name that nobody wants, and one that is gone."""
    names = ['query.png', '<b>\n\udc80.png', 'gone.png']
    for name, color in zip(names[:2], ('red', 'blue'), strict=True):
        picture(color).save(tmp_path / name)
    classes = [(('<i>\x1b', 0.25),), (), ()]
    return [Hit(str(tmp_path / name), 1 - i / 10, record(tmp_path / name, classes=classes[i]))
            for i, name in enumerate(names)]


def test_search_page(tmp_path, found):
    query = found[0].path
    page = Page(write_search_page(tmp_path / 'page.html', 'an <index>', [query, query], [found, []], (20, -5, 30, 20),
                                  'a class'))
    for text in ('in an <index> to 2 pictures, of class a class.', '1. 1.000', '2. 0.900', '<b>\\n\\udc80.png',
                 '<i>\\x1b 25 %', '40\xa0×\xa030', 'The file cannot be read now.', 'Nothing found.'):
        assert text in page.text
    assert page.text.count('The query') == 1 and not page.tags['b'] and page.text.count(str(tmp_path)) > 2
    shown, *results, again = page.pictures()
    assert len(results) == 2 and shown.size == again.size == (40, 30)
    assert np.allclose(shown.getpixel((30, 8)), (255, 0, 0), atol=30)  # inside of the part
    assert np.allclose(shown.getpixel((5, 25)), (255, 153, 153), atol=30)  # outside, dimmed
    points = np.array([[0, 0], [40, 30]], dtype=np.float32)
    matched = [replace(hit, match=Match(points, points)) for hit in found]
    page = Page(write_search_page(tmp_path / 'page.html', 'i', [query], [matched], (0, 0, 9, 9)))
    assert page.text.count('2 details in common') == 3 and len(page.pictures()) == 3
    pair = page.pictures()[2]  # the part of the red query, and the blue picture
    assert pair.size == (800, 400) and np.allclose(pair.getpixel((200, 350)), (255, 0, 0), atol=30)
    assert np.allclose(pair.getpixel((500, 250)), (0, 0, 255), atol=30)
    gone = Page(write_search_page(tmp_path / 'page.html', 'i', [found[2].path], [found], (0, 0, 9, 9)))
    assert 'to 1 picture.' in gone.text and len(gone.pictures()) == 2


def test_search_text(found):
    query = found[0].path
    lines = search_table([query, query], [found, []]).splitlines()
    assert lines[0] == f'{query}:' and lines[1] == f'   1   1.000  <i>\\x1b 25 %  {query}'
    assert lines[2].endswith(r'<b>\n\udc80.png') and lines[-1] == '  nothing found'
    verified = replace(found[0], match=Match(np.ones((2, 2)), np.ones((2, 2))))
    assert '   2 details  <i>' in search_table([query], [[verified]])
    assert [hit['details'] for hit in search_json([query], [[verified, found[1]]])] == [2, None]
    first, second, _ = search_json([query], [found])
    assert (first['query'], first['rank'], first['classes']) == (query, 1, (('<i>\x1b', 0.25),))
    assert second['path'] == found[1].path and second['bytes'] == 2_500_000


def test_copies_page(tmp_path, found, monkeypatch):
    monkeypatch.setattr(collection, 'MAX_FILES', 2)
    monkeypatch.setattr(collection, 'MAX_GROUPS', 3)
    kept = [CopyFile(hit.record, 1., keep=True) for hit in found]
    same = CopyGroup('exact', (kept[0], CopyFile(found[1].record, 1., 'identical', reason='older')))
    near = CopyGroup('near', (kept[2], *(CopyFile(hit.record, 0.91, 'details', ('mirrored',), reason='in colour')
                                         for hit in found[1::-1])))
    page = Page(write_copies_page(tmp_path / 'page.html', Copies((same, near, near, same), None, 5), 'Copies <of> it'))
    for text in ('Copies <of> it', '5 images', '2 groups of identical files', '2 groups of copies and near-duplicates',
                 'Identical', 'Certain', 'mirrored', '40 × 30, 2.5 MB', '5.0 MB to gain', '3 files; kept: in colour',
                 'and 1 more files', '<b>\\n\\udc80.png',
                 'The file cannot be read now.', '1 more groups are not shown; --json has them'):
        assert text in page.text, text
    assert page.tags['section'] == 3 and len(page.pictures()) == 4 and not page.tags['b']
    assert page.values('aria-pressed') == ['false', 'true', 'false'] * 3  # kept; surplus, and not flipped
    assert {json.loads(path) for path in page.values('data-path')} == {found[0].path, found[2].path}
    assert page.text.count('Keep') == 6 and len(page.values('title')) == 3  # a name that is not UTF-8 cannot be marked
    links = [urllib.parse.unquote_to_bytes(link) for link in page.values('href')]
    assert {os.path.join(os.fsencode(tmp_path), link) for link in links} == {os.fsencode(hit.path) for hit in found}
