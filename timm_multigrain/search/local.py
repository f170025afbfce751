"""Whether two pictures show the same thing, by their details: local descriptors, and a transform that many obey.

In the manner of `Unifying deep local and global features for image search` (DELG), Cao et al. 2020, arXiv 2001.05027:
vectors of a map of stride 16 at several scales of the picture, those of the largest norm kept, reduced to 128
dimensions; mutual nearest neighbours of two pictures, and RANSAC. Nothing is trained for it: the norm stands in for the
learned attention, PCA for the autoencoder. Why an affine transform and not a homography, and what it gains:
benchmarks/README.md.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from timm_multigrain.embed.embedder import Decoded, Embedder
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.extras import extra
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.layers import l2_normalize
from timm_multigrain.whiten.pca import StreamingPCA

from .exact import Scores, nearest_of
from .rerank import replaced

VERIFIED = 100  # images of the first ranking that are verified
STRIDE = 16  # pixels, at most; where the trunk starts at more, what it has
SCALES = (1., 0.7071, 0.5)  # of twice the size of the protocol
NUMBER, DIM = 500, 128  # descriptors of a picture, and their size
SAMPLE = 20  # pictures that the PCA is fitted on
TOLERANCE = 0.03  # how far from its place a detail may be, in the longer side of the second picture
ENOUGH = 50  # matches that make it certain
LINES = 40  # matches that are drawn


class LocalFeatures(NamedTuple):
    """Details of a picture; empty of one that cannot be read.

    Attributes:
        vectors: (n, d) int8, to be compared by inner product.
        points: (n, 2) float32, x and y in pixels of the picture as read.
        size: (width, height) of the picture.
    """
    vectors: np.ndarray
    points: np.ndarray
    size: tuple[int, int]

    def to_bytes(self) -> bytes:
        """Points and vectors, to be kept: 8 + d bytes each."""
        return self.points.astype('<f4').tobytes() + self.vectors.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, dim: int, size: tuple[int, int]) -> 'LocalFeatures':
        """What `to_bytes` gave, of vectors of so many dimensions; ValueError for anything else."""
        number = min(len(data) // (8 + dim), NUMBER)
        points = np.frombuffer(data, '<f4', 2 * number).reshape(number, 2)
        vectors = np.frombuffer(data, np.int8, offset=8 * number).reshape(number, dim)
        if not ((points >= 0) & (points <= size)).all():
            raise ValueError('details outside of their picture')
        return cls(vectors, points, size)


@dataclass(frozen=True)
class Match:
    """Details that two pictures share, (n, 2) float32 points in either, n being its length; and the (2, 3) float64
    matrix that maps (x, y, 1) in the first to (x, y) in the second, None where nothing was found."""
    first: np.ndarray
    second: np.ndarray
    matrix: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.first)


class LocalDescriber:
    """Makes `LocalFeatures`, which are comparable if the same one has made them.

    Args:
        model: A MultiGrain whose trunk has timm's ``forward_intermediates``.
        protocol: Its size, normalisation and orientation are followed; pictures are seen whole, at this size, at 1.4
            times and at twice that.
        workers: As of `Embedder`, as is `device`.

    Raises:
        ValueError: The trunk does not give its maps.

    Example:
        >>> describer = LocalDescriber(model, Protocol.for_model(model))
        >>> first, second = describer.fit(images).describe(images, [0, 1])
        >>> match_images(first, second)
    """

    def __init__(self, model: torch.nn.Module, protocol: Protocol, *, workers: int | None = None,
                 device: str | torch.device | None = None, progress: bool = True):
        strides = [info['reduction'] for info in model.feature_info if 'reduction' in info]
        if not strides or not hasattr(model.trunk, 'forward_intermediates'):
            raise ValueError(f'Local descriptors need the maps inside the trunk, and timm gives none of '
                             f'{model.trunk_name!r}: take another trunk.')
        self.stage = max(i for i, stride in enumerate(strides) if stride <= max(STRIDE, min(strides)))
        self.channels = model.feature_info[self.stage]['num_chs']
        scales = (1.,) if model.input_sizes.step is None else SCALES
        self.protocol = replace(protocol, kind='longer-side', size=2 * protocol.size, scales=scales, flip=False)
        self.embedder = Embedder(model, self.protocol, workers=workers, device=device)
        self.progress, self.mean, self.basis = progress, None, None

    def fit(self, source: ImageSource) -> 'LocalDescriber':
        """Fit the PCA on some pictures of the source."""
        pca = None
        for _, found in self._read(source, range(0, len(source), -(-len(source) // SAMPLE)), 'Fitting'):
            if found is not None:
                pca = (pca or StreamingPCA(found[0].shape[1])).update(found[0])
        if pca is None:
            raise ValueError('No picture can be read to fit local descriptors on.')
        self.mean, self.basis = pca.mean.float(), pca.eigh()[1][:, :DIM].float()
        return self

    def to_bytes(self) -> bytes:
        """What was fitted, to be kept."""
        return torch.cat([self.mean[None], self.basis.T]).numpy().astype('<f4').tobytes()

    def restore(self, data: bytes) -> 'LocalDescriber':
        """Take what `to_bytes` of one with the same model gave in place of fitting; ValueError for anything else."""
        rows = torch.from_numpy(np.frombuffer(data, '<f4').reshape(-1, self.channels).astype(np.float32))
        if not 2 <= len(rows) <= 1 + DIM or not rows.isfinite().all():
            raise ValueError('not a PCA of details')
        self.mean, self.basis = rows[0], rows[1:].T
        return self

    def describe(self, source: ImageSource, indices: Sequence[int] | None = None) -> Iterator[LocalFeatures]:
        """Features of these pictures, all of the source by default, in their order."""
        for item, found in self._read(source, range(len(source)) if indices is None else indices, 'Local descriptors'):
            if found is None:
                yield LocalFeatures(np.empty((0, DIM), np.int8), np.empty((0, 2), np.float32), item.size)
                continue
            vectors, points = found
            reduced = l2_normalize((vectors - self.mean) @ self.basis)
            yield LocalFeatures((254 * reduced).round().clamp(-127, 127).to(torch.int8).numpy(),
                                points.numpy() * np.float32(item.size), item.size)

    def _read(self, source: ImageSource, indices: Sequence[int],
              title: str) -> Iterator[tuple[Decoded, tuple[torch.Tensor, torch.Tensor] | None]]:
        stream = self.embedder.decode(source, indices, self.progress, title)
        with self.embedder.evaluating(), closing(stream):
            for item in stream:
                yield item, None if item.pixels is None else self._details(item.pixels)

    @torch.inference_mode()
    def _details(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (n, C), the strongest first, and where they are, (n, 2) in shares of width and height."""
        model, vectors, points = self.embedder.model, [], []
        x = self.protocol.normalize(torch.from_numpy(pixels).to(self.embedder.device))[None]
        for view, in self.protocol.views(x, model.input_sizes):
            found, = model.forward_intermediates(view, [self.stage], intermediates_only=True, stop_early=True)
            height, width = found.shape[-2:]
            down, right = ((torch.arange(n) + 0.5) / n for n in (height, width))
            vectors.append(found[0].flatten(1).T.float().cpu())
            points.append(torch.cartesian_prod(down, right).flip(1))
        vectors, points = torch.cat(vectors), torch.cat(points)
        strongest = vectors.norm(dim=1).argsort(descending=True, stable=True)[:NUMBER]
        return l2_normalize(vectors[strongest]), points[strongest]


