"""Whitening of the pooled embedding: fitted on images, and folded into the network with its classifier.

Berman et al., arXiv 1902.05509, section 3.5: L2, PCA whitening (Jégou and Chum, "Negative evidences and co-occurences
in image retrieval", ECCV 2012), L2. The pooled embedding e gets a constant channel, z = [e; 1] / |[e; 1]|, and
y = (z - mean) proj. The classifier W e + b becomes [W | b] (mean + proj^-T y): its logits are divided by |[e; 1]|, so
the order of the classes stays and the confidence does not.

A whitening belongs to one size, one exponent p and one protocol: fit it on images as the searched ones are made. Any
unlabelled images of that kind will do, but not the test images; the paper takes 20,000. At least C + 2 are needed for
the covariance to be invertible, a few times that for it to be good.
"""
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from timm_multigrain.layers import l2_normalize
from timm_multigrain.models.multigrain import MultiGrain

from .pca import ROWS, StreamingPCA, oas_shrinkage

__all__ = [
    'WhiteningFit', 'accumulate', 'check_components', 'check_shrinkage', 'fit_whitening', 'fold_whitening',
    'with_constant']

CONSTANT = 1e-10  # of the largest variance: below it, directions hold the rounding of float32 embeddings


@dataclass(frozen=True, eq=False)
class WhiteningFit:
    """A fitted whitening of C channels and the constant one.

    Attributes:
        mean: (C + 1,) float64.
        proj: (C + 1, k) float64, a column a component, strongest first.
        eigenvalues: (k,) float64, variances along the components before whitening; of a learned whitening, ratios of
            all variance to that between matching images.
        num_images: Images it was fitted on.
        num_constant: Directions without variance, scaled as the strongest one.
        shrinkage: Share of the identity in the covariance.
        kind: 'pca' or 'learned'.
    """
    mean: torch.Tensor = field(repr=False)
    proj: torch.Tensor = field(repr=False)
    eigenvalues: torch.Tensor = field(repr=False)
    num_images: int
    num_constant: int = 0
    shrinkage: float = 0.
    kind: str = 'pca'

    @property
    def components(self) -> int:
        """Size k of the whitened embedding."""
        return self.proj.shape[1]

    def to_dict(self) -> dict:
        """What it is, without the matrices, for JSON."""
        return {'kind': self.kind, 'components': self.components, 'images': self.num_images,
                'shrinkage': self.shrinkage, 'constant': self.num_constant}

    def __str__(self) -> str:
        notes = [f'shrinkage {self.shrinkage:.3g}'] * bool(self.shrinkage)
        notes += [f'{self.num_constant} directions constant'] * bool(self.num_constant)
        return (f'{"PCA" if self.kind == "pca" else "Learned"} whitening, {self.components} of {len(self.mean)} '
                f'components, {self.num_images} images' + (f' ({", ".join(notes)})' if notes else ''))


def with_constant(embeddings: torch.Tensor) -> torch.Tensor:
    """(n, C) pooled embeddings e to (n, C + 1) float64 z = [e; 1] / |[e; 1]|, as the network computes them."""
    return l2_normalize(F.pad(embeddings.cpu().double(), (0, 1), value=1.))


def fit_whitening(
        embeddings: torch.Tensor | Iterable[torch.Tensor],
        components: int | None = None,
        shrinkage: float | str | None = None,
) -> WhiteningFit:
    """Fit PCA whitening, in memory independent of the number of images.

    Args:
        embeddings: Pooled embeddings, not normalised: (n, C), or batches of them.
        components: Number k of components kept, strongest first; C + 1 by default. With fewer, the classifier that is
            folded in sees the embedding without the others, and its logits become approximate.
        shrinkage: Share s in [0, 1] of (1 - s) covariance + s (mean variance) identity, or 'oas' to estimate it (Chen
            et al. 2010). None: 0 with C + 2 images or more, as the original; 'oas', with a warning, with fewer.

    Raises:
        ValueError: No images, images that are all alike, too few for a shrinkage of 0, or impossible arguments.
    """
    check_shrinkage(shrinkage)
    pca = accumulate(embeddings)
    components = check_components(components, pca.dim)
    if pca.count < 2:
        raise ValueError(f'{pca.count} image cannot tell what varies: whitening needs many, {pca.dim + 1} or more.')
    shrinkage = _choose_shrinkage(shrinkage, pca.count, pca.dim, components)
    values, proj = pca.eigh()
    if not values[0] > 1e-20:  # |z| is 1
        raise ValueError(f'The {pca.count} images all have the same embedding: there is nothing to whiten.')
    if shrinkage == 'oas':
        shrinkage = oas_shrinkage(values, pca.count)
    if shrinkage:
        values = (1 - shrinkage) * values + shrinkage * values.mean()
    constant = values <= CONSTANT * values[0]
    # What never varied tells images apart no better for being enlarged; invertible it has to stay.
    scale = torch.where(constant, values[0], values).sqrt()
    proj /= scale
    return WhiteningFit(
        pca.mean, proj[:, :components], values[:components], pca.count, int(constant[:components].sum()),
        float(shrinkage))


