"""Streaming PCA against plain float64 arithmetic on the whole matrix."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from timm_multigrain.whiten import pca as module
from timm_multigrain.whiten.pca import StreamingPCA, oas_shrinkage


def batches(x: torch.Tensor, *sizes: int) -> list[torch.Tensor]:
    return list(x.split([*sizes, len(x) - sum(sizes)]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, 'ROWS', 16)
    monkeypatch.setattr(module, 'COLUMNS', 4)


@pytest.mark.parametrize('n, dim', [(2, 1), (5, 3), (16, 4), (17, 5), (100, 9), (64, 8), (33, 13)])
def test_mean_and_covariance(n, dim):
    torch.manual_seed(n)
    x = torch.randn(n, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + 3
    fit = StreamingPCA(dim)
    for batch in batches(x, 1, n // 3):
        fit.update(batch)
    np.testing.assert_allclose(fit.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(fit.covariance(), np.cov(x.numpy().T).reshape(dim, dim), rtol=1e-10, atol=1e-12)
    assert torch.equal(fit.covariance(), fit.covariance().T)
    assert fit.count == n


def test_cutting_into_batches_changes_nothing():
    x = torch.randn(70, 6)
    whole = StreamingPCA(6).update(x)
    cut = StreamingPCA(6)
    for batch in batches(x, 0, 1, 15, 20, 33):
        cut.update(batch)
    torch.testing.assert_close(whole.mean, cut.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.covariance(), cut.covariance(), rtol=1e-10, atol=1e-12)


def test_reading_in_between_is_allowed():
    x = torch.randn(40, 5, dtype=torch.float64)
    fit = StreamingPCA(5).update(x[:10])
    np.testing.assert_allclose(fit.covariance(), np.cov(x[:10].numpy().T), rtol=1e-10)
    np.testing.assert_allclose(fit.update(x[10:]).covariance(), np.cov(x.numpy().T), rtol=1e-10, atol=1e-14)


def test_far_from_the_origin():
    x = torch.randn(100, 5, dtype=torch.float64)
    far = StreamingPCA(5).update(x + 1e7).covariance()
    np.testing.assert_allclose(far, np.cov(x.numpy().T), rtol=0, atol=1e-8)


def test_about_the_origin():
    x = torch.randn(40, 5, dtype=torch.float64) + 2
    fit = StreamingPCA(5, centered=False).update(x[:25]).update(x[25:])
    assert not fit.mean.any()
    np.testing.assert_allclose(fit.covariance(), x.T @ x / 40, rtol=1e-12)


def test_eigenvectors():
    x = torch.randn(60, 6, dtype=torch.float64) * torch.arange(1, 7)
    values, vectors = StreamingPCA(6).update(x).eigh()
    assert (values.diff() <= 0).all()
    np.testing.assert_allclose(vectors @ values.diag() @ vectors.T, np.cov(x.numpy().T), atol=1e-12)


@pytest.mark.parametrize('bad', [torch.randn(3, 4), torch.randn(5), torch.randn(1, 2, 5)])
def test_wrong_shapes(bad):
    with pytest.raises(ValueError, match=r'give \(n, 5\)'):
        StreamingPCA(5).update(bad)


def test_bad_values_and_too_few():
    x = torch.randn(40, 5)
    x[29, 2] = float('inf')
    with pytest.raises(ValueError, match='Vector 29 of the batch holds NaN or infinity'):
        StreamingPCA(5).update(x)
    with pytest.raises(ValueError, match='1 vectors have no covariance'):
        StreamingPCA(5).update(x[:1]).covariance()


def test_oas_as_the_paper_states_it():
    torch.manual_seed(0)
    n, p = 12, 8
    x = torch.randn(n, p, dtype=torch.float64) * torch.arange(1, p + 1)
    s = torch.cov(x.T)
    square = sum(float(s[i, j] * s[j, i]) for i in range(p) for j in range(p))
    trace = sum(float(s[i, i]) for i in range(p))
    expected = ((1 - 2 / p) * square + trace ** 2) / ((n + 1 - 2 / p) * (square - trace ** 2 / p))
    assert oas_shrinkage(torch.linalg.eigvalsh(s), n) == pytest.approx(min(1, expected), rel=1e-10)
    assert oas_shrinkage(torch.ones(5), 100) == 1


MEMORY = '''
import sys, torch
from timm_multigrain.whiten.pca import StreamingPCA
torch.set_num_threads(1)
x = torch.randn(512, 256)
fit = StreamingPCA(256).update(x)
fit.eigh()
def status(name):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(name))
before = status('VmRSS')
fit = StreamingPCA(256)
for _ in range(int(sys.argv[1])):
    fit.update(x)
fit.eigh()
print(status('VmHWM') - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_number():
    run = subprocess.run([sys.executable, '-c', MEMORY, '100'], check=True, capture_output=True, text=True)
    assert int(run.stdout) * 1024 < 20 * 2 ** 20  # the 51,200 vectors have 100 MiB in float64
