"""The page of copies in a headless browser: flipping, marking, and the list and script that it saves."""
import shutil
import subprocess

import pytest

from timm_multigrain.index.dedup import find_copies
from timm_multigrain.report.collection import write_copies_page

from .browser import browsing, needs_browser
from .copies_folder import make_index
from .pictures import noise

pytestmark = [pytest.mark.slow, needs_browser]


def test_page_of_copies(tmp_path):
    folder, down = tmp_path / 'pictures', tmp_path / 'down'
    folder.mkdir()
    down.mkdir()
    for i in range(2):
        noise((160, 120), (32, 24), i).save(folder / f"it's {i}.png")
        shutil.copyfile(folder / f"it's {i}.png", folder / f'copy {i}.png')
    copies = find_copies(make_index(folder, tmp_path / 'index'), exact_only=True)
    page = write_copies_page(tmp_path / 'page.html', copies)
    with browsing(down, 390) as browser:
        browser.driver.get(page.as_uri())
        first, second = browser.all('section:first-of-type figure')

        def click(element):
            browser.run('arguments[0].click()', element)

        def marks():
            return [mark.text for mark in browser.all('.mark')]

        def inside(figure, selector):
            return figure.find_element('css selector', selector)

        def source(figure):
            return inside(figure, 'img').get_attribute('src')

        own = source(second)
        browser.run('arguments[0].setAttribute("src", "data:image/jpeg;base64,")', inside(first, 'img'))
        click(inside(second, '.flip'))
        assert source(second) == source(first) != own
        click(inside(second, '.flip'))
        assert source(second) == own
        assert marks() == ['Keep', 'Surplus', 'Keep', 'Surplus'] and '2 surplus' in browser.driver.page_source
        click(inside(first, '.mark'))  # one of a group has to stay
        assert marks()[:2] == ['Keep', 'Surplus']
        click(inside(second, '.mark'))
        click(inside(first, '.mark'))
        assert marks() == ['Surplus', 'Keep', 'Keep', 'Surplus']
        for name in ('list', 'script'):
            click(browser.find(f'#{name}'))
            browser.wait(lambda name=name: list(down.glob('*.txt' if name == 'list' else '*.sh')))
        assert browser.run('return document.documentElement.scrollWidth <= innerWidth')
        assert not browser.driver.get_log('browser')
    group, other = sorted(copies.groups, key=lambda group: -group.surplus_bytes)
    moved = [group.keep, other.files[1].record.path]
    assert (down / 'surplus.txt').read_text().splitlines() == moved
    result = subprocess.run(['sh', str(down / 'move-surplus.sh'), str(tmp_path / 'to')], capture_output=True, text=True)
    assert result.returncode == 0 and '2 files moved' in result.stdout and len(list(folder.iterdir())) == 2
    assert all((tmp_path / f'to{path}').exists() for path in moved)
