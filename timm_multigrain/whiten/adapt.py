"""Linear adaptation: a projection of frozen embeddings, learned from labelled images.

`ILIAS: instance-level image retrieval at scale`, Kordopatis-Zilos et al., arXiv 2502.11748, adapts foundation models to
instances so: a linear layer to 512 components, trained by a softmax over cosines with the classes (CosFace, Wang et
al., arXiv 1801.09414; scale 16, margin 0). The trunk runs once for each image, the rest takes seconds. What is learned
takes the place of the whitening, and is saved, published and used like one.
"""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import Descriptors
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.models.multigrain import MultiGrain

from .fit import WhitenedModel, WhiteningFit, fit_model, groups_of, with_constant

DIM = 512
BATCH = 128
SCALE = 16  # of the cosines
LEAST_STEPS = 500  # two epochs of a million images are 15,000, of a thousand they would be 16


def fit_adaptation(
        embeddings: torch.Tensor,
        groups: Sequence[int] | np.ndarray,
        dim: int | None = None,
        *,
        epochs: int | None = None,
        lr: float = 1e-3,
        seed: int = 0,
        progress: bool = True,
) -> WhiteningFit:
    """Learn a projection that brings images of a group together, and other groups apart.

    Args:
        embeddings: Pooled embeddings, (n, C), not normalised.
        groups: Group of each, negative for images to leave out.
        dim: Components, 512 by default (C + 1 if that is less), strongest first.
        epochs: Passes over the images; by default two, or as many as make 500 steps of 128 images.
        lr: Learning rate of AdamW at the start, which falls to 0 as a cosine.
        seed: Of the start and the order.
    """
    groups = torch.as_tensor(np.asarray(groups))
    x = with_constant(embeddings[groups >= 0]).float()
    classes, labels = groups[groups >= 0].unique(return_inverse=True)
    _check_number(len(classes))
    dim = min(DIM, x.shape[1]) if dim is None else dim
    if not 1 <= dim <= x.shape[1]:
        raise ValueError(f'dim={dim}: an embedding of {x.shape[1] - 1} channels and the constant one has 1 to '
                         f'{x.shape[1]}.')
    per_epoch = -(-len(x) // BATCH)
    epochs = max(2, -(-LEAST_STEPS // per_epoch)) if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f'epochs={epochs}: give 1 or more.')
    generator = torch.Generator().manual_seed(seed)
    proj, centres = (torch.randn(*shape, generator=generator).div_(shape[0] ** 0.5).requires_grad_()
                     for shape in ((x.shape[1], dim), (dim, len(classes))))
    optimizer = torch.optim.AdamW([proj, centres], lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    with torch.enable_grad():
        for _ in tqdm(range(epochs), desc='Adapting', unit='epoch', disable=None if progress else True):
            for rows in torch.randperm(len(x), generator=generator).split(BATCH):
                cosines = F.normalize(x[rows] @ proj, dim=1) @ F.normalize(centres, dim=0)
                loss = F.cross_entropy(SCALE * cosines, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    proj = proj.detach().double()
    directions = F.normalize(x.double() @ proj, dim=1)
    values, turn = torch.linalg.eigh(directions.T @ directions / len(x))  # cosines stay, the strongest come first
    return WhiteningFit(proj.new_zeros(len(proj)), proj @ turn.flip(1), values.flip(0), len(x), kind='adapted')


def _check_number(groups: int) -> None:
    if groups < 2:
        raise ValueError(f'An adaptation learns from two groups of images or more, not {groups}.')


def adapt(
        model: MultiGrain,
        source: ImageSource,
        groups: Sequence[int],
        protocol: Protocol,
        *,
        dim: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        work_dir: str | os.PathLike | None = None,
        strict: bool = False,
        **extraction: Any,
) -> WhitenedModel:
    """Learn a linear adaptation from labelled images and fold it into a model, in place of a whitening.

    Args:
        model: Model without whitening.
        source: Images of things like those that will be searched, not the test images.
        groups: Group of each image (an instance, product, landmark), -1 to leave it out.
        protocol: How they are prepared, as the searched images will be; single scale, no flip.
        dim, epochs, seed: As of `fit_adaptation`.
        work_dir: Folder that keeps the embeddings, see `whiten_model`; that of ``timm-multigrain embed --raw`` with the
            same images and settings will do, and the trunk does not run then.
        **extraction: As of `extract`: batch_size, workers, device, dtype, progress.
    """
    _check_number(len({group for group in groups if group >= 0}))  # before the trunk runs

    def fit(folder: Path, described: Descriptors) -> WhiteningFit:
        return fit_adaptation(described.vectors, groups_of(described, source, groups), dim, epochs=epochs, seed=seed,
                              progress=extraction.get('progress', True))

    return fit_model(model, source, protocol, fit, work_dir, strict, **extraction)
