"""The README's Python runs, and its tables name what there is."""
import re
import shutil
from pathlib import Path

import pytest
import timm

import timm_multigrain  # noqa: F401 - registers the models
from timm_multigrain.demo.pictures import CLASSES, make_collection
from timm_multigrain.models import registry

README = Path(__file__).resolve().parents[1] / 'README.md'


@pytest.mark.slow
def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_collection('pictures', train_per_class=8, val_per_class=1, size=72)
    for path in Path('pictures').glob('*/*/'):
        if path.name not in list(CLASSES)[:3]:
            shutil.rmtree(path)
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 6
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), 'exec'), namespace)
    assert namespace['losses']['loss'].isfinite()


def test_tables_name_every_model_and_tag():
    text = README.read_text()
    listed = set(re.findall(r'`(multigrain[\w.]*)`', text))
    tags = set(timm.list_models('multigrain*', pretrained=True))
    short = {f'{row[0]}.{row[1]}' for row in re.findall(r'\| `(multigrain_\w+)` \|[^\n]*`(fb_\w+)` \|', text)}
    assert tags <= listed | short
    assert set(registry._MODELS) <= listed


def test_commands_of_the_readme_are_those_of_ci():
    ci = (README.parent / '.ci' / 'run').read_text()
    assert "pip install -e '.[test]' && pytest" in README.read_text()
    assert "install --quiet -e '.[test]'" in ci and re.search(r'^pytest$', ci, flags=re.MULTILINE)