def _choose_shrinkage(shrinkage: float | str | None, count: int, dim: int, components: int) -> float | str:
    enough = count > dim  # the covariance of n images has rank n - 1
    if shrinkage is None:
        if not enough:
            warnings.warn(f'{count} images are fewer than the {dim + 1} that a whitening of {dim} channels needs: its '
                          'covariance is shrunk towards the identity. Give more images.', stacklevel=3)
        return 0. if enough else 'oas'
    if shrinkage == 0 and components > count - 1:
        raise ValueError(
            f'{count} images have {count - 1} components, and {components} are asked for: give at least '
            f'{components + 1} images, components={count - 1}, or leave shrinkage out.')
    return shrinkage


def accumulate(embeddings: torch.Tensor | Iterable[torch.Tensor]) -> StreamingPCA:
    """Mean and covariance of z over all embeddings."""
    pca = None
    for batch in [embeddings] if isinstance(embeddings, torch.Tensor) else embeddings:
        if batch.ndim != 2:
            raise ValueError(f'A batch of embeddings has the shape {tuple(batch.shape)}: give (n, C).')
        pca = pca or StreamingPCA(batch.shape[1] + 1)
        for rows in batch.split(ROWS):
            pca.update(with_constant(rows))
    if pca is None or not pca.count:
        raise ValueError('There are no images to fit a whitening on.')
    return pca


def check_components(components: int | None, dim: int) -> int:
    """The number of components, all by default, if it is possible."""
    if components is None:
        return dim
    if not 1 <= components <= dim:
        raise ValueError(f'components={components}: an embedding of {dim - 1} channels and the constant one has '
                         f'1 to {dim}.')
    return components


def check_shrinkage(shrinkage: float | str | None) -> None:
    number = isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1
    if shrinkage is not None and shrinkage != 'oas' and not number:
        raise ValueError(f"shrinkage={shrinkage!r}: give a share from 0 to 1, or 'oas'.")


@torch.no_grad()
def fold_whitening(model: MultiGrain, fit: WhiteningFit) -> None:
    """Give a model the whitening, in place, and fold its inverse into the classifier.

    The logits are those of before divided by |[e; 1]|, image by image; with fewer than C + 1 components they are those
    of the embedding projected onto the ones that are kept. The arithmetic is float64, what is stored has the model's
    dtype.

    Raises:
        ValueError: The model is whitened already, has no pooling, or has another number of channels.
    """
    if model.whitened:
        raise ValueError('The model is whitened already: fit a whitening to the model without one.')
    if not model.head.pooled or model.num_features + 1 != len(fit.mean):
        raise ValueError(f'A whitening of {len(fit.mean) - 1} channels does not fit a model of {model.num_features} '
                         f'with global_pool={model.global_pool!r}.')
    head, old = model.head, model.head.fc
    training = model.training
    model.set_whitening(fit.components)
    stored = head.whitening.mean.dtype  # made on the CPU: not every device has float64
    head.whitening.mean.copy_(fit.mean.to(stored))
    head.whitening.proj.copy_(fit.proj.to(stored))
    if model.num_classes:
        bias = torch.zeros(model.num_classes) if old.bias is None else old.bias
        classifier = torch.cat([old.weight, bias[:, None].to(old.weight)], dim=1).cpu().double()
        # what is inverted is what was stored, so that the rounding cancels
        mean, proj = (t.cpu().double() for t in (head.whitening.mean, head.whitening.proj))
        head.fc.weight.copy_(_times_inverse(classifier, proj).to(head.fc.weight.dtype))
        head.fc.bias.copy_((classifier @ mean).to(head.fc.bias.dtype))
        head.fc.requires_grad_(old.weight.requires_grad)
    model.train(training)


def _times_inverse(classifier: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    """classifier times the (pseudo-)inverse of proj^T: (K, C + 1), (C + 1, k) to (K, k)."""
    if proj.shape[0] == proj.shape[1]:
        return torch.linalg.solve(proj, classifier.T).T
    return torch.linalg.solve(proj.T @ proj, proj.T @ classifier.T).T
