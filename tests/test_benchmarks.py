"""The scripts of benchmarks/ start and explain themselves."""
import argparse
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / 'benchmarks'
SCRIPTS = sorted(path.name for path in FOLDER.glob('*.py') if path.name != 'timing.py')
QUICK = runpy.run_path(str(FOLDER / 'all.py'))['QUICK']


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_script_starts(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit, match=r'^0$'):
        runpy.run_path(str(FOLDER / name), run_name='__main__')
    assert 'usage:' in capsys.readouterr().out
    assert f'benchmarks/{name}' in (FOLDER / 'README.md').read_text()


def test_all_goes_on_after_a_failure(monkeypatch, capsys, tmp_path):
    module = runpy.run_path(str(FOLDER / 'all.py'))
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    (scripts / 'good.py').write_text('import sys; print("a table", sys.argv[1:])')
    (scripts / 'bad.py').write_text('raise SystemExit("out of order")')
    (scripts / 'other.py').write_text('"""Another.\n\n    python benchmarks/other.py --data DIR\n\nMore."""')
    monkeypatch.setitem(module['main'].__globals__, 'FOLDER', scripts)
    monkeypatch.setitem(module['main'].__globals__, 'QUICK', {'bad': '', 'good': '--work {work}'})
    assert module['main'](['--output', str(tmp_path / 'out')]) == 1
    printed = capsys.readouterr().out
    assert 'failed: bad' in printed and printed.rstrip().endswith('    python benchmarks/other.py --data DIR')
    assert 'out of order' in (tmp_path / 'out' / 'bad.txt').read_text()
    assert 'a table' in (tmp_path / 'out' / 'good.txt').read_text()


@pytest.mark.parametrize('name', QUICK)
def test_the_settings_of_all_are_flags_of_the_script(name, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args):
        parse(*args)
        raise SystemExit(0)

    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_only)
    monkeypatch.setattr(sys, 'argv', [name, *shlex.split(QUICK[name])])
    with pytest.raises(SystemExit, match=r'^0$'):
        runpy.run_path(str(FOLDER / f'{name}.py'), run_name='__main__')


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu
    return gpu


def test_without_a_gpu(gpu, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--device', 'cpu'])
    gpu.main()
    torch.set_num_threads(threads)
    assert 'No GPU was found' in capsys.readouterr().out
