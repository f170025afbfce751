"""Fixtures shared by the tests."""
import logging
import os
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: the workers share the cores, and so do their children

import pytest
import torch

import timm_multigrain  # noqa: F401 - registers the models

from .hub_server import FileServer, HubServer, running, use
from .pictures import noise, write_noise

GOLDEN = Path(__file__).resolve().parent / 'golden'
SHARED = Path(__file__).resolve().parents[2] / 'shared'

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())))


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('needs a GPU')


@pytest.fixture(autouse=True)
def own_log():
    """Takes away what a script run by a test set up for its log: it would write into streams closed by then."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    for handler in logging.root.handlers[:]:
        if handler not in handlers and type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)
    logging.root.setLevel(level)


@pytest.fixture(scope='session')
def golden() -> Path:
    """Folder of the numbers the original implementation computes."""
    return GOLDEN


def beside(name: str) -> Path:
    """A folder beside the checkout; tests that need it are skipped elsewhere."""
    if not (SHARED / name).is_dir():
        pytest.skip(f'{name} is not beside this checkout')
    return SHARED / name


@pytest.fixture(scope='session')
def shared_golden() -> Path:
    """The larger golden files."""
    return beside('golden')


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Real photographs."""
    return beside('data')


@pytest.fixture(scope='session')
def noise_folder(tmp_path_factory):
    """Image folder of noise: 3 classes, 12 pictures of 40 x 40 each for training, 2 for validation."""
    root = tmp_path_factory.mktemp('pictures')
    return write_noise(root, [f'{split}/{name}/{i}.png' for split, number in (('train', 12), ('validation', 2))
                              for name in 'abc' for i in range(number)])


@pytest.fixture
def photo():
    return noise((30, 20))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of weights, and a cache of downloads of its own."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with running(FileServer()) as server:
        yield server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face Hub on loopback that huggingface_hub talks to, and a cache of its own."""
    with running(HubServer()) as server:
        use(server, monkeypatch, tmp_path / 'home')
        yield server
