"""The package as a whole: what importing it loads, its public names, its command."""
import doctest
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import timm
import torch

import timm_multigrain
from timm_multigrain.cli.main import main


def _python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy_and_registers_models():
    heavy = ('sklearn', 'scipy', 'faiss', 'matplotlib', 'pytorch_metric_learning', 'onnx', 'timm.task')
    out = _python(
        'import sys, timm; before = set(sys.modules); import timm_multigrain; '
        f'print([m for m in {heavy} if m in set(sys.modules) - before]); '
        'resnet = timm.create_model("resnet18", global_pool="gem"); '
        'print(timm.create_model("multigrain_resnet18").gem_p, resnet.global_pool.pool_type)')
    assert out.split('\n')[:2] == ['[]', '3.0 gem']


def test_public_names():
    for name in timm_multigrain.__all__:
        assert getattr(timm_multigrain, name) is not None
    assert set(timm_multigrain.__all__) <= set(dir(timm_multigrain))
    with pytest.raises(AttributeError, match='nothing_here'):
        timm_multigrain.nothing_here  # noqa: B018


def test_command(tmp_path, monkeypatch, capsys):
    version = subprocess.run(
        [sys.executable, '-m', 'timm_multigrain', '--version'], capture_output=True, text=True, check=True).stdout
    assert version.strip() == f'timm_multigrain {timm_multigrain.__version__}'
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 2 and 'COMMAND' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main(['demo', '--help'])
    assert e.value.code == 0 and '--data-dir' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main(['search', 'an.index', 'a.jpg', '--bogus'])
    error = capsys.readouterr().err
    assert e.value.code == 2 and 'usage: timm-multigrain search' in error and 'unrecognized arguments: --bogus' in error
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a/b').mkdir(parents=True)
    (tmp_path / 'a/c').touch()
    for file, sentence in (('a/b', "'a/b' is a folder"), ('a/c/d/e', "a/c' is a file")):
        with pytest.raises(SystemExit):
            main(['search', 'an.index', 'a.jpg', '--html', file])
        assert sentence in capsys.readouterr().err
    assert main(['search', 'a/c/d', 'a.jpg']) == main(['index', 'a', '-o', 'a/c/d']) == 2
    assert '[Errno' not in capsys.readouterr().err
    assert main(['embed', 'resnet18', 'x' * 9000, '-o', 'out']) == 2
    error = capsys.readouterr().err
    assert error.startswith('timm-multigrain embed: error: xxx') and error.endswith('x...\n') and len(error) < 1100


def test_help_needs_neither_torch_nor_timm():
    command = 'import sys; sys.argv[0] = "timm-multigrain"; from timm_multigrain.cli import main'
    out = _python(
        f'{command}\nfor words in (["--help"], *([name, "--help"] for name in main.COMMANDS)):\n'
        '    try:\n        main.main(words)\n    except SystemExit as e:\n        assert e.code == 0, words\n'
        'print([name for name in ("numpy", "timm", "torch") if name in sys.modules])')
    assert out.splitlines()[-1] == '[]'
    out = _python('import sys; sys.argv[0] = "timm-multigrain"; import timm_multigrain, timm; '
                  'print(timm.is_model("multigrain")); timm_multigrain._register(); print(timm.is_model("multigrain"))')
    assert out.split() == ['False', 'True']


def test_old_timm_is_refused_in_one_sentence(tmp_path):
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text('__version__ = "1.0.29.dev0"')
    done = subprocess.run(
        [sys.executable, '-c', 'import timm_multigrain'], capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{Path(timm_multigrain.__path__[0]).parent}'})
    assert done.returncode
    assert 'needs timm 1.0.31 or newer, found 1.0.29.dev0 in' in done.stderr.strip().splitlines()[-1]


def test_a_wheel_holds_the_package_and_an_sdist_all(tmp_path):
    pytest.importorskip('setuptools', minversion='70.1')  # older ones need another package for wheels
    root = Path(__file__).resolve().parents[1]
    for name in ('CHANGELOG.md', 'LICENSE', 'MANIFEST.in', 'README.md', 'pyproject.toml', 'setup.cfg'):
        shutil.copy(root / name, tmp_path)
    for name in ('.ci', '.github', 'benchmarks', 'tests', 'timm_multigrain'):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    every = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()}
    code = 'from setuptools import build_meta as b; b.build_sdist("."); b.build_wheel(".")'
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as file:
        held = {m.name.split('/', 1)[1] for m in file if m.isfile()}
    assert {name for name in held if 'egg-info' not in name} == every | {'PKG-INFO'}
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as file:
        held = {name for name in file.namelist() if 'dist-info' not in name}
    assert held == {name for name in every if name.startswith('timm_multigrain/') and not name.endswith('.md')}


def _documented() -> list[doctest.DocTest]:
    """The examples in the docstrings of the public functions and classes, and of the measures and searches."""
    names = dict(vars(timm_multigrain), timm=timm, torch=torch)
    names.update({name: getattr(timm_multigrain, name) for name in timm_multigrain.__all__})
    found = []
    for module in ('measure.metrics', 'search.exact', 'search.rerank'):
        module = importlib.import_module(f'timm_multigrain.{module}')
        names.update({name: value for name, value in vars(module).items() if name[0] != '_'})
    for name, value in names.items():
        if getattr(value, '__module__', '').startswith('timm_multigrain') and '>>>' in (value.__doc__ or ''):
            found.append(doctest.DocTestParser().get_doctest(inspect.getdoc(value), dict(names), name, None, 0))
    return found


def test_examples_in_docstrings():
    torch.manual_seed(0)
    examples = _documented()
    assert len(examples) >= 15
    for example in examples:
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0, example.name
