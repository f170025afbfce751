"""Learned whitening (Lw): directions in which matching images agree and others do not.

Mikolajczyk and Matas, "Improving descriptors for fast tree matching by optimal linear projection", ICCV 2007, as
Radenović et al., "Fine-tuning CNN image retrieval with no human annotation", arXiv 1711.02512, section 3.4, apply it to
descriptors of images: what differs between matching images is whitened, C_S^-1/2, then what varies over all images is
sorted, strongest first.
"""
from collections.abc import Sequence

import numpy as np
import torch

from .pca import ROWS, StreamingPCA, oas_shrinkage
from .whiten import CONSTANT, WhiteningFit, accumulate, check_components, check_shrinkage, with_constant

__all__ = ['fit_learned_whitening', 'matching_pairs']


def matching_pairs(groups: Sequence[int], most: int = 1000, seed: int = 0) -> np.ndarray:
    """Pairs of images of the same group.

    Args:
        groups: Group of each image; images of negative groups match none.
        most: Pairs of a group; of a larger one, as many are drawn.
        seed: Of the draw.

    Returns:
        (m, 2) int64.

    Raises:
        ValueError: No two images are of one group.
    """
    groups = np.asarray(groups)
    rng = np.random.default_rng(seed)
    pairs = []
    for group in np.unique(groups[groups >= 0]):
        members = np.flatnonzero(groups == group)
        size = len(members)
        if size * (size - 1) // 2 <= most:
            first, second = np.triu_indices(size, 1)
        else:
            first = rng.integers(0, size, most)
            second = (first + rng.integers(1, size, most)) % size
        pairs.append(np.stack([members[first], members[second]], 1))
    pairs = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)
    if not len(pairs):
        raise ValueError(f'No two of {len(groups)} images are of one group: learned whitening needs matching images.')
    return pairs


def fit_learned_whitening(
        embeddings: torch.Tensor,
        pairs: np.ndarray | Sequence[tuple[int, int]],
        components: int | None = None,
        shrinkage: float | str | None = None,
) -> WhiteningFit:
    """Fit a learned whitening.

    Args:
        embeddings: (n, C) pooled embeddings, not normalised.
        pairs: (m, 2) numbers of matching images, see `matching_pairs`.
        components: Number of components kept, all C + 1 by default.
        shrinkage: Share of the identity in the covariance of the differences. 'oas' estimates it (Chen et al.
            2010). None: 0 with C + 2 pairs or more, 'oas' with fewer.

    Raises:
        ValueError: No pairs, pairs of images that are not there, or pairs that do not differ.
    """
    check_shrinkage(shrinkage)
    pairs = torch.as_tensor(np.asarray(pairs))
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f'pairs have the shape {tuple(pairs.shape)}: give (m, 2) numbers of matching images.')
    if pairs.min() < 0 or pairs.max() >= len(embeddings):
        raise ValueError(f'pairs name images {int(pairs.min())} to {int(pairs.max())} of {len(embeddings)}.')
    every = accumulate(embeddings)
    components = check_components(components, every.dim)
    within = StreamingPCA(every.dim, centered=False)
    for part in pairs.split(ROWS):
        within.update(with_constant(embeddings[part[:, 0]]) - with_constant(embeddings[part[:, 1]]))
    values, vectors = within.eigh()
    if not values[0] > 1e-20:
        raise ValueError(f'The {len(pairs)} matching pairs are of identical images: there is nothing to learn.')
    if shrinkage is None:
        shrinkage = 'oas' if len(pairs) <= every.dim else 0.
    if shrinkage == 'oas':
        shrinkage = oas_shrinkage(values, len(pairs))
    values = (1 - shrinkage) * values + shrinkage * values.mean()
    constant = values <= CONSTANT * values[0]
    vectors /= torch.where(constant, values[0], values).sqrt()
    ratios, turn = torch.linalg.eigh(vectors.T @ every.covariance() @ vectors)
    proj = vectors @ turn.flip(1)
    return WhiteningFit(
        every.mean, proj[:, :components], ratios.flip(0)[:components].clamp(min=0), every.count, int(constant.sum()),
        float(shrinkage), 'learned')
