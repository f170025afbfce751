"""Whitening of the pooled embedding: fitted on images, and folded into the network with its classifier.

Berman et al., arXiv 1902.05509, section 3.5: L2, PCA whitening (Jégou and Chum, "Negative evidences and co-occurences
in image retrieval", ECCV 2012), L2. The pooled embedding e gets a constant channel, z = [e; 1] / |[e; 1]|, and
y = (z - mean) proj. The classifier W e + b becomes [W | b] (mean + proj^-T y): its logits are divided by |[e; 1]|, so
the order of the classes stays and the confidence does not.

A whitening belongs to one size, one exponent p and one protocol: fit it on images as the searched ones are made. Any
unlabelled images of that kind will do, but not the test images; the paper takes 20,000. At least C + 2 are needed for
the covariance to be invertible, a few times that for it to be good.

Learned whitening takes matching images: Mikolajczyk and Matas, "Improving descriptors for fast tree matching by optimal
linear projection", ICCV 2007, as Radenović et al., arXiv 1711.02512, section 3.4, apply it to descriptors of images.
What differs between matching images is whitened, C_S^-1/2, then what varies over all images is sorted, strongest first.
"""
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.embed.shards import Descriptors, iter_shards, skipped_lines
from timm_multigrain.files import json_p
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.layers import l2_normalize
from timm_multigrain.models.multigrain import MultiGrain
from timm_multigrain.models.save import note_fitted, save_pretrained

from .pca import ROWS, StreamingPCA, oas_shrinkage

_KINDS = {'pca': 'PCA whitening', 'learned': 'Learned whitening', 'adapted': 'Linear adaptation'}
CONSTANT = 1e-10  # of the largest variance: below it, directions hold the rounding of float32 embeddings
NOTHING = 1e-20  # of |z| = 1
SAME = 0.95  # share of images below which a whitened classifier is not what it was
CHECKED = 4096  # images that classification before and after is compared on
PAIRS = 1000  # of a group of matching images


@dataclass(frozen=True, eq=False)
class WhiteningFit:
    """A fitted whitening of C channels and the constant one.

    Attributes:
        mean: (C + 1,) float64.
        proj: (C + 1, k) float64, a column per component, strongest first.
        eigenvalues: (k,) float64, variances along the components before whitening; of a learned whitening, ratios of
            all variance to that between matching images.
        num_constant: Directions without variance, scaled as the strongest one.
        shrinkage: Share of the identity in the covariance.
        kind: 'pca', 'learned', or 'adapted' (`fit_adaptation`, which whitens nothing).
    """
    mean: torch.Tensor = field(repr=False)
    proj: torch.Tensor = field(repr=False)
    eigenvalues: torch.Tensor = field(repr=False)
    num_images: int
    num_constant: int = 0
    shrinkage: float = 0.
    kind: str = 'pca'

    @property
    def dim(self) -> int:
        """Size k of the whitened embedding."""
        return self.proj.shape[1]

    def __str__(self) -> str:
        notes = [f'shrinkage {self.shrinkage:.3g}'] * bool(self.shrinkage)
        notes += [f'{self.num_constant} directions constant'] * bool(self.num_constant)
        return (f'{_KINDS[self.kind]}, {self.dim} of {len(self.mean)} '
                f'components, {self.num_images} images' + (f' ({", ".join(notes)})' if notes else ''))


