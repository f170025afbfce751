"""The scripts of benchmarks/ start and explain themselves."""
import json
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / 'benchmarks'
SCRIPTS = sorted(path.name for path in FOLDER.glob('*.py') if path.name != 'timing.py')


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
    module = runpy.run_path(str(FOLDER / 'all.py'))
    assert {f'{name}.py' for name in module['QUICK']} <= set(SCRIPTS)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu
    return gpu


def test_a_case_that_fails_leaves_the_others(gpu, monkeypatch, tmp_path):
    def broken():
        raise torch.OutOfMemoryError('no room\nfor 3 GiB')

    cases = [('a', lambda: [gpu.compare('ms', 2., 4., at_most=0.4)]), ('b', broken),
             ('c', lambda: [gpu.compare('waits', 0, at_most=0), gpu.compare('images/s', 9., 10., at_least=0.95)])]
    monkeypatch.setitem(gpu.SECTIONS, 'tests', (lambda args: cases, 1))
    rows = {}
    for dry_run in (False, True):
        args = SimpleNamespace(dry_run=dry_run, device='cpu', rows=tmp_path / 'rows.json')
        gpu.run_cases('tests', args)
        rows[dry_run] = json.loads(args.rows.read_text())
    assert [(row['case'], row.get('ours'), row.get('ours / peer'), row.get('met')) for row in rows[False]] == [
        ('a', 2., 0.5, 'no'), ('b', None, None, None), ('c', 0, None, 'yes'), ('c', 9., 0.9, 'no')]
    assert rows[False][1]['note'] == 'OutOfMemoryError: no room for 3 GiB'
    assert [row.get('ours') for row in rows[True]] == ['dry run', None, 'dry run', 'dry run']
    assert not any(isinstance(value, (int, float)) for row in rows[True] for value in row.values())


def test_waits_are_counted(gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', modes.append)

    def step():
        warnings.warn('a prototype feature that does not yet detect all synchronizing operations', stacklevel=1)
        for _ in range(3):
            warnings.warn('called a synchronizing CUDA operation', stacklevel=1)

    assert gpu.count_waits(step, 'cuda') == 3 and modes == ['warn', 'default']


def test_without_a_gpu(gpu, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--device', 'cpu'])
    gpu.main()
    torch.set_num_threads(threads)
    assert 'No GPU was found' in capsys.readouterr().out
