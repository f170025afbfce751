"""p* by retrieval: mAP over a grid of exponents on groups of images of the same instance."""
import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_multigrain.embed.descriptors import iter_shards
from timm_multigrain.embed.extract import extract_shards
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.systems import System, Systems
from timm_multigrain.layers import l2_normalize
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.search.exact import similarity_chunks

from .benchmarks.folder import Groups
from .p_result import PResult
from .tune_p import GRID, check_grid, check_p_model

__all__ = ['scan_p_groups']


def scan_p_groups(
        model: MultiGrain,
        groups: Groups,
        protocol: Protocol,
        grid: Sequence[float] = GRID,
        *,
        work_dir: str | os.PathLike | None = None,
        **extraction: Any,
) -> PResult:
    """mAP at each p of a grid, in one pass of the trunk.

    Args:
        model: Model with GeM and no whitening.
        groups: Images in groups, see `timm_multigrain.measure.benchmarks.folder.load_folder`; not the test images.
        protocol: Test protocol, one scale, no flip.
        grid: Exponents to scan, beside the model's own.
        work_dir: Folder that keeps the embeddings, so that a run that was cut off goes on.
        **extraction: As of `embed_images`: batch_size, workers, device, dtype, progress.

    Raises:
        UnreadableImage: An image that cannot be read.
        ValueError: Another pooling than GeM with one p, a whitened model, or an impossible grid.
    """
    check_p_model(model)
    grid = check_grid(grid, model.gem_p)
    if not grid:
        raise ValueError('The grid is empty: give exponents, such as 1 2 3 4.')
    if protocol.scales != (1.,) or protocol.flip:
        raise ValueError(f'{protocol}: p is fitted at one scale, without flip.')
    systems = Systems(model, [System('gem', p) for p in grid])
    aps = []
    with _folder(work_dir) as folder:
        extracted = extract_shards(
            systems, groups.database, protocol, folder, strict=True, descriptor=False, **extraction)
        for number in range(len(grid)):
            pieces = [systems.take(vectors, number) for _, vectors in iter_shards(folder)]
            aps.append(_average_precisions(groups, pieces))
    aps = np.stack(aps)
    noise = np.sqrt(((aps - aps[grid.index(model.gem_p)]) ** 2).sum(1)) / aps.shape[1]
    return PResult(
        'mAP', grid, tuple(aps.mean(1).tolist()), tuple(noise.tolist()), None, model.gem_p, None, (), extracted.number,
        protocol)


def _average_precisions(groups: Groups, pieces: list) -> np.ndarray:
    vectors = l2_normalize(torch.cat(pieces))
    return groups.average_precisions(similarity_chunks(vectors[torch.as_tensor(groups.query_rows)], vectors))


@contextmanager
def _folder(work_dir: str | os.PathLike | None):
    if work_dir is not None:
        yield Path(work_dir)
        return
    with tempfile.TemporaryDirectory(prefix='timm-multigrain-') as folder:
        yield Path(folder) / 'embeddings'