def fit_whitening(
        embeddings: torch.Tensor | Iterable[torch.Tensor],
        dim: int | None = None,
        shrinkage: float | str | None = None,
        pairs: np.ndarray | Sequence[tuple[int, int]] | None = None,
) -> WhiteningFit:
    """Fit PCA whitening, in memory independent of the number of images, or a learned one.

    Args:
        embeddings: Pooled embeddings, not normalised: (n, C), or batches of them.
        dim: Number k of components kept, strongest first; C + 1 by default. With fewer the logits become approximate.
        shrinkage: Share s in [0, 1] of (1 - s) covariance + s (mean variance) identity, or 'oas' to estimate it (Chen
            et al. 2010). None: 0 with C + 2 images (or pairs) or more, as the original; 'oas' with fewer.
        pairs: (m, 2) numbers of matching images to learn from, see `matching_pairs`; the embeddings are (n, C) then.

    Raises:
        ValueError: No images, images that are all alike, too few for a shrinkage of 0, or impossible arguments.

    Example:
        >>> model = timm.create_model('multigrain_resnet18', num_classes=10)
        >>> fit = fit_whitening(torch.rand(600, 512))  # of 600 images; the model's embedding has 512 channels
        >>> fold_whitening(model, fit)
        >>> model.whitened
        True
    """
    pca = _accumulate(embeddings)
    if dim is not None and not 1 <= dim <= pca.dim:
        raise ValueError(f'dim={dim}: an embedding of {pca.dim - 1} channels and the constant one has 1 to {pca.dim}.')
    if not (shrinkage in (None, 'oas') or (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1)):
        raise ValueError(f"shrinkage={shrinkage!r}: give a share from 0 to 1, or 'oas'.")
    if pairs is None:  # the covariance of n images has rank n - 1
        count, asked = pca.count, dim or pca.dim
        if count < 2:
            raise ValueError(f'{count} image is not enough: whitening needs at least {pca.dim + 1}.')
        if shrinkage is None and count <= pca.dim:
            warnings.warn(f'{count} images are fewer than the {pca.dim + 1} that a whitening of {pca.dim} channels '
                          'needs: its covariance is shrunk towards the identity. Give more images.', stacklevel=2)
        if shrinkage == 0 and asked > count - 1:
            raise ValueError(f'{count} images have {count - 1} components, and {asked} are asked for: give at least '
                             f'{asked + 1} images, dim={count - 1}, or leave shrinkage out.')
    within = pca if pairs is None else _differences(embeddings, pairs)
    values, vectors = within.eigh()
    if not values[0] > NOTHING:
        what = 'images all have the same embedding' if pairs is None else 'matching pairs are of identical images'
        raise ValueError(f'The {within.count} {what}: nothing to whiten.')
    if shrinkage is None:
        shrinkage = 'oas' if within.count <= pca.dim else 0.
    if shrinkage == 'oas':
        shrinkage = oas_shrinkage(values, within.count)
    values = (1 - shrinkage) * values + shrinkage * values.mean()
    constant = values <= CONSTANT * values[0]
    # Scaling constant directions up would only add noise; the whitening has to stay invertible.
    vectors = vectors / torch.where(constant, values[0], values).sqrt()
    if pairs is not None:
        values, turn = torch.linalg.eigh(vectors.T @ pca.covariance() @ vectors)
        values, vectors = values.flip(0).clamp(min=0), vectors @ turn.flip(1)
    return WhiteningFit(
        pca.mean, vectors[:, :dim], values[:dim], pca.count, int(constant[:dim].sum()), float(shrinkage),
        'pca' if pairs is None else 'learned')


def _accumulate(embeddings: torch.Tensor | Iterable[torch.Tensor]) -> StreamingPCA:
    """Mean and covariance of z over all embeddings."""
    pca = None
    for batch in [embeddings] if isinstance(embeddings, torch.Tensor) else embeddings:
        pca = pca or StreamingPCA(batch.shape[1] + 1)
        for rows in batch.split(ROWS):
            pca.update(with_constant(rows))
    if pca is None or not pca.count:
        raise ValueError('No images to fit a whitening on.')
    return pca


def _differences(embeddings: torch.Tensor, pairs: np.ndarray | Sequence[tuple[int, int]]) -> StreamingPCA:
    """Scatter of the differences of matching images."""
    pairs = torch.as_tensor(np.asarray(pairs))
    if pairs.min() < 0 or pairs.max() >= len(embeddings):
        raise ValueError(f'pairs name images {int(pairs.min())} to {int(pairs.max())} of {len(embeddings)}.')
    within = StreamingPCA(embeddings.shape[1] + 1, centered=False)
    for some in pairs.split(ROWS):
        within.update(with_constant(embeddings[some[:, 0]]) - with_constant(embeddings[some[:, 1]]))
    return within


