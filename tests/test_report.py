"""The HTML report: complete, well-formed, escaped, self-contained, written in one step."""
import base64
import io
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.report import report
from timm_multigrain.report.report import GalleryRow, Neighbor, Table, write_report

VOID = {'meta', 'br', 'img'}
NASTY = [
    '<script>alert(1)</script>', 'a & b', '"quoted\' name"', 'two\nlines', 'bad\udc80byte', 'nul\x00', '$x_{',
    '{brace}',
]


class Page(HTMLParser):
    """Elements, text and attributes of a page whose tags must be nested properly."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], Counter(), [], ''
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ['style']:
            self.text += data

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def picture(color='red', size=(40, 30), mode='RGB'):
    return Image.new(mode, size, color)


def sample(**changes):
    query = picture()
    neighbors = [Neighbor(picture('blue'), 0.987, 'crop', 'copy'), Neighbor(picture(), 0.5, 'cat', 'class'),
                 Neighbor(picture(), -0.25, 'dog', 'other')]
    arguments = {
        'title': 'The title', 'intro': 'The intro.',
        'tables': [Table(['model', 'top-1', 'time'], [['a', 50.0, 7], ['b', 62.54, 9]], {'top-1': 'max'})],
        'curves': {
            'a': {'loss': ([0, 10], [2.0, 1.0])},
            'b': {'loss': ([0, 10], [2.5, 0.5]), 'margin': ([0, 10], [1, 0])},
        },
        'gallery': [GalleryRow(name, query, 'cat 1', neighbors, 'predicted: cat') for name in ('a', 'b')],
        'notes': ['A note.'], 'command': 'timm-multigrain demo',
    }
    return {**arguments, **changes}


def write(tmp_path, **changes):
    path = write_report(tmp_path / 'report.html', **sample(**changes))
    return Page(path.read_text(encoding='utf-8'))


def test_everything_is_shown(tmp_path):
    page = write(tmp_path)
    for text in ('The title', 'The intro.', '62.5', 'loss', 'margin', 'cat 1', 'Same class', '0.99', '-0.25', 'crop',
                 'predicted: cat', '1 of 3 are copies', 'A note.', 'timm-multigrain demo'):
        assert text in page.text
    assert page.tags['article'] == 1 and page.tags['section'] == 2 and page.tags['img'] == 1 + 2 * 3
    assert page.tags['figure'] == 2 + 1 + 2 * 3
    assert page.text.count('Query') == 1


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = write(tmp_path)
    text = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert not page.tags['script'] and not page.tags['link'] and 'url(http' not in text and '@import' not in text
    assert "default-src 'none'" in page.values('content')[0]
    for name in ('src', 'href', 'xlink:href', 'srcset', 'action'):
        assert all(value.startswith(('data:image/jpeg;base64,', '#')) for value in page.values(name))


def test_pictures(tmp_path):
    page = write(tmp_path)
    images = [Image.open(io.BytesIO(base64.b64decode(src.partition(',')[2]))) for src in page.values('src')]
    assert all(image.format == 'JPEG' and image.size == (40, 30) for image in images)
    assert np.allclose(images[1].getpixel((20, 15)), (0, 0, 255), atol=5)
    alt = page.values('alt')
    assert alt[:2] == ['Query: cat 1', 'Neighbour 1: crop, copy'] and len(alt) == len(images)


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'CMYK', 'P', '1'])
@pytest.mark.parametrize('size', [(1, 1), (5000, 1), (900, 700)])
def test_any_picture(tmp_path, mode, size):
    row = GalleryRow('m', Image.new(mode, size), 'q', [Neighbor(Image.new(mode, size), 1, 'n', 'other')])
    page = write(tmp_path, gallery=[row], curves=None)
    for src in page.values('src'):
        image = Image.open(io.BytesIO(base64.b64decode(src.partition(',')[2])))
        assert max(image.size) <= 200


@pytest.mark.parametrize('name', NASTY)
def test_names_are_escaped(tmp_path, name):
    row = GalleryRow(name, picture(), name, [Neighbor(picture(), 1, name, 'copy')], name)
    page = write(tmp_path, title=name, intro=name, gallery=[row], notes=[name], command=name,
                 tables=[Table([name, 'x'], [[name, name]], title=name)], curves={name: {name: ([0, 1], [1, 2])}},
                 curves_x=name)
    plain = write(tmp_path)
    assert page.tags.keys() <= plain.tags.keys() | {'caption'} and not page.tags['script']
    assert {key for _, key, _ in page.attributes} <= {key for _, key, _ in plain.attributes}
    shown = name.replace('\udc80', '\\udc80').replace('\x00', '\ufffd')
    assert page.text.count(shown) == 16
    assert page.values('alt') == [f'Query: {shown}', f'Neighbour 1: {shown}, copy']


def test_best_cells():
    def best(table):
        return re.findall(r'<td class="best">([^<]*)<', report._table(table))

    rows = [['a', 1.0, 3, 5.04], ['b', 2.0, 3, 5.01], ['c', None, 4, math.nan], ['d', 'n/a', 5, 4.0]]
    assert best(Table('mxyz', rows)) == []
    assert best(Table('mxyz', rows, {'x': 'max'})) == ['2.0']
    assert best(Table('mxyz', rows, {'y': 'min'})) == ['3', '3']
    assert best(Table('mxyz', rows, {'z': 'max'})) == ['5.0', '5.0']
    assert best(Table('mxyz', rows, {'z': 'max'}, digits=2)) == ['5.04']
    assert best(Table('mxyz', rows[2:], {'x': 'max', 'z': 'max'})) == []
    assert report._table(Table('mxyz', rows)).count('>–<') == 2
    with pytest.raises(ValueError, match='2 cells for 3 headers'):
        Table(['a', 'b', 'c'], [[1, 2]])
    for wrong in ({'nothing': 'max'}, {'m': 'most'}):
        with pytest.raises(ValueError, match='best must map'):
            Table(['m'], [], wrong)


def test_charts(tmp_path):
    page = write(tmp_path)
    assert page.tags['svg'] == 2 + 2
    labels = [label for tag, key, label in page.attributes if (tag, key) == ('svg', 'aria-label')]
    assert labels == ['loss by step: a from 2 to 1; b from 2.5 to 0.5', 'margin by step: b from 1 to 0']
    ids = page.values('id')
    assert len(ids) == len(set(ids))
    references = [value for name in ('href', 'xlink:href') for value in page.values(name)]
    references += re.findall(r'url\((#[^)]*)\)', str(page.attributes))
    assert references and {value[1:] for value in references} <= set(ids)
    assert not {'#010203', '#000000'} & set(re.findall('#[0-9a-f]{6}', str(page.attributes)))


def test_charts_show_the_values():
    """The drawn line is the data up to an affine map, with a gap where a value is not finite."""
    steps, values = [0, 1, 2, 3, 4, 5], [3., 1., math.nan, math.inf, 2., 5.]
    svg = report._chart({'a': (steps, values)}, {'a': ('#2f7fe6', '')}, 'c-')
    path, = re.findall(r'd="([^"]*)"[^>]*stroke: #2f7fe6', svg)
    assert re.findall('[ML]', path) == ['M', 'L', 'M', 'L']
    points = np.array(re.findall(r'[-\d.]+', path), dtype=float).reshape(-1, 2)
    for drawn, data in zip(points.T, ([0, 1, 4, 5], [3, 1, 2, 5]), strict=True):
        assert np.allclose(np.polyval(np.polyfit(data, drawn, 1), data), drawn, atol=1e-3)


def test_odd_curves(tmp_path):
    curves = {'a': {'one': ([3], [1.5]), 'none': ([], [])}, 'b': {}, 'c': {'tensor': (np.arange(3), np.ones(3))}}
    page = write(tmp_path, curves=curves)
    assert page.tags['figure'] == 3 + 1 + 2 * 3
    with pytest.raises(ValueError, match='b, loss: 1 values for 2 steps'):
        write(tmp_path, curves={'b': {'loss': ([0, 1], [1])}})


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r"pip install 'timm_multigrain\[report\]'"):
        write(tmp_path)
    assert not any(tmp_path.iterdir())
    assert 'Training' not in write(tmp_path, curves=None).text


def test_empty_sections_are_left_out(tmp_path):
    path = write_report(tmp_path / 'new' / 'page.html', 'T', 'I')
    page = Page(path.read_text(encoding='utf-8'))
    assert page.tags['h1'] == 1 and not page.tags['h2']


def test_bad_relation():
    with pytest.raises(ValueError, match="got 'twin'"):
        Neighbor(picture(), 1, 'n', 'twin')


def test_queries_are_grouped(tmp_path):
    one, two = picture(), picture()
    rows = [GalleryRow('a', one, 'q', []), GalleryRow('b', one, 'q', []), GalleryRow('a', two, 'q', [])]
    assert write(tmp_path, gallery=iter(rows)).tags['article'] == 2


def test_failure_keeps_the_old_page(tmp_path, monkeypatch):
    path = write_report(tmp_path / 'report.html', **sample())
    before = path.read_bytes()
    assert write_report(tmp_path / 'again.html', **sample()).read_bytes() == before
    (tmp_path / 'again.html').unlink()

    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(report.os, 'fsync', fail)
    with pytest.raises(OSError, match='disk full'):
        write_report(path, **sample(title='Other'))
    assert [p.name for p in tmp_path.iterdir()] == ['report.html'] and path.read_bytes() == before
