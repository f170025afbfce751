"""A model with a whitening fitted on images, from the images to the folder."""
import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from timm_multigrain.embed.descriptors import Descriptors, iter_shards
from timm_multigrain.embed.extract import extract_shards
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.models.config import json_p, note_fitted
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.save import save_pretrained

from .learned_whitening import fit_learned_whitening, matching_pairs
from .whiten import WhiteningFit, fit_whitening, fold_whitening

__all__ = ['WhitenedModel', 'save_fitted', 'whiten_model']

CHECKED = 4096  # images that classification before and after is compared on


@dataclass(frozen=True, eq=False)
class WhitenedModel:
    """What whitening a model came to.

    Attributes:
        fit: The whitening.
        protocol: What it was fitted for.
        p: Exponent of the pooling.
        agreement: Share of images whose first class is the same as without whitening, None without a classifier.
        skipped: Images that could not be read, and why.
    """
    fit: WhiteningFit
    protocol: Protocol
    p: float | list[float] | None
    agreement: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What the whitening belongs to, for JSON."""
        return {**self.fit.to_dict(), 'p': json_p(self.p), 'protocol': self.protocol.to_dict()}

    def __str__(self) -> str:
        p = f', p = {self.p:g}' if isinstance(self.p, float) else ''
        lines = [str(self.fit), f'Fitted for {self.protocol}{p}: another size or p needs another whitening.']
        if self.agreement is not None:
            lines.append(f'First class the same as before for {100 * self.agreement:.2f} % of the images.')
        if self.skipped:
            lines.append(f'{len(self.skipped)} images could not be read, such as {next(iter(self.skipped.values()))}')
        return '\n'.join(lines)


def whiten_model(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        components: int | None = None,
        shrinkage: float | str | None = None,
        groups: Sequence[int] | None = None,
        work_dir: str | os.PathLike | None = None,
        strict: bool = False,
        **extraction: Any,
) -> WhitenedModel:
    """Fit a whitening on images and fold it into a model, in place.

    Args:
        model: Model without whitening.
        source: Images, of the kind that will be searched, but not the test images. 20,000 in the paper; at least C + 2
            for a whitening of C channels and the constant one.
        protocol: How they are prepared, as the searched images will be; single scale, no flip.
        components: As of `fit_whitening`.
        shrinkage: As of `fit_whitening`.
        groups: Learn the whitening from matching images instead: the group of each image, -1 for none. All embeddings
            are in memory then.
        work_dir: Folder that keeps the embeddings, so that a run that was cut off goes on.
        strict: Stop at the first image that cannot be read instead of leaving it out.
        **extraction: As of `embed_images`: batch_size, workers, device, dtype, progress.

    Raises:
        ValueError: The model is whitened already, several views of an image, or too few images.
    """
    if model.whitened:
        raise ValueError('The model is whitened already: whiten the one without whitening.')
    if protocol.scales != (1.,) or protocol.flip:
        raise ValueError(f'{protocol}: the whitening is inside the network, which sees one view at a time; fit it at '
                         'one scale without flip, and use several views afterwards.')
    with _folder(work_dir) as folder:
        extracted = extract_shards(model, source, protocol, folder, strict=strict, descriptor=False, **extraction)
        if groups is None:
            fit = fit_whitening((vectors for _, vectors in iter_shards(folder)), components, shrinkage)
        else:
            fit = _learn(Descriptors.load(folder), dict(zip(source.names, groups, strict=True)), components, shrinkage)
        sample = next(iter_shards(folder))[1][:CHECKED].to(next(model.parameters()).device)
    before = _first_classes(model, sample)
    fold_whitening(model, fit)
    agreement = None
    if before is not None:
        agreement = float((before == _first_classes(model, sample)).float().mean())
    result = WhitenedModel(fit, protocol, model.gem_p, agreement, extracted.skipped)
    note_fitted(model, 'whitening', result.settings())
    return result


def save_fitted(model: MultiGrain, directory: str | os.PathLike, protocol: Protocol) -> Path:
    """Save a model that was fitted for a protocol, see `save_pretrained`; its size becomes the model's test size."""
    side = (model.in_chans, protocol.size, protocol.size)
    return save_pretrained(model, directory, data_config={'test_input_size': side})


def _learn(described: Descriptors, group: dict[str, int], components: int | None, shrinkage) -> WhiteningFit:
    pairs = matching_pairs([group[name] for name in described.names])
    return fit_learned_whitening(described.vectors, pairs, components, shrinkage)


@torch.no_grad()
def _first_classes(model: MultiGrain, pooled: torch.Tensor) -> torch.Tensor | None:
    if not model.num_classes:
        return None
    training = model.training
    out = model.eval().head.classify(model.head.whitening(pooled)).argmax(1)
    model.train(training)
    return out


@contextmanager
def _folder(work_dir: str | os.PathLike | None):
    if work_dir is not None:
        yield Path(work_dir)
        return
    with tempfile.TemporaryDirectory(prefix='timm-multigrain-') as folder:
        yield Path(folder) / 'embeddings'