def matching_pairs(groups: Sequence[int], seed: int = 0) -> np.ndarray:
    """Pairs of images of the same group, (m, 2) int64; of a large group 1000 are drawn.

    Args:
        groups: Group of each image; images of negative groups match none.
        seed: Of the draw.
    """
    groups, rng = np.asarray(groups), np.random.default_rng(seed)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for group in np.unique(groups[groups >= 0]):
        members = np.flatnonzero(groups == group)
        size = len(members)
        if size * (size - 1) // 2 <= PAIRS:
            first, second = np.triu_indices(size, 1)
        else:
            first = rng.integers(0, size, PAIRS)
            second = (first + rng.integers(1, size, PAIRS)) % size
        pairs.append(np.stack([members[first], members[second]], 1))
    pairs = np.concatenate(pairs)
    if not len(pairs):
        raise ValueError(f'No two of {len(groups)} images are of one group: learned whitening needs matching images.')
    return pairs


def with_constant(embeddings: torch.Tensor) -> torch.Tensor:
    """(n, C) pooled embeddings e to (n, C + 1) float64 z = [e; 1] / |[e; 1]|, as the network computes them."""
    return l2_normalize(F.pad(embeddings.cpu().double(), (0, 1), value=1.))


@torch.no_grad()
def fold_whitening(model: MultiGrain, fit: WhiteningFit) -> None:
    """Give a model the whitening, in place, and fold its inverse into the classifier; in float64.

    With fewer than C + 1 components the logits are those of the embedding projected onto the ones that are kept.
    """
    if model.whitened:
        raise ValueError('The model is whitened already: fit a whitening to the model without one.')
    if not model.head.pooled or model.head.channels + 1 != len(fit.mean):
        raise ValueError(f'A whitening of {len(fit.mean) - 1} channels does not fit a model of {model.head.channels} '
                         f'with global_pool={model.global_pool!r}.')
    head, old, training = model.head, model.head.fc, model.training
    model.set_whitening(fit.dim)
    stored = head.whitening.mean.dtype  # made on the CPU: not every device has float64
    head.whitening.mean.copy_(fit.mean.to(stored))
    head.whitening.proj.copy_(fit.proj.to(stored))
    if model.num_classes:
        bias = torch.zeros(model.num_classes) if old.bias is None else old.bias
        classifier = torch.cat([old.weight, bias[:, None].to(old.weight)], dim=1).cpu().double()
        # what is inverted is what was stored, so that the rounding cancels
        mean, proj = (t.cpu().double() for t in (head.whitening.mean, head.whitening.proj))
        if proj.shape[0] == proj.shape[1]:
            weight = torch.linalg.solve(proj, classifier.T).T
        else:  # the pseudo-inverse
            weight = torch.linalg.solve(proj.T @ proj, proj.T @ classifier.T).T
        head.fc.weight.copy_(weight.to(head.fc.weight.dtype))
        head.fc.bias.copy_((classifier @ mean).to(head.fc.bias.dtype))
        head.fc.requires_grad_(old.weight.requires_grad)
    model.train(training)


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

    def to_dict(self) -> dict[str, Any]:
        """What the whitening is, without its matrices, and what it belongs to, for JSON."""
        fit = self.fit
        return {'kind': fit.kind, 'dim': fit.dim, 'images': fit.num_images, 'shrinkage': fit.shrinkage,
                'constant': fit.num_constant, 'p': json_p(self.p), 'protocol': self.protocol.to_dict()}

    def __str__(self) -> str:
        p = f', p = {self.p:g}' if isinstance(self.p, float) else ''
        lines = [str(self.fit), f'Fitted for {self.protocol}{p}: another size or p needs another whitening.']
        if self.agreement is not None:
            lost = '; classify with the model as it was, the components left out are missed' * (self.agreement < SAME)
            lines.append(f'First class the same as before for {100 * self.agreement:.2f} % of the images{lost}.')
        return '\n'.join(lines + skipped_lines(self.skipped))


