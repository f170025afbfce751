"""Whitening, PCA and learned, against the original's numbers and the textbook formulas in plain float64."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_multigrain.hub import save_pretrained
from timm_multigrain.layers import GeM
from timm_multigrain.loss import DistanceWeightedSampler, effective_negatives, margin_loss
from timm_multigrain.whiten.fit import WhiteningFit, fit_whitening, fold_whitening, matching_pairs, with_constant
from timm_multigrain.whiten.pca import StreamingPCA, oas_shrinkage

from .tiny import image_for, tiny_model


@pytest.fixture(scope='module')
def model():
    return tiny_model(num_classes=5)


@pytest.fixture(scope='module')
def embeddings(model):
    """Of 400 images that vary in every channel."""
    torch.manual_seed(3)
    channels = model.num_features
    return torch.rand(400, channels) @ (torch.eye(channels) + 0.1 * torch.rand(channels, channels))


@pytest.fixture(scope='module')
def views():
    """60 instances, 4 views each, of 10 channels: the last three differ between views only."""
    rng = np.random.default_rng(0)
    instances = np.repeat(rng.random((60, 10)), 4, axis=0)
    noise = rng.normal(size=(240, 10)) * np.array([0.02] * 7 + [0.5] * 3)
    instances[:, 7:] = 1
    return torch.from_numpy((instances + noise).clip(0.01)).float(), np.repeat(np.arange(60), 4)


@pytest.mark.parametrize('n, dim, sizes', [(2, 1, (1,)), (17, 5, (1, 5)), (100, 9, (0, 1, 15, 20)), (3000, 4, (100,))])
def test_streaming_pca(n, dim, sizes):
    torch.manual_seed(n)
    x = torch.randn(n, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + 3
    kept, pca, origin = x.clone(), StreamingPCA(dim), StreamingPCA(dim, centered=False)
    for batch in x.split([*sizes, n - sum(sizes)]):
        pca.update(batch)
        origin.update(batch)
    expected = np.cov(x.numpy().T).reshape(dim, dim)
    np.testing.assert_allclose(pca.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(pca.covariance(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(origin.covariance(), x.T @ x / n, rtol=1e-12)
    assert pca.count == n and not origin.mean.any() and torch.equal(x, kept)
    far = StreamingPCA(dim).update(x + 1e7).covariance()
    np.testing.assert_allclose(far, expected, rtol=0, atol=1e-7)
    values, vectors = pca.eigh()
    assert (values.diff() <= 0).all()
    np.testing.assert_allclose(vectors @ values.diag() @ vectors.T, expected, atol=1e-10)


def signs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(0).sign()


def test_golden_fit_and_fold(golden):
    g = load_file(golden / 'whitening.safetensors')
    fit = fit_whitening(GeM(p=3.0)(g['fit_maps']))
    assert (fit.dim, fit.num_images, fit.shrinkage, fit.num_constant) == (13, 128, 0, 0)
    np.testing.assert_allclose(fit.mean, g['mean'], rtol=0, atol=1e-6 * g['mean'].abs().max())
    proj = g['proj'].double()
    np.testing.assert_allclose(fit.proj * signs(fit.proj, proj), proj, rtol=0, atol=1e-5 * proj.abs().max())

    model = tiny_model(num_classes=7)
    model.head.reset_pool('gem', feature_map=model.head.feature_map._replace(channels=12))
    model.num_features = 12
    model.head.fc = nn.Linear(12, 7)
    model.head.fc.load_state_dict({'weight': g['initial.weight'], 'bias': g['initial.bias']})
    fold_whitening(model, fit)
    with torch.no_grad():
        embedding = model.head.whitening(GeM(p=3.0)(g['test_maps']))
        logits = model.head.classify(embedding)
    expected = g['stage3_folded.logits']
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    # below: the original's float32 PCA differs by 2.5e-5 from a float64 one of the very embeddings that it saw
    expected = g['stage3_folded.embedding']
    turned = embedding * signs(embedding, expected)
    torch.testing.assert_close(turned, expected, rtol=0, atol=3e-5 * expected.abs().max().item())
    weight = g['stage3_folded.weight']
    turned = model.head.fc.weight.detach() * signs(fit.proj, proj).float()
    torch.testing.assert_close(turned, weight, rtol=0, atol=3e-5 * weight.abs().max().item())
    torch.testing.assert_close(model.head.fc.bias.detach(), g['stage3_folded.bias'], rtol=1e-5, atol=1e-6)


def test_covariance_becomes_the_identity(embeddings):
    fit = fit_whitening(embeddings.split(37))
    z = with_constant(embeddings)
    y = (z - fit.mean) @ fit.proj
    assert (y.mean(0)).abs().max() < 1e-9
    np.testing.assert_allclose(torch.cov(y.T), np.eye(fit.dim), rtol=0, atol=1e-9)
    np.testing.assert_allclose(fit.eigenvalues, np.linalg.eigvalsh(np.cov(z.numpy().T))[::-1], rtol=1e-8)
    few = fit_whitening(embeddings, dim=9)
    assert few.dim == 9 and torch.equal(few.proj, fit_whitening(embeddings).proj[:, :9])


def test_fewer_images_than_dimensions(embeddings):
    channels = embeddings.shape[1]
    few = embeddings[:channels]
    with pytest.warns(UserWarning, match=f'{channels} images are fewer than the {channels + 2} .* Give more images'):
        fit = fit_whitening(few)
    assert 0 < fit.shrinkage <= 1 and fit.dim == channels + 1
    covariance = torch.cov(with_constant(few).T)
    shrunk = (1 - fit.shrinkage) * covariance + fit.shrinkage * covariance.diagonal().mean() * torch.eye(channels + 1)
    np.testing.assert_allclose(fit.proj.T @ shrunk @ fit.proj, np.eye(channels + 1), atol=1e-9)
    n, p, square = len(few), channels + 1, covariance.square().sum()  # as the paper states it
    trace = covariance.trace()
    oas = ((1 - 2 / p) * square + trace ** 2) / ((n + 1 - 2 / p) * (square - trace ** 2 / p))
    assert fit.shrinkage == pytest.approx(min(1, float(oas)), rel=1e-6) and oas_shrinkage(torch.ones(5), 100) == 1
    assert fit_whitening(few, shrinkage=0.5).shrinkage == 0.5
    assert fit_whitening(few, dim=10, shrinkage=0).num_constant == 0


def test_constant_channels(model, embeddings):
    dead = embeddings.clone()
    dead[:, [2, 5]] = 1e-6
    fit = fit_whitening(dead)
    assert fit.num_constant == 2
    assert torch.isfinite(fit.proj).all() and fit.proj.abs().max() < 1e4
    other = copy.deepcopy(model)
    fold_whitening(other, fit)
    # classified as before, also where a channel that was dead comes alive
    for e in (dead, embeddings):
        expected = model.head.fc(e) / ((e.square().sum(1, keepdim=True) + 1).sqrt() + 1e-6)
        torch.testing.assert_close(other.head.classify(other.head.whitening(e)), expected, rtol=1e-4, atol=1e-5)


def test_learned_formula(views):
    embeddings, groups = views
    pairs = matching_pairs(groups)
    assert sorted(map(tuple, np.sort(matching_pairs([5, 2, 5, -1, -1, 5, 2])).tolist())) == [
        (0, 2), (0, 5), (1, 6), (2, 5)]
    many = matching_pairs([0] * 100 + [1] * 3)
    assert len(many) == 1003 and (many[:, 0] != many[:, 1]).all() and many[:1000].max() < 100
    fit = fit_whitening(embeddings, pairs=pairs)
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
    assert torch.equal(fit_whitening(embeddings, 4, pairs=pairs).proj, fit.proj[:, :4])
    few = fit_whitening(embeddings, pairs=pairs[:5])
    assert 0 < few.shrinkage <= 1 and few.proj.isfinite().all()
    assert fit_whitening(embeddings, shrinkage=0.3, pairs=pairs[:5]).shrinkage == 0.3


@pytest.mark.parametrize('embeddings, kwargs, message', [
    ([], {}, 'No images'), (torch.rand(0, 4), {}, 'No images'), (torch.rand(1, 4), {}, '1 image is not enough'),
    (torch.ones(30, 4), {}, 'The 30 images all have the same embedding'),
    (torch.tensor([[1., float('nan')]] * 9), {}, 'NaN or infinity'),
    (torch.rand(9, 4), {'dim': 0}, 'dim=0'), (torch.rand(9, 4), {'dim': 6}, 'dim=6'),
    (torch.rand(4, 4), {'shrinkage': 0}, '4 images have 3 components'),
    *[(torch.rand(9, 4), {'shrinkage': bad}, 'shrinkage=') for bad in (-0.1, 1.1, 'ledoit', float('nan'))],
    (torch.rand(9, 4), {'pairs': [[3, 3]]}, 'identical'), (torch.rand(9, 4), {'pairs': [[-1, 0]]}, '-1 to 0 of 9')])
def test_bad_arguments(embeddings, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit_whitening(embeddings, **kwargs)
    for groups in ([0, 1, 2], [-1, -1], []):
        with pytest.raises(ValueError, match='of one group'):
            matching_pairs(groups)


@torch.no_grad()
@pytest.mark.parametrize('learned', [False, True])
def test_folded_model_ranks_classes_as_before_and_reloads(model, embeddings, learned, tmp_path):
    whitened = copy.deepcopy(model)
    pairs = matching_pairs(np.arange(400) // 3) if learned else None
    fold_whitening(whitened, fit_whitening(embeddings, pairs=pairs))
    x = image_for(model)
    e = model.forward_head(model.forward_features(x), pre_logits=True)
    norm = (e.double().square().sum(1, keepdim=True) + 1).sqrt() + 1e-6
    expected = (model(x).double() / norm).float()
    torch.testing.assert_close(whitened(x), expected, rtol=1e-4, atol=2e-6 * expected.abs().max().item())
    assert torch.equal(whitened(x).topk(5).indices, model(x).topk(5).indices)
    assert whitened.embed(x).shape == (2, model.num_features + 1) and whitened.num_classes == 5
    save_pretrained(whitened, tmp_path / 'whitened')
    again = timm.create_model(f'local-dir:{tmp_path}/whitened', pretrained=True).eval()
    assert torch.equal(again(x), whitened(x)) and torch.equal(again.embed(x), whitened.embed(x))
    assert torch.equal(again.embed(x, dim=4), whitened.embed(x, dim=4))


@torch.no_grad()
def test_fewer_components_project_the_classifier(model, embeddings):
    whitened = copy.deepcopy(model)
    fit = fit_whitening(embeddings, dim=20)
    fold_whitening(whitened, fit)
    z = with_constant(embeddings)
    kept = fit.proj.numpy()
    back = np.linalg.pinv(kept)  # z - mean = y back, in the least-squares sense
    seen = (z - fit.mean).numpy() @ kept @ back + fit.mean.numpy()
    classifier = torch.cat([model.head.fc.weight, model.head.fc.bias[:, None]], 1).double().numpy()
    logits = whitened.head.classify(whitened.head.whitening(embeddings))
    np.testing.assert_allclose(logits, seen @ classifier.T, rtol=1e-4, atol=1e-5)
    training = tiny_model(num_classes=0).train()
    with pytest.raises(ValueError, match='7 channels does not fit a model of'):
        fold_whitening(training, fit_whitening(embeddings[:, :7]))
    fold_whitening(training, fit)
    assert training.training and training.eval()(image_for(model)).shape == (2, 20)
    with pytest.raises(ValueError, match='whitened already'):
        fold_whitening(training, fit)


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on the device 'lazy', which stands for one that has none, as MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in [*args, out, *(out if isinstance(out, tuple) else ())] if isinstance(t, torch.Tensor)]
        if any(t.device.type == 'lazy' for t in tensors):
            assert (kwargs or {}).get('dtype') != torch.float64, func  # .to('cpu', torch.float64) converts first
            assert not any(t.device.type == 'lazy' and t.dtype == torch.float64 for t in tensors), func
        return out


def test_devices_without_float64():
    with FakeTensorMode(), WithoutFloat64():
        with pytest.raises(AssertionError):
            torch.ones(1, device='lazy').to('cpu', torch.float64)
        model = timm.create_model('multigrain', trunk='test_resnet', num_classes=3, device='lazy')
        size = model.num_features + 1
        sums = (torch.zeros(n, dtype=torch.float64) for n in ((size,), (size, 16), (16,)))
        fold_whitening(model, WhiteningFit(*sums, 100))
        assert model.whitened and with_constant(torch.rand(4, size - 1, device='lazy')).dtype == torch.float64
        embedding = torch.rand(12, 64, device='lazy')
        target = torch.arange(4, device='lazy').repeat_interleave(3)
        triplets, prob = DistanceWeightedSampler(max_positives=2)(embedding, target, return_prob=True)
        assert margin_loss(embedding, triplets, 1.2).dtype == torch.float32
        assert effective_negatives(prob).shape == (12,)
