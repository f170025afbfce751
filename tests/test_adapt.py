"""Linear adaptation: what it learns from groups, against projections by hand, in Python and by the command."""
import shutil

import numpy as np
import pytest
import timm
import torch

from timm_multigrain.cli.main import main
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.sources import find_images
from timm_multigrain.models.open import open_model
from timm_multigrain.models.save import fitted
from timm_multigrain.whiten.adapt import fit_adaptation
from timm_multigrain.whiten.fit import WhitenedModel, with_constant

from .pictures import write_noise
from .tiny import image_for, tiny_model

SETTINGS = ['--size', '32', '--protocol', 'longer-side', '--device', 'cpu', '--workers', '0']


def hidden_groups(seed, number=6, size=40):
    """Groups that differ in 4 of 24 channels only, under the noise of the others; the centres are the same."""
    centres = torch.randn(number, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(number, size, 24, generator=generator)
    x[..., 7:11] = 2 * centres[:, None] + 0.3 * torch.randn(number, size, 4, generator=generator)
    return x.flatten(0, 1), np.repeat(np.arange(number), size)


def nearest_is_right(vectors, groups):
    unit = torch.nn.functional.normalize(vectors, dim=1)
    return float((groups[(unit @ unit.T).fill_diagonal_(-2).argmax(1)] == groups).mean())


def test_groups_come_together():
    train, groups = hidden_groups(1)
    test, _ = hidden_groups(2)
    fit, again = (fit_adaptation(train, groups, dim=8, epochs=100, lr=0.03, progress=False) for _ in range(2))
    found = (with_constant(test) - fit.mean) @ fit.proj
    assert nearest_is_right(test, groups) < 0.8 < 0.9 < nearest_is_right(found, groups)
    assert (fit.kind, fit.dim, fit.num_images) == ('adapted', 8, 240) and 'Linear adaptation, 8 of 25' in str(fit)
    assert torch.equal(fit.proj, again.proj)
    unit = torch.nn.functional.normalize(with_constant(train) @ fit.proj, dim=1).numpy()
    assert np.allclose(unit.T @ unit / len(unit), np.diag(fit.eigenvalues.numpy()), atol=1e-5)
    assert (np.diff(fit.eigenvalues.numpy()) <= 0).all() and fit.eigenvalues.sum() == pytest.approx(1, abs=1e-5)


def test_one_step_by_hand():
    """The first step of AdamW moves each weight by the learning rate against its gradient, here by differences."""
    x, groups = hidden_groups(3, number=3, size=4)
    z, labels = with_constant(x), groups

    def start():
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(25, 2, generator=generator) / 5).double(), (
            torch.randn(2, 3, generator=generator) / 2 ** 0.5).double()

    def loss(proj, centres):
        total = 0
        for row, label in zip(z, labels, strict=True):
            y = row @ proj
            cosines = [float(y @ c) / float(y.norm() * c.norm()) for c in centres.T]
            logits = [16 * c for c in cosines]
            total -= logits[label] - np.log(sum(np.exp(v) for v in logits))
        return total / len(z)

    proj, centres = start()
    signs = torch.zeros(25, 2, dtype=torch.float64)
    for i in range(25):
        for j in range(2):
            up, down = proj.clone(), proj.clone()
            up[i, j] += 1e-5
            down[i, j] -= 1e-5
            signs[i, j] = np.sign(loss(up, centres) - loss(down, centres))
    fit = fit_adaptation(x, groups, dim=2, epochs=1, lr=0.01, progress=False)
    moved = proj - 0.01 * signs
    angles = [torch.nn.functional.normalize(z @ p, dim=1) for p in (moved, fit.proj)]
    torch.testing.assert_close(angles[0] @ angles[0].T, angles[1] @ angles[1].T, atol=1e-4, rtol=0)


def test_images_without_a_group_are_left_out():
    train, groups = hidden_groups(1)
    marked = groups.copy()
    marked[groups == 5] = -1
    fits = [fit_adaptation(train[groups != 5], groups[groups != 5], 4, epochs=2, progress=False),
            fit_adaptation(train, marked, 4, epochs=2, progress=False)]
    assert torch.equal(fits[0].proj, fits[1].proj)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(groups=[0] * 240), 'or more, not 1'), (dict(dim=26), '24 channels and the constant one has 1 to 25'),
    (dict(epochs=0), 'epochs=0')])
def test_what_cannot_be_learned(arguments, message):
    train, groups = hidden_groups(1)
    with pytest.raises(ValueError, match=message):
        fit_adaptation(**{'embeddings': train, 'groups': groups, 'progress': False, **arguments})


def test_the_command(tmp_path, capsys, monkeypatch):
    write_noise(tmp_path / 'things', [f'thing {i // 3}/{i}.png' for i in range(12)], (24, 32))
    saved, things, out = tmp_path / 'model', str(tmp_path / 'things'), tmp_path / 'adapted'
    save_pretrained(tiny_model(), saved, label_names=['a', 'b', 'c'])
    arguments = ['adapt', str(saved), things, '-o', str(out), '--dim', '8', '--epochs', '3', '--seed', '2', *SETTINGS]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert 'Linear adaptation, 8 of 97 components, 12 images' in shown.out
    assert 'Adapting' not in shown.err  # not a terminal
    assert sorted(path.name for path in tmp_path.iterdir()) == ['adapted', 'model', 'things']
    model = open_model(saved)
    source, protocol = find_images(things), Protocol.for_model(model, size=32, kind='longer-side')
    for agreement, lost in ((0.94, True), (0.96, False)):
        text = str(WhitenedModel(fit_adaptation(torch.eye(4), [0, 0, 1, 1], 2, epochs=1), protocol, 3., agreement))
        assert ('classify with the model as it was' in text) is lost
    raw = extract(model, source, protocol, descriptor=False, workers=0).vectors
    groups = [int(name.split('thing ')[1][0]) for name in source.names]
    fit = fit_adaptation(raw, groups, 8, epochs=3, seed=2, progress=False)
    adapted = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    x = image_for(model, 32)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(with_constant(model.forward_head(
            model.forward_features(x), pre_logits=True)) @ fit.proj, dim=1)
        torch.testing.assert_close(adapted.embed(x), expected.float(), atol=1e-5, rtol=0)
    assert fitted(adapted, 'whitening')['kind'] == 'adapted' and adapted.embed(x, dim=3).shape[1] == 3
    # the shards of embed do: the trunk does not run again
    shards, again = str(tmp_path / 'shards'), tmp_path / 'again'
    assert main(['embed', str(saved), things, '-o', shards, '--raw', *SETTINGS]) == 0
    arguments[4] = str(again)
    with monkeypatch.context() as patch:
        patch.setattr('timm_multigrain.images.sources.ImageSource.load_part', lambda *args, **kwargs: 1 / 0)
        assert main([*arguments, '--work-dir', shards]) == 0
    assert torch.equal(open_model(again).head.whitening.proj, open_model(out).head.whitening.proj)
    capsys.readouterr()
    assert main(['adapt', str(out), things, '-o', str(tmp_path / 'c'), *SETTINGS]) == 2
    assert 'whitened already' in capsys.readouterr().err
    shutil.copytree(tmp_path / 'things' / 'thing 0', tmp_path / 'one' / 'thing')
    assert main(['adapt', str(saved), str(tmp_path / 'one'), '-o', str(tmp_path / 'd'), *SETTINGS]) == 2
    assert 'or more, not 1' in capsys.readouterr().err and not list(tmp_path.glob('d*'))