def whiten_model(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        *,
        dim: int | None = None,
        shrinkage: float | str | None = None,
        groups: Sequence[int] | None = None,
        work_dir: str | os.PathLike | None = None,
        strict: bool = False,
        **extraction: Any,
) -> WhitenedModel:
    """Fit a whitening on images and fold it into a model, in place.

    Args:
        model: Model without whitening.
        source: Images of the kind that will be searched, not the test images; at least C + 2 for C channels.
        protocol: How they are prepared, as the searched images will be; single scale, no flip.
        dim, shrinkage: As of `fit_whitening`.
        groups: Learn the whitening from matching images instead: the group of each image, -1 for none. All embeddings
            are in memory then.
        work_dir: Folder that keeps the embeddings, so that a run that was cut off goes on.
        **extraction: As of `extract`: batch_size, workers, device, dtype, progress.

    """
    def fit(folder: Path, described: Descriptors) -> WhiteningFit:
        if groups is None:
            return fit_whitening((vectors for _, vectors in iter_shards(folder)), dim, shrinkage)
        return fit_whitening(described.vectors, dim, shrinkage, matching_pairs(groups_of(described, source, groups)))

    return fit_model(model, source, protocol, fit, work_dir, strict, **extraction)


def groups_of(described: Descriptors, source: ImageSource, groups: Sequence[int]) -> np.ndarray:
    """Groups of the images that were described, which are those of the source that could be read."""
    group = dict(zip(source.names, groups, strict=True))
    return np.array([group[name] for name in described.names])


def fit_model(
        model: MultiGrain,
        source: ImageSource,
        protocol: Protocol,
        fit: Callable[[Path, Descriptors], WhiteningFit],
        work_dir: str | os.PathLike | None,
        strict: bool,
        **extraction: Any,
) -> WhitenedModel:
    """Fold what is fitted on the embeddings of images, in a folder, into a model; see `whiten_model`."""
    if model.whitened:
        raise ValueError('The model is whitened already: whiten the one without whitening.')
    if protocol.scales != (1.,) or protocol.flip:
        raise ValueError(f'{protocol}: the whitening is inside the network, which sees one view at a time; fit it at '
                         'one scale without flip, and use several views afterwards.')
    with work_folder(work_dir) as folder:
        described = extract(model, source, protocol, folder, strict=strict, descriptor=False, **extraction)
        fitted = fit(folder, described)
        sample = next(iter_shards(folder))[1][:CHECKED].to(next(model.parameters()).device)
    before = _first_classes(model, sample)
    fold_whitening(model, fitted)
    agreement = None if before is None else float((before == _first_classes(model, sample)).float().mean())
    result = WhitenedModel(fitted, protocol, model.gem_p, agreement, described.skipped)
    note_fitted(model, 'whitening', result.to_dict())
    return result


@torch.no_grad()
def _first_classes(model: MultiGrain, pooled: torch.Tensor) -> torch.Tensor | None:
    if not model.num_classes:
        return None
    training = model.training
    out = model.eval().head.classify(model.head.whitening(pooled)).argmax(1)
    model.train(training)
    return out


def save_fitted(model: MultiGrain, directory: str | os.PathLike, protocol: Protocol) -> Path:
    """Save a model that was fitted for a protocol, see `save_pretrained`; its size becomes the model's test size."""
    side = (model.in_chans, protocol.size, protocol.size)
    return save_pretrained(model, directory, data_config={'test_input_size': side})


@contextmanager
def work_folder(work_dir: str | os.PathLike | None) -> Iterator[Path]:
    """The folder, or a temporary one."""
    if work_dir is not None:
        yield Path(work_dir)
        return
    with tempfile.TemporaryDirectory(prefix='timm-multigrain-') as folder:
        yield Path(folder) / 'embeddings'
