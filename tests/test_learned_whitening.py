"""Learned whitening against the textbook formula in plain float64."""
import copy

import numpy as np
import pytest
import torch

from timm_multigrain.whiten.fit import fit_learned_whitening, fold_whitening, matching_pairs, with_constant

from .tiny import tiny_model


@pytest.fixture
def data():
    """60 instances, 4 views each, of 10 channels: the last three differ between views only."""
    rng = np.random.default_rng(0)
    instances = np.repeat(rng.random((60, 10)), 4, axis=0)
    noise = rng.normal(size=(240, 10)) * np.array([0.02] * 7 + [0.5] * 3)
    instances[:, 7:] = 1
    groups = np.repeat(np.arange(60), 4)
    return torch.from_numpy((instances + noise).clip(0.01)).float(), groups


def test_pairs():
    pairs = matching_pairs([5, 2, 5, -1, -1, 5, 2])
    assert sorted(map(tuple, np.sort(pairs).tolist())) == [(0, 2), (0, 5), (1, 6), (2, 5)]
    many = matching_pairs([0] * 100 + [1] * 3, most=50)
    assert len(many) == 53 and (many[:, 0] != many[:, 1]).all() and many[:50].max() < 100
    for groups in ([0, 1, 2], [-1, -1], []):
        with pytest.raises(ValueError, match='of one group'):
            matching_pairs(groups)


def test_formula(data):
    embeddings, groups = data
    pairs = matching_pairs(groups)
    fit = fit_learned_whitening(embeddings, pairs)
    z = with_constant(embeddings).numpy()
    s = sum(np.outer(z[i] - z[j], z[i] - z[j]) for i, j in pairs) / len(pairs)
    t = np.cov(z.T)
    p = fit.proj.numpy()
    np.testing.assert_allclose(p.T @ s @ p, np.eye(11), atol=1e-8)  # what differs between matches is whitened
    np.testing.assert_allclose(p.T @ t @ p, np.diag(fit.eigenvalues), atol=1e-6 * fit.eigenvalues[0])
    expected = np.sort(np.linalg.eigvals(np.linalg.solve(s, t)).real)[::-1]
    np.testing.assert_allclose(fit.eigenvalues, expected, rtol=1e-6)
    np.testing.assert_allclose(fit.mean, z.mean(0), rtol=1e-12)
    assert fit.kind == 'learned' and fit.num_images == 240
    assert torch.equal(fit_learned_whitening(embeddings, pairs, 4).proj, fit.proj[:, :4])


def test_it_finds_matches(data):
    embeddings, groups = data
    fit = fit_learned_whitening(embeddings, matching_pairs(groups[:120]), dim=6)

    def first_is_match(x: torch.Tensor) -> float:
        x = torch.nn.functional.normalize(x[120:].double(), dim=1)
        scores = (x @ x.T).fill_diagonal_(-2)
        return float((groups[120:][scores.argmax(1)] == groups[120:]).mean())

    assert first_is_match((with_constant(embeddings) - fit.mean) @ fit.proj) > first_is_match(embeddings) + 0.2


def test_fewer_pairs_than_channels_are_shrunk(data):
    embeddings, groups = data
    fit = fit_learned_whitening(embeddings, matching_pairs(groups)[:5])
    assert 0 < fit.shrinkage <= 1 and fit.proj.isfinite().all()
    assert fit_learned_whitening(embeddings, matching_pairs(groups)[:5], shrinkage=0.3).shrinkage == 0.3


def test_folds_into_the_classifier():
    model = tiny_model(num_classes=5)
    torch.manual_seed(0)
    embeddings = torch.rand(300, model.num_features)
    fit = fit_learned_whitening(embeddings, matching_pairs(np.arange(300) // 3))
    whitened = copy.deepcopy(model)
    fold_whitening(whitened, fit)
    expected = model.head.fc(embeddings) / ((embeddings.square().sum(1, keepdim=True) + 1).sqrt() + 1e-6)
    logits = whitened.head.classify(whitened.head.whitening(embeddings))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-5)


def test_bad_pairs(data):
    embeddings, _ = data
    for pairs, message in (([], 'shape'), ([[0, 1, 2]], 'shape'), ([[0, 240]], '0 to 240 of 240'),
                           ([[-1, 0]], '-1 to 0'), ([[3, 3]], 'identical')):
        with pytest.raises(ValueError, match=message):
            fit_learned_whitening(embeddings, pairs)
    with pytest.raises(ValueError, match='shrinkage=2'):
        fit_learned_whitening(embeddings, [[0, 1]], shrinkage=2)
