"""Retrieval figures of a validation, recomputed an image at a time."""
import math

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_data_config

from timm_multigrain.data import DecodedDataset
from timm_multigrain.images.copies import COPY_TRANSFORMS, make_copies
from timm_multigrain.train import evaluation
from timm_multigrain.train.evaluation import EditedImages, retrieval_figures

from .test_metrics import slow_query


def slow_ap(scores, right):
    return slow_query(scores, [i for i, one in enumerate(right) if one], ())[0]


def naive_figures(vectors, instances, copies, rows):
    firsts, precisions = [], []
    for query in range(len(vectors)):
        others = [i for i in range(len(vectors)) if i != query]
        right = [instances[i] == instances[query] for i in others]
        scores = [float(vectors[query] @ vectors[i]) for i in others]
        if any(right):
            precisions.append(slow_ap(scores, right))
            best = max(s for s, r in zip(scores, right, strict=True) if r)
            firsts.append(all(s < best for s, r in zip(scores, right, strict=True) if not r))
    found = [slow_ap([float(copy @ v) for v in vectors], [i == row for i in range(len(vectors))])
             for copy, row in zip(copies, rows, strict=True)]
    mean = lambda values: 100 * sum(values) / len(values) if values else math.nan  # noqa: E731
    return {'recall1': mean(firsts), 'map': mean(precisions), 'copy_map': mean(found)}


def figures_of(model, folder, size):
    """The figures of a model, by classes, on an image folder of fewer images than are edited at most."""
    dataset = ImageDataset(str(folder))
    config = resolve_data_config(dict(img_size=size), model=model)
    transform = create_transform(**config)
    images = [dataset[i][0] for i in range(len(dataset))]
    kinds = list(COPY_TRANSFORMS)
    copies = [make_copies(image, kinds)[kinds[i % len(kinds)]] for i, image in enumerate(images)]
    embed = lambda image: model.embed(transform(image)[None])[0]  # noqa: E731
    with torch.inference_mode():
        vectors, edited = [embed(i) for i in images], [embed(i) for i in copies]
    return naive_figures(vectors, [label for _, label in dataset.reader.samples], edited, range(len(images)))


def load(checkpoint, **kwargs):
    model = timm.create_model('multigrain', trunk='test_resnet', num_classes=3, **kwargs)
    model.load_state_dict(checkpoint['state_dict'])
    return model.eval()


@pytest.mark.parametrize('seed', range(3))
def test_figures(seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-2, 3, (30, 4), generator=generator).float()  # with ties
    instances = np.random.default_rng(seed).integers(0, 12, 30)
    rows = np.array([3, 29, 0, 7])
    copies = torch.randint(-2, 3, (4, 4), generator=generator).float()
    assert retrieval_figures(vectors, instances, copies, rows) == pytest.approx(
        naive_figures(vectors, instances, copies, rows))
    alone = retrieval_figures(vectors, np.arange(30), copies, rows)
    assert math.isnan(alone['map']) and math.isnan(alone['recall1']) and alone['copy_map'] > 0
    vectors[3, 0] = math.nan
    assert all(map(math.isnan, retrieval_figures(vectors, instances, copies, rows).values()))


def test_many_queries_are_thinned_out():
    """The first 1,000 of 4,000 images alone find their pair; evenly spread queries see a quarter of that."""
    vectors = torch.nn.functional.normalize(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[1:1000:2] = vectors[:1000:2]
    figures = retrieval_figures(vectors, np.arange(4000) // 2, vectors[:1], np.array([0]))
    assert figures['recall1'] == pytest.approx(25, abs=1.5)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_edited_images(noise_folder, mode):
    images = DecodedDataset(ImageDataset(str(noise_folder / 'train'), input_img_mode=mode))
    edited = EditedImages(images, 10)
    edited.transform = lambda image: image
    assert len(edited) == 10 and edited.rows.tolist() == [0, 4, 8, 12, 16, 19, 23, 27, 31, 35]
    kinds = list(COPY_TRANSFORMS)
    for i, row in enumerate(edited.rows):
        (image, label), (original, expected) = edited[i], images[int(row)]
        kind = kinds[i % len(kinds)]
        assert isinstance(image, Image.Image) and image.mode == mode and label == expected
        assert np.array_equal(np.asarray(image), np.asarray(make_copies(original, [kind])[kind].convert(mode)))


def test_order_of_images_over_ranks(monkeypatch):
    """timm deals 7 images out to 3 ranks as 0 3 6, 1 4 0, 2 5 1."""
    dealt = torch.tensor([[0, 3, 6], [1, 4, 0], [2, 5, 1]])
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 3)
    monkeypatch.setattr(
        evaluation, 'all_gather_with_grad', lambda own: torch.cat([own + 10 * dealt[r] for r in range(3)]))
    watched = evaluation._Watched(timm.create_model('multigrain', trunk='test_resnet', num_classes=3), None)
    watched.embeddings, watched.classes = [torch.zeros(2), torch.zeros(1)], [torch.zeros(3)]
    for found in watched.collected(7):
        assert found.tolist() == [0, 10, 20, 30, 40, 50, 60]
