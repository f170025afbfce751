"""The web app and a report in a headless browser, wide and of a phone's width; nothing comes from elsewhere."""
import threading

import pytest

from timm_multigrain.app import answers
from timm_multigrain.index.dedup import find_copies
from timm_multigrain.report.report import Table, write_report

from .browser import browsing, needs_browser
from .copies_folder import make_index, make_pictures
from .test_app import running

pytest.importorskip('gradio')
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp('browser') / 'pictures', 8)


@pytest.fixture(scope='module')
def index(pictures):
    boxes = pictures.parent / 'boxes.csv'
    boxes.write_text('path,box,category\n5.png,24 0 72 48,upper\n')
    return make_index(pictures, pictures.parent / 'index', boxes=boxes)


@pytest.fixture(scope='module')
def url(index):
    with running(index) as address:
        yield address


@pytest.fixture(scope='module', params=[1400, 390], ids=['wide', 'phone'])
def browser(request, tmp_path_factory):
    with browsing(tmp_path_factory.mktemp('profile'), request.param) as page:
        yield page


wide = pytest.mark.parametrize('browser', [1400], indirect=True, ids=['wide'])  # where a phone is the same


@pytest.fixture
def page(browser, url):
    browser.driver.get_log('performance')
    browser.driver.get(url)
    browser.wait(lambda: 'most like yours' in browser.text('#state'))
    return browser


def found(page, name):
    """Wait for the end of a search and the name of what it finds first."""
    page.wait(lambda: name in page.text('#hits button') and 'nearest first' in page.text('#state'))


def width(page, what='#search'):
    return page.run('return document.querySelector(arguments[0]).getBoundingClientRect().width', what)


def test_search_a_part_and_look(page, pictures, url):
    before = width(page)
    page.find('#file').send_keys(str(pictures / '3.png'))
    found(page, '3.png')
    assert page.text('#hits button').startswith('1.000') and '%' in page.text('#classes')
    page.screenshot('found')

    frame = page.find('#query .frame').rect  # 32 of 96 pixels, far from the whole: another picture is nearer
    side = frame['width'] / 3
    page.act('#query .frame').move_by_offset(-side / 2, -side / 2).click_and_hold().move_by_offset(
        side / 2, side / 3).move_by_offset(side / 2, side - side / 3).release().perform()
    found(page, '7.png')
    part = page.find('#query .part')
    assert part.is_displayed() and part.rect['width'] == pytest.approx(side, abs=3)
    assert part.rect['x'] == pytest.approx(frame['x'] + side, abs=3)
    page.screenshot('part')

    page.click('#hits button', 1)
    page.wait(lambda: page.text('dialog code') == str(pictures / page.text('#hits button', 1).split()[1]))
    assert page.find('dialog .part').is_displayed()
    pictures_beside = [image.rect['width'] for image in page.all('dialog img')]
    assert min(pictures_beside) > 0.4 * min(page.width, 900)
    page.screenshot('look')
    page.click('dialog [data-do=copy]')
    assert page.run('return getSelection().toString()') == page.text('dialog code')
    page.click('dialog a')
    page.wait(lambda: list(page.folder.glob('*.jpg')))
    page.press(Keys.ARROW_LEFT)
    page.wait(lambda: page.text('dialog code') == str(pictures / '7.png'))
    page.press(Keys.ESCAPE)
    assert not page.find('dialog').is_displayed()
    page.click('#hits button')
    page.click('dialog [data-do=with]')
    found(page, '7.png')
    assert page.text('#hits button').startswith('1.000') and not page.find('#query .part').is_displayed()
    page.click('#back')
    page.wait(lambda: page.find('#query .part').is_displayed())
    found(page, '7.png')
    assert width(page) == before
    page.check(url)


@wide
def test_keys_choose_a_part(page, pictures):
    page.find('#file').send_keys(str(pictures / '3.png'))
    found(page, '3.png')
    whole = page.text('#hits')
    frame = page.find('#query .frame')
    frame.send_keys(Keys.ARROW_RIGHT)
    frame.send_keys(Keys.SHIFT, Keys.ARROW_DOWN)
    style = page.find('#query .part').get_attribute('style')
    assert [f'{side}: {value}%' in style for side, value in zip(
        ('left', 'top', 'width', 'height'), (30, 25, 50, 55), strict=True)] == [True] * 4, style
    page.wait(lambda: page.text('#hits') != whole and 'nearest first' in page.text('#state'))
    frame.send_keys(Keys.ESCAPE)
    page.wait(lambda: page.text('#hits') == whole)