class FeaturesOf:
    """Local features of pictures of a source, by number, each computed when it is first asked for and kept."""

    def __init__(self, describer: LocalDescriber, source: ImageSource):
        self.describer, self.source, self._known = describer, source, {}

    def __call__(self, numbers: Sequence[int]) -> list[LocalFeatures]:
        missing = [number for number in dict.fromkeys(numbers) if number not in self._known]
        self._known.update(zip(missing, self.describer.describe(self.source, missing), strict=True))
        return [self._known[number] for number in numbers]


def match_images(first: LocalFeatures, second: LocalFeatures) -> Match:
    """Details, by the same describer, that are each other's nearest and that one affine transform maps onto each other.

    Two pictures of different things agree in some ten details by chance, rarely in 20.
    """
    with extra('local', 'Local verification'):
        import cv2
    nothing = Match(np.empty((0, 2), np.float32), np.empty((0, 2), np.float32))
    if not len(first.vectors) or not len(second.vectors):
        return nothing
    products = first.vectors.astype(np.float32) @ second.vectors.T.astype(np.float32)
    nearest = products.argmax(1)
    rows = np.flatnonzero(products.argmax(0)[nearest] == np.arange(len(nearest)))
    if len(rows) < 3:
        return nothing
    a, b = first.points[rows], second.points[nearest[rows]]
    matrix, inside = cv2.estimateAffine2D(
        a, b, method=cv2.RANSAC, ransacReprojThreshold=TOLERANCE * max(second.size), maxIters=1000)
    if matrix is None:
        return nothing
    inside = inside[:, 0] > 0
    return Match(a[inside], b[inside], matrix)


