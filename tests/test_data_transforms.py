"""Lighting against the original implementation's numbers, and what is put into timm's transforms."""
import copy
import io
import random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform as timm_transform
from torchvision import transforms as T
from torchvision.transforms import functional as F

from timm_multigrain.data import Lighting
from timm_multigrain.data.transforms import EIGENVALUES, EIGENVECTORS, insert_jpeg, insert_lighting

from .pictures import noise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_lighting_equals_original(golden):
    data = load_file(golden / 'lighting.safetensors')
    for k, alpha in enumerate(data['alpha']):
        result = Lighting(0.1)(data['x'], alpha)
        expected = data[f'after_clamp.{k}']
        assert (result - expected).abs().max() <= 1e-6 * expected.abs().max()
        unclamped = data[f'after_lighting.{k}']
        inside = (unclamped > 0) & (unclamped < 1)
        torch.testing.assert_close(result[inside], unclamped[inside], rtol=1e-6, atol=1e-6)


def test_lighting_by_hand():
    """A number at a time; on a Pillow image and on bytes rounded to 8 bits."""
    picked, alpha = noise((4, 2)), [0.3, -0.2, 0.5]
    lighting, drawn = Lighting(0.25), torch.tensor(alpha)
    pixels = F.pil_to_tensor(picked)
    result = lighting(F.to_tensor(picked), drawn)
    for c in range(3):
        shift = sum(EIGENVECTORS[c][j] * alpha[j] * EIGENVALUES[j] for j in range(3))
        for y in range(2):
            for x in range(4):
                value = (pixels[c, y, x].item() / 255 + shift) / 1.25
                assert result[c, y, x].item() == pytest.approx(min(1, max(0, value)), abs=1e-6)
    for dtype in (torch.float64, torch.float16):
        other = lighting(F.to_tensor(picked).to(dtype), drawn)
        assert other.dtype == dtype and (other - result).abs().max() < 2e-3
    bytes_ = lighting(pixels, drawn)
    assert bytes_.dtype == torch.uint8 and (bytes_ - 255 * result).abs().max() <= 0.5 + 1e-4
    assert torch.equal(F.pil_to_tensor(lighting(picked, drawn)), bytes_)
    with pytest.raises(ValueError, match='mode L'):
        lighting(picked.convert('L'))


@pytest.mark.parametrize('no_aug', [False, True])
@pytest.mark.parametrize('prefetcher', [False, True])
def test_lighting_inserted_before_the_normalisation(prefetcher, no_aug):
    class Dataset:
        transform = timm_transform(32, is_training=True, use_prefetcher=prefetcher, no_aug=no_aug, hflip=0.)

    plain, image = copy.deepcopy(Dataset.transform), noise()
    lighting = Lighting(0.5)
    insert_lighting(Dataset, lighting)

    def run(transform):
        random.seed(1)
        torch.manual_seed(1)
        return transform(image)

    before, after = run(plain), run(Dataset.transform)
    assert before.dtype == after.dtype == (torch.uint8 if prefetcher else torch.float32)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = (before / 255, after / 255) if prefetcher else (before * std + mean, after * std + mean)
    shift = pixels[1] * 1.5 - pixels[0]  # one number a channel, where nothing was clamped
    inside = (pixels[1] > 0.01) & (pixels[1] < 0.99)
    for channel in range(3):
        assert shift[channel][inside[channel]].std() < (3e-3 if prefetcher else 1e-6)
    assert shift[inside].abs().max() > 1e-3


def test_lighting_inserted_into_every_scheduled_size():
    class Dataset:
        transforms = [timm_transform(size, is_training=True, use_prefetcher=True) for size in (32, 48)]

    insert_lighting(Dataset, Lighting(0.1))
    assert [sum(isinstance(s, Lighting) for s in t.transforms) for t in Dataset.transforms] == [1, 1]
    Dataset.transforms = [T.Compose([T.RandomHorizontalFlip()])]
    with pytest.raises(RuntimeError, match='no conversion to a tensor'):
        insert_lighting(Dataset, Lighting(0.1))


@pytest.mark.parametrize('prefetcher', [False, True])
def test_jpeg_inserted_as_the_last_step_on_images(prefetcher):
    class Dataset:
        transform = timm_transform(32, is_training=True, use_prefetcher=prefetcher, no_aug=True)

    plain, image = copy.deepcopy(Dataset.transform), noise((32, 32))
    assert (Dataset.transform(image) == plain(image)).all()
    insert_jpeg(Dataset, 1.)
    seen = torch.stack([Dataset.transform(image) for _ in range(20)])
    assert not any(torch.equal(x, plain(image)) for x in seen) and len(torch.unique(seen, dim=0)) > 5
    compressed = []
    for quality in range(5, 51):
        buffer = io.BytesIO()
        image.save(buffer, 'JPEG', quality=quality)
        compressed.append(plain(Image.open(buffer)))
    assert all(any(torch.equal(x, y) for y in compressed) for x in seen)
    insert_jpeg(Dataset, 0.)
    torch.manual_seed(0)
    first = Dataset.transform(image)
    Dataset.transform.transforms = [s for s in Dataset.transform.transforms if getattr(s, 'p', 1) != 0]
    torch.manual_seed(0)
    assert torch.equal(first, Dataset.transform(image))


def test_lighting_draws_from_torch():
    image = torch.full((3, 1, 1), 0.5, dtype=torch.float64)
    torch.manual_seed(0)
    results = torch.stack([Lighting(0.1)(image) for _ in range(4000)]).view(-1, 3)
    torch.manual_seed(0)
    assert torch.equal(Lighting(0.1)(image).view(3), results[0])
    vectors, values = torch.tensor(EIGENVECTORS, dtype=torch.float64), torch.tensor(EIGENVALUES, dtype=torch.float64)
    alpha = torch.linalg.solve(vectors, (results * 1.1 - 0.5).T).T / values
    assert alpha.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.05)
    assert alpha.mean(0).tolist() == pytest.approx([0] * 3, abs=0.01)
    assert torch.corrcoef(alpha.T).triu(1).abs().max() < 0.06


def test_lighting_bounds():
    assert Lighting(0.0)(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1)).flatten().tolist() == [0, 0.5, 1]
    for std in (-0.1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match=f'std is {std}'):
            Lighting(std)
    for image in (torch.zeros(3, 4, 4, dtype=torch.int32), torch.zeros(1, 4, 4), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match=r'give \(3, H, W\) floats'):
            Lighting()(image)