@wide
def test_a_region_is_found_and_searched_for(page, pictures):
    page.find('#file').send_keys(str(pictures / '3.png'))
    found(page, '3.png')
    page.run('const select = document.querySelector("#category"); select.value = "upper"; select.onchange()')
    found(page, '5.png')
    assert len(page.all('#hits button')) == 1 and 'upper' in page.text('#hits button')
    page.click('#hits button')
    page.click('dialog [data-do=with]')
    page.wait(lambda: page.text('#hits button').startswith('1.000 5.png'))
    assert 'left: 25%; top: 0%; width: 50%; height: 50%' in page.find('#query .part').get_attribute('style')


@wide
def test_what_is_wrong_is_said(page, pictures, tmp_path):
    page.find('#file').send_keys(str(pictures / '3.png'))
    found(page, '3.png')
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    page.find('#file').send_keys(str(tmp_path / 'broken.png'))
    page.wait(lambda: 'cannot be used: is not an image' in page.text('#state.warn'))
    (tmp_path / 'large.png').write_bytes(bytes(1_400_000))
    page.find('#file').send_keys(str(tmp_path / 'large.png'))
    page.wait(lambda: '1 MB: 0 are taken' in page.text('#state.warn'))
    page.find('#query .frame').send_keys(Keys.ARROW_RIGHT)  # the picture before is still the one that is searched for
    page.wait(lambda: 'nearest first' in page.text('#state') and page.find('#query .part').is_displayed())


def test_copies_are_the_page_of_dedup(page, pictures, url):
    before = width(page)
    page.click('[data-show=copies]')
    page.wait(lambda: page.find('iframe').is_displayed())
    assert width(page, '#copies') == before
    page.driver.switch_to.frame(page.find('iframe'))
    assert page.text('.mark', 1) == 'Surplus' and '1 group of identical files' in page.text('ul')
    assert not page.all('figcaption a') and page.run('return document.documentElement.scrollWidth <= innerWidth')
    page.click('.mark', 1)
    page.click('#list')
    page.wait(lambda: list(page.folder.glob('surplus*.txt')))
    surplus = [page.text('figure', i) for i in range(len(page.all('figure'))) if page.text('.mark', i) == 'Surplus']
    written = max(page.folder.glob('surplus*.txt'), key=lambda path: path.stat().st_mtime).read_text().splitlines()
    assert len(written) == len(surplus) and all(str(pictures) in path for path in written)
    page.driver.switch_to.default_content()
    page.screenshot('copies')
    page.check(url)


@wide
def test_copies_say_how_far_they_are(browser, index, monkeypatch):
    seen = threading.Event()

    def slowly(index, progress):
        progress('Reading pictures: 3 of 11')
        seen.wait(60)
        return find_copies(index)

    monkeypatch.setattr(answers, 'find_copies', slowly)
    with running(index) as address:
        browser.driver.get(address)
        browser.click('[data-show=copies]')
        browser.wait(lambda: browser.text('#copies p') == 'Reading pictures: 3 of 11')
        browser.screenshot('comparing')
        seen.set()
        browser.wait(lambda: browser.find('iframe').is_displayed() and not browser.find('#copies p').is_displayed())


def test_a_report_fits_and_needs_no_server(browser, tmp_path):
    columns = [f'column {i}' for i in range(12)]
    table = Table('', ['Model', *columns], [['a', *map(str, range(12))], ['b', *map(str, range(12))]])
    path = write_report(tmp_path / 'report.html', 'A title', 'Text.', [table], {'a': {'loss': ([0, 1], [1, 0])}})
    browser.driver.get_log('performance')
    browser.driver.get(path.as_uri())
    assert browser.text('h1') == 'A title' and len(browser.all('td')) == 24
    browser.check(path.as_uri())