def verified_score(score: float, match: Match) -> float:
    """A score of the first ranking, and up to 1 more for what the details say."""
    return score + min(len(match), ENOUGH) / ENOUGH


class VerifiedChunks:
    """Scores in chunks, as of `SimilarityChunks` or `RerankedChunks`, those of the first images of each query verified.

    All others come after them. Memory holds the local features of the first images of all queries.

    Args:
        chunks: Scores; read twice.
        queries: Features of each query.
        features_of: Gives the features of the images with some numbers, such as `FeaturesOf`.
        top: Images of each query to verify.
    """

    def __init__(self, chunks: Scores, queries: Sequence[LocalFeatures],
                 features_of: Callable[[list[int]], Iterable[LocalFeatures]], top: int = VERIFIED) -> None:
        self.chunks = chunks
        self.scores, self.indices = nearest_of(chunks, top)
        used = self.indices.unique().tolist()
        features = dict(zip(used, features_of(used), strict=True))
        for query, scores, indices in zip(queries, self.scores, self.indices.tolist(), strict=True):
            for place, number in enumerate(indices):
                scores[place] = verified_score(float(scores[place]), match_images(query, features[number]))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return replaced(self.chunks, self.scores, self.indices)


def draw_matches(first: Image.Image, second: Image.Image, match: Match, side: int = 400) -> Image.Image:
    """The pictures side by side, the longer side of each so many pixels, with lines between what they share."""
    height = max(max(1, round(side * image.height / max(image.size))) for image in (first, second))
    drawn, ends = Image.new('RGB', (2 * side, height), 'white'), []
    for image, points, left in ((first, match.first, 0), (second, match.second, side)):
        scale = side / max(image.size)
        size = [max(1, round(scale * length)) for length in image.size]
        corner = left + (side - size[0]) // 2, (height - size[1]) // 2
        drawn.paste(image.convert('RGB').resize(size), corner)
        ends.append((points * scale).clip(0, size) + np.array(corner))  # a line to nowhere takes seconds
    pen = ImageDraw.Draw(drawn)
    for a, b in zip(*(points[::-(-len(match) // LINES) or 1].tolist() for points in ends), strict=True):
        pen.line((*a, *b), fill='#e0701a')
        for x, y in (a, b):
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill='#e0701a', outline='white')
    return drawn


def check_local(top: int) -> None:
    """ValueError for what is not a number of images to verify, ImportError without OpenCV."""
    if top < 1:
        raise ValueError(f'local={top}: give a number of images to verify, 1 or more.')
    with extra('local', 'Local verification'):
        import cv2  # noqa: F401
