"""The web app and a report in a headless browser, wide and of a phone's width; nothing comes from elsewhere."""
import base64
import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from timm_multigrain.report.report import Table, write_report

from .copies_folder import make_index, make_pictures
from .test_app import running

pytest.importorskip('gradio')
webdriver = pytest.importorskip('selenium.webdriver')
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = (shutil.which(name) for name in ('chromium', 'chromedriver'))
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason='Chromium is not installed')]


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp('browser') / 'pictures', 8)


@pytest.fixture(scope='module')
def url(pictures):
    with running(make_index(pictures, pictures.parent / 'index')) as address:
        yield address


@pytest.fixture(params=[1280, 390], ids=['wide', 'phone'])
def page(request, url, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f'--window-size={request.param},900', f'--user-data-dir={tmp_path}'):
        options.add_argument(flag)
    if request.param < 500:
        metrics = {'width': request.param, 'height': 844, 'pixelRatio': 2.0}
        options.add_experimental_option('mobileEmulation', {'deviceMetrics': metrics})
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(url)
        yield Page(driver, request.param)
    finally:
        driver.quit()


class Page:
    """What the tests do with the page; APP_SCREENSHOTS names a folder for pictures of it."""

    def __init__(self, driver, width):
        self.driver, self.width = driver, width

    def find(self, selector, number=0):
        return self.wait(lambda driver: driver.find_elements(By.CSS_SELECTOR, selector)[number:])[0]

    def wait(self, condition):
        return WebDriverWait(self.driver, 60, ignored_exceptions=[Exception]).until(condition)

    def click(self, selector, number=0, dx=0, dy=0):
        element = self.find(selector, number)
        self.driver.execute_script('arguments[0].scrollIntoView({block: "center"})', element)
        webdriver.ActionChains(self.driver).pause(0.3).move_to_element_with_offset(element, dx, dy).click().perform()

    def upload(self, path):
        """Give the file again until the page, which may not be listening yet, has taken it."""
        for _ in range(6):
            self.find('#picture input[type=file]').send_keys(str(path))
            with contextlib.suppress(TimeoutException):
                WebDriverWait(self.driver, 10).until(
                    lambda driver: driver.find_elements(By.CSS_SELECTOR, '#picture img'))
                return

    def text(self, selector):
        return self.find(selector).text

    def screenshot(self, what):
        if os.environ.get('APP_SCREENSHOTS'):
            run = self.driver.execute_script
            clip = {'x': 0, 'y': 0, 'scale': 1, 'width': run('return document.documentElement.clientWidth'),
                    'height': run('return document.documentElement.scrollHeight')}
            shot = self.driver.execute_cdp_cmd('Page.captureScreenshot', {'captureBeyondViewport': True, 'clip': clip})
            path = Path(os.environ['APP_SCREENSHOTS']) / f'app-{self.width}-{what}.png'
            path.write_bytes(base64.b64decode(shot['data']))


def test_search_part_and_copies(page, pictures, url):
    page.upload(pictures / '3.png')
    page.find('#nearest .thumbnail-item', 5)
    assert page.text('#nearest .caption-label').startswith('1.000') and '3.png' in page.text('#nearest .caption-label')
    assert '%' in page.text('#classes')
    page.screenshot('found')
    page.click('#picture img', dx=-16, dy=-16)  # 32 of 96 pixels, far from the whole: other pictures are nearer
    page.wait(lambda driver: 'opposite corner.' in page.text('#hint') and 'Now' in page.text('#hint'))
    page.click('#picture img', dx=16, dy=16)
    page.wait(lambda driver: 'Part of' in page.text('#hint'))
    page.click('#search')
    page.wait(lambda driver: '7.png' in page.text('#nearest .caption-label'))
    page.click('#nearest .thumbnail-item')
    page.wait(lambda driver: 'pixels' in page.find('#details textarea').get_attribute('value'))
    page.screenshot('part')
    page.click('#whole')
    page.wait(lambda driver: 'click two' in page.text('#hint'))
    page.click('button[role=tab]', 1)
    page.click('#find-copies')
    page.find('#groups .thumbnail-item')
    assert '1 group of identical files' in page.find('#summary textarea').get_attribute('value')
    page.click('#groups .thumbnail-item')
    page.find('#members .thumbnail-item', 1)
    assert page.text('#members .caption-label').startswith('KEEP')
    page.screenshot('copies')
    check_width(page.driver, page.width)
    check_requests(page.driver, url)


def test_a_report_fits_and_needs_no_server(page, tmp_path):
    columns = [f'column {i}' for i in range(12)]
    table = Table(['Model', *columns], [['a', *range(12)], ['b', *range(12)]], columns)
    path = write_report(tmp_path / 'report.html', 'A title', 'Text.', [table], {'a': {'loss': ([0, 1], [1, 0])}})
    page.driver.get_log('performance')
    page.driver.get(path.as_uri())
    assert page.text('h1') == 'A title' and len(page.driver.find_elements(By.CSS_SELECTOR, 'td.best')) == 24
    page.screenshot('report')
    check_width(page.driver, page.width)
    check_requests(page.driver, path.as_uri())


def check_width(driver, width):
    assert driver.execute_script('return document.documentElement.scrollWidth') <= width


def check_requests(driver, url):
    """Everything was asked of the app itself, and the browser had nothing to refuse."""
    refused = [line['message'] for line in driver.get_log('browser') if 'Content Security Policy' in line['message']]
    assert not refused
    asked = [json.loads(line['message'])['message'] for line in driver.get_log('performance')]
    asked = [m['params'] for m in asked if m['method'] == 'Network.requestWillBeSent']
    own = [p for p in asked if p.get('documentURL', '').startswith(url)]
    assert own and all(p['request']['url'].startswith((url, 'data:', 'blob:')) for p in own)
