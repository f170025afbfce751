"""The page of copies in a headless browser: flipping, marking, and the list and script that it saves."""
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from timm_multigrain.index.dedup import find_copies
from timm_multigrain.report.collection import write_copies_page

from .copies_folder import make_index

webdriver = pytest.importorskip('selenium.webdriver')
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from .test_app_browser import BROWSER, DRIVER, FLAGS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason='Chromium is not installed')]


def test_page_of_copies(tmp_path):
    folder, down = tmp_path / 'pictures', tmp_path / 'down'
    folder.mkdir()
    down.mkdir()
    for i in range(2):
        values = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(values).resize((160, 120)).save(folder / f"it's {i}.png")
        shutil.copyfile(folder / f"it's {i}.png", folder / f'copy {i}.png')
    copies = find_copies(make_index(folder, tmp_path / 'index'), exact_only=True)
    page = write_copies_page(tmp_path / 'page.html', copies)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, '--window-size=390,800', f'--user-data-dir={tmp_path / "profile"}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.execute_cdp_cmd('Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(down)})
        driver.get(page.as_uri())
        first, second = driver.find_elements(By.CSS_SELECTOR, 'section')[0].find_elements(By.CSS_SELECTOR, 'figure')

        def click(element):
            driver.execute_script('arguments[0].click()', element)

        def marks():
            return [mark.text for mark in driver.find_elements(By.CSS_SELECTOR, '.mark')]

        def source(figure):
            return figure.find_element(By.CSS_SELECTOR, 'img').get_attribute('src')

        own = source(second)
        driver.execute_script('arguments[0].setAttribute("src", "data:image/jpeg;base64,")',
                              first.find_element(By.CSS_SELECTOR, 'img'))
        click(second.find_element(By.CSS_SELECTOR, '.flip'))
        assert source(second) == source(first) != own
        click(second.find_element(By.CSS_SELECTOR, '.flip'))
        assert source(second) == own
        assert marks() == ['Keep', 'Surplus', 'Keep', 'Surplus'] and '2 surplus' in driver.page_source
        click(first.find_element(By.CSS_SELECTOR, '.mark'))  # one of a group has to stay
        assert marks()[:2] == ['Keep', 'Surplus']
        click(second.find_element(By.CSS_SELECTOR, '.mark'))
        click(first.find_element(By.CSS_SELECTOR, '.mark'))
        assert marks() == ['Surplus', 'Keep', 'Keep', 'Surplus']
        for name in ('list', 'script'):
            click(driver.find_element(By.ID, name))
            WebDriverWait(driver, 20).until(lambda _, name=name: list(down.glob('*.txt' if name == 'list' else '*.sh')))
        assert driver.execute_script('return document.documentElement.scrollWidth <= innerWidth')
        assert not driver.get_log('browser')
    finally:
        driver.quit()
    group, other = sorted(copies.groups, key=lambda group: -group.surplus_bytes)
    moved = [group.keep, other.files[1].record.path]
    assert (down / 'surplus.txt').read_text().splitlines() == moved
    result = subprocess.run(['sh', str(down / 'move-surplus.sh'), str(tmp_path / 'to')], capture_output=True, text=True)
    assert result.returncode == 0 and '2 files moved' in result.stdout and len(list(folder.iterdir())) == 2
    assert all((tmp_path / f'to{path}').exists() for path in moved)
