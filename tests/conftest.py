"""Fixtures shared by the tests."""
import os
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).resolve().parent / 'golden'
SHARED = Path(__file__).resolve().parents[2] / 'shared'

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())))


@pytest.fixture(scope='session')
def golden() -> Path:
    """Folder of the numbers the original implementation computes."""
    return GOLDEN


@pytest.fixture(scope='session')
def shared_golden() -> Path:
    """The larger golden files, which live beside the checkout; tests that need them are skipped elsewhere."""
    path = SHARED / 'golden'
    if not path.is_dir():
        pytest.skip('the larger golden files are not beside this checkout')
    return path


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Real photographs beside the checkout; tests that need them are skipped elsewhere."""
    path = SHARED / 'data'
    if not path.is_dir():
        pytest.skip('the real photographs are not beside this checkout')
    return path
