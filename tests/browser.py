"""A headless browser for the tests of pages, wide or of a phone's width."""
import base64
import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

webdriver = pytest.importorskip('selenium.webdriver')
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = (shutil.which(name) for name in ('chromium', 'chromedriver'))
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update')
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason='Chromium is not installed')


@contextlib.contextmanager
def browsing(folder: Path, width: int = 1400):
    """A `Page` whose profile and downloads are in a folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f'--window-size={width},900', f'--user-data-dir={folder / "profile"}'):
        options.add_argument(flag)
    if width < 500:
        metrics = {'width': width, 'height': 844, 'pixelRatio': 2.0}
        options.add_experimental_option('mobileEmulation', {'deviceMetrics': metrics})
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.execute_cdp_cmd('Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(folder)})
        yield Page(driver, width, folder)
    finally:
        driver.quit()


class Page:
    """What the tests do with a page; PAGE_SCREENSHOTS names a folder for pictures of it."""

    def __init__(self, driver, width: int, folder: Path):
        self.driver, self.width, self.folder, self.run = driver, width, folder, driver.execute_script

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def find(self, selector: str, number: int = 0):
        return self.wait(lambda: self.all(selector)[number:])[0]

    def wait(self, condition):
        return WebDriverWait(self.driver, 60, ignored_exceptions=[Exception]).until(lambda _: condition())

    def act(self, selector: str, number: int = 0):
        """Actions that begin where the pointer is on the middle of an element."""
        element = self.find(selector, number)
        self.run('arguments[0].scrollIntoView({block: "center"})', element)
        return webdriver.ActionChains(self.driver).move_to_element(element)

    def click(self, selector: str, number: int = 0):
        self.act(selector, number).click().perform()

    def press(self, *keys: str):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def text(self, selector: str, number: int = 0) -> str:
        return self.find(selector, number).text

    def check(self, address: str):
        """Nothing is wider than the page, everything was asked of the address, and the browser refused nothing."""
        assert self.run('return document.documentElement.scrollWidth') <= self.width
        assert not [line for line in self.driver.get_log('browser') if 'Content Security Policy' in line['message']]
        asked = [json.loads(line['message'])['message'] for line in self.driver.get_log('performance')]
        asked = [m['params'] for m in asked if m['method'] == 'Network.requestWillBeSent']
        own = [p for p in asked if p.get('documentURL', '').startswith(address)]
        assert own and all(p['request']['url'].startswith((address, 'data:', 'blob:', 'about:')) for p in own)

    def screenshot(self, what: str):
        if os.environ.get('PAGE_SCREENSHOTS'):
            shot = self.driver.execute_cdp_cmd('Page.captureScreenshot', {})
            path = Path(os.environ['PAGE_SCREENSHOTS']) / f'{what}-{self.width}.png'
            path.write_bytes(base64.b64decode(shot['data']))
