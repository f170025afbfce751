"""The Python of the guides runs and prints what they say, links lead somewhere, and tables name what there is."""
import re
import shutil
from pathlib import Path

import pytest
import timm

import timm_multigrain  # noqa: F401 - registers the models
from timm_multigrain.demo.pictures import CLASSES, make_collection
from timm_multigrain.models import registry

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [ROOT / 'README.md', ROOT / 'benchmarks/README.md', *sorted((ROOT / 'timm_multigrain').glob('*/README.md'))]
WITH_PYTHON = [path for path in GUIDES if '```python' in path.read_text()]


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root = make_collection(tmp_path_factory.mktemp('guides') / 'pictures', train_per_class=8, val_per_class=1, size=72)
    for path in root.glob('*/*/'):
        if path.name not in list(CLASSES)[:3]:
            shutil.rmtree(path)
    return root


@pytest.mark.slow
@pytest.mark.parametrize('guide', WITH_PYTHON, ids=lambda path: path.parent.name)
def test_python_blocks(guide, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, 'pictures')
    namespace = {}
    pairs = re.findall(r'```python\n(.*?)```(?:\n\n```text\n(.*?)```)?', guide.read_text(), flags=re.DOTALL)
    for block, printed in pairs:
        capsys.readouterr()
        exec(compile(block, str(guide), 'exec'), namespace)
        out = capsys.readouterr().out
        assert not printed or out == printed
    assert 'losses' not in namespace or namespace['losses']['loss'].isfinite()


def test_these_guides_have_python():
    assert {path.parent.name for path in WITH_PYTHON} >= {
        ROOT.name, 'embed', 'index', 'layers', 'measure', 'models', 'train'}


@pytest.mark.parametrize('guide', GUIDES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(guide):
    text = re.sub(r'```.*?```', '', guide.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        name, _, section = target.partition('#')
        path = guide.parent / name if name else guide
        assert path.is_file(), target
        titles = re.findall(r'^#+ (.*)', path.read_text(), flags=re.MULTILINE) if section else ['']
        assert section in [re.sub(r'[^\w -]', '', title).lower().replace(' ', '-') for title in titles], target


def test_tables_name_every_model_and_tag():
    models = set(re.findall(r'`(multigrain[\w.]*)`', GUIDES[0].read_text()))
    assert set(registry._MODELS) <= models
    tags = set(re.findall(r'`(multigrain[\w.]*)`', (ROOT / 'timm_multigrain/models/README.md').read_text()))
    assert set(timm.list_models('multigrain*', pretrained=True)) <= tags


def test_commands_of_the_readme_are_those_of_ci():
    ci = (ROOT / '.ci' / 'run').read_text()
    assert "pip install -e '.[test]' && pytest" in GUIDES[0].read_text()
    assert "install --quiet -e '.[test]'" in ci and re.search(r'^pytest$', ci, flags=re.MULTILINE)
