"""The demo's measurements: top-1 of the held-out pictures, and mAP of finding their edited copies among all of them."""
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from timm_multigrain.images.copies import COPY_TRANSFORMS, make_copies
from timm_multigrain.images.sources import read_image
from timm_multigrain.images.transforms import create_eval_transform
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.models import MultiGrain

from .folder import PictureFolder

__all__ = ['CopySet', 'DemoScores', 'evaluate', 'make_copy_set']

_KINDS = ('original', *COPY_TRANSFORMS)


@dataclass(frozen=True)
class CopySet:
    """The held-out pictures and their edited copies as the network sees them.

    Attributes:
        images: (pictures, kinds, 3, H, W) uint8; kind 0 is the picture itself.
        labels: (pictures,) int64 classes.
    """
    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class DemoScores:
    """Measurements of one model.

    Attributes:
        top1: Per cent of the held-out pictures classified right.
        copy_map: mAP in per cent of finding all copies of a held-out picture among all pictures and copies.
        copy_map_of: The same for each kind of copy alone.
        similarity: (pictures, pictures * kinds) cosine similarities, database in the order picture, kind.
        predictions: (pictures * kinds,) predicted classes.
    """
    top1: float
    copy_map: float
    copy_map_of: dict[str, float]
    similarity: torch.Tensor
    predictions: torch.Tensor


def make_copy_set(folder: PictureFolder, img_size: int) -> CopySet:
    """Draw the copies of every held-out picture once; every model is measured on the same."""
    transform = create_eval_transform(img_size, mean=(0., 0., 0.), std=(1., 1., 1.))
    images = torch.empty(len(folder.val), len(_KINDS), 3, img_size, img_size, dtype=torch.uint8)
    labels = torch.empty(len(folder.val), dtype=torch.int64)
    for i in tqdm(range(len(folder.val)), desc='Editing copies', unit='picture', leave=False, disable=None):
        picture = read_image(folder.path(i))
        versions = {'original': picture, **make_copies(picture)}
        for j, kind in enumerate(_KINDS):
            images[i, j] = (transform(versions[kind]) * 255).round().to(torch.uint8)
        labels[i] = folder.val[i][1]
    return CopySet(images, labels)


@torch.inference_mode()
def evaluate(model: MultiGrain, copies: CopySet, batch_size: int = 64) -> DemoScores:
    """Measure a model in eval mode."""
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    flat = copies.images.flatten(0, 1)
    descriptors, predictions = [], []
    for chunk in tqdm(flat.split(batch_size), desc='Embedding', unit='batch', leave=False, disable=None):
        x = ((chunk.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        embedding = model.forward_head(model.forward_features(x), pre_logits=True)
        predictions.append(model.head.classify(embedding).argmax(1))
        descriptors.append(torch.nn.functional.normalize(embedding.float()))
    predictions = torch.cat(predictions)
    descriptors = torch.cat(descriptors).unflatten(0, copies.images.shape[:2])
    similarity = descriptors[:, 0] @ descriptors.flatten(0, 1).T
    original = predictions.unflatten(0, copies.images.shape[:2])[:, 0]
    top1 = 100 * (original == copies.labels).cpu().double().mean().item()
    kinds = range(1, len(_KINDS))
    return DemoScores(
        top1=top1,
        copy_map=_copy_map(similarity, kinds),
        copy_map_of={_KINDS[k]: _copy_map(similarity, [k]) for k in kinds},
        similarity=similarity,
        predictions=predictions,
    )


def _copy_map(similarity: torch.Tensor, wanted) -> float:
    """mAP in per cent of these kinds of copies; the query and its other copies are left out of its list."""
    wanted = np.asarray(list(wanted))
    others = np.setdiff1d(np.arange(len(_KINDS)), wanted)
    base = np.arange(len(similarity))[:, None] * len(_KINDS)
    return 100 * mean_average_precision(similarity, list(base + wanted), list(base + others)).map
