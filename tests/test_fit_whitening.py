"""Fitted whitening against the original's numbers and plain float64 arithmetic."""
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
from timm_multigrain.whiten.fit import WhiteningFit, fit_whitening, fold_whitening, with_constant

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
    model.head.set_channels(12)
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
    y = (with_constant(embeddings) - fit.mean) @ fit.proj
    assert (y.mean(0)).abs().max() < 1e-9
    np.testing.assert_allclose(torch.cov(y.T), np.eye(fit.dim), rtol=0, atol=1e-9)
    z = with_constant(embeddings)
    np.testing.assert_allclose(fit.eigenvalues, np.linalg.eigvalsh(np.cov(z.numpy().T))[::-1], rtol=1e-8)


def test_fewer_components_are_the_first(embeddings):
    full, part = fit_whitening(embeddings), fit_whitening(embeddings, dim=9)
    assert part.dim == 9 and torch.equal(part.proj, full.proj[:, :9])
    with pytest.raises(ValueError, match='dim=0'):
        fit_whitening(embeddings, dim=0)
    with pytest.raises(ValueError, match=f'dim={embeddings.shape[1] + 2}'):
        fit_whitening(embeddings, dim=embeddings.shape[1] + 2)


def test_fewer_images_than_dimensions(embeddings):
    channels = embeddings.shape[1]
    few = embeddings[:channels]
    with pytest.warns(UserWarning, match=f'{channels} images are fewer than the {channels + 2} .* Give more images'):
        fit = fit_whitening(few)
    assert 0 < fit.shrinkage <= 1 and fit.dim == channels + 1
    covariance = torch.cov(with_constant(few).T)
    shrunk = (1 - fit.shrinkage) * covariance + fit.shrinkage * covariance.diagonal().mean() * torch.eye(channels + 1)
    np.testing.assert_allclose(fit.proj.T @ shrunk @ fit.proj, np.eye(channels + 1), atol=1e-9)
    given = fit_whitening(few, shrinkage=0.5)
    assert given.shrinkage == 0.5
    with pytest.raises(ValueError, match=f'{channels} images have {channels - 1} components'):
        fit_whitening(few, shrinkage=0)
    assert fit_whitening(few, dim=10, shrinkage=0).num_constant == 0
    for bad in (-0.1, 1.1, 'ledoit', float('nan')):
        with pytest.raises(ValueError, match='shrinkage='):
            fit_whitening(few, shrinkage=bad)


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


@pytest.mark.parametrize('embeddings, message', [
    ([], 'No images'), (torch.rand(0, 4), 'No images'), (torch.rand(1, 4), '1 image is not enough'),
    (torch.ones(30, 4), 'same embedding'), (torch.rand(4), r'give \(n, C\)'),
    (torch.tensor([[1., float('nan')]] * 9), 'NaN or infinity'),
    ([torch.rand(2, 3), torch.rand(2, 4)], r'give \(n, 4\)'),
])
def test_bad_embeddings(embeddings, message):
    with pytest.raises(ValueError, match=message):
        fit_whitening(embeddings)


@torch.no_grad()
def test_folded_model_ranks_classes_as_before_and_reloads(model, embeddings, tmp_path):
    whitened = copy.deepcopy(model)
    fold_whitening(whitened, fit_whitening(embeddings))
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


def test_without_classifier_and_in_training(embeddings):
    model = tiny_model(num_classes=0).train()
    fold_whitening(model, fit_whitening(embeddings))
    assert model.training and model.whitened and model.eval()(image_for(model)).shape == (2, model.num_features + 1)


def test_refusals(model, embeddings):
    whitened = copy.deepcopy(model)
    fit = fit_whitening(embeddings)
    fold_whitening(whitened, fit)
    with pytest.raises(ValueError, match='whitened already'):
        fold_whitening(whitened, fit)
    other = fit_whitening(embeddings[:, :7])
    with pytest.raises(ValueError, match='7 channels does not fit a model of'):
        fold_whitening(copy.deepcopy(model), other)


def test_shows_itself(embeddings):
    assert str(fit_whitening(embeddings)) == 'PCA whitening, 65 of 65 components, 400 images'.replace(
        '65', str(embeddings.shape[1] + 1))
    fit = WhiteningFit(torch.zeros(3), torch.zeros(3, 2), torch.ones(2), 7, 1, 0.5)
    assert str(fit) == 'PCA whitening, 2 of 3 components, 7 images (shrinkage 0.5, 1 directions constant)'
    assert fit.to_dict() == {'kind': 'pca', 'dim': 2, 'images': 7, 'shrinkage': 0.5, 'constant': 1}


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
