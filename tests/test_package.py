"""The package as a whole: what importing it loads, its public names, its command."""
import subprocess
import sys

import pytest
import timm

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


def test_command(capsys):
    version = subprocess.run(
        [sys.executable, '-m', 'timm_multigrain', '--version'], capture_output=True, text=True, check=True).stdout
    assert version.strip() == f'timm_multigrain {timm_multigrain.__version__}'
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 2 and 'COMMAND' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main(['demo', '--help'])
    assert e.value.code == 0 and '--data-dir' in capsys.readouterr().out


def test_supported_timm():
    """The private seams are checked at import; this says so where a new timm is tried."""
    assert tuple(int(v) for v in timm.__version__.split('.')[:2]) >= (1, 0)
