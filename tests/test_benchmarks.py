"""The scripts of benchmarks/ start and explain themselves."""
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / 'benchmarks'
SCRIPTS = sorted(path.name for path in FOLDER.glob('*.py') if path.name != 'timing.py')


@pytest.mark.slow
def test_every_script_starts():
    assert len(SCRIPTS) > 5
    processes = {name: subprocess.Popen([sys.executable, FOLDER / name, '--help'], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name in SCRIPTS}
    outputs = {name: (process.communicate(timeout=300)[0], process.returncode) for name, process in processes.items()}
    broken = {name: text for name, (text, status) in outputs.items() if status or 'usage:' not in text}
    assert not broken
    readme = (FOLDER / 'README.md').read_text()
    assert [name for name in SCRIPTS if f'benchmarks/{name}' not in readme] == []
