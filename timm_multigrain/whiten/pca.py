"""Principal components of any number of vectors, in float64 and in memory that does not grow with their number.

Blocks of rows are centred by their own mean and added up by the pairwise formula of Chan, Golub, LeVeque ("Updating
formulae and a pairwise algorithm for computing sample variances", 1979), which does not cancel however far the data are
from the origin. The scatter matrix is symmetric, so only the blocks on and above its diagonal are computed.
"""
import torch

__all__ = ['StreamingPCA', 'oas_shrinkage']

ROWS = 1024  # vectors a block
COLUMNS = 256  # width of a block of the scatter matrix


class StreamingPCA:
    """Mean and covariance of vectors that come in batches.

    The result does not depend on how the vectors are cut into batches.

    Args:
        dim: Size of the vectors.
        centered: Whether scatter is about the mean; otherwise about the origin, as for differences of pairs.
    """

    def __init__(self, dim: int, centered: bool = True):
        if dim < 1:
            raise ValueError(f'dim={dim}: vectors have at least one component.')
        self.dim = dim
        self.centered = centered
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # valid on and above its blocks on the diagonal
        self._rows = torch.empty(ROWS, dim, dtype=torch.float64)
        self._waiting = 0

    def update(self, vectors: torch.Tensor) -> 'StreamingPCA':
        """Add (n, dim) vectors of any floating dtype and device.

        Raises:
            ValueError: Another shape, or a value that is not finite.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f'vectors have the shape {tuple(vectors.shape)}: give (n, {self.dim}).')
        start = 0
        while start < len(vectors):
            rows = vectors[start:start + ROWS - self._waiting]
            if not torch.isfinite(rows).all():
                bad = start + int((~torch.isfinite(rows).all(1)).nonzero()[0])
                raise ValueError(f'Vector {bad} of the batch holds NaN or infinity.')
            self._rows[self._waiting:self._waiting + len(rows)].copy_(rows.cpu())
            self._waiting += len(rows)
            start += len(rows)
            if self._waiting == ROWS:
                self._flush()
        return self

    def merge(self, other: 'StreamingPCA') -> 'StreamingPCA':
        """Add what another one has seen.

        Raises:
            ValueError: It is of another size or kind.
        """
        if (other.dim, other.centered) != (self.dim, self.centered):
            raise ValueError(f'A PCA of {other.dim} components cannot be merged into one of {self.dim}, nor one about '
                             'the mean into one about the origin.')
        other._flush()
        self._flush()
        if other._count:
            self._add(other._count, other._mean, other._scatter)
        return self

    @property
    def count(self) -> int:
        """Vectors seen."""
        return self._count + self._waiting

    @property
    def mean(self) -> torch.Tensor:
        """(dim,) float64; zero when not centred."""
        self._flush()
        return self._mean.clone()

    def covariance(self) -> torch.Tensor:
        """(dim, dim) float64; divisor n - 1, or n about the origin.

        Raises:
            ValueError: There are too few vectors to say anything.
        """
        freedom = self._freedom()
        return self._whole_scatter() / freedom

    def eigh(self, shrinkage: float = 0.) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (dim,), largest first, and eigenvectors (dim, dim), a column each, of the covariance.

        Args:
            shrinkage: Share s of (1 - s) covariance + s (mean variance) identity.

        Raises:
            ValueError: As `covariance`.
        """
        freedom = self._freedom()
        scatter = self._whole_scatter()  # divided after, which saves a copy of it
        values, vectors = torch.linalg.eigh(scatter)
        values = values.flip(0).clamp_(min=0).div_(freedom)
        if shrinkage:  # it moves the eigenvalues only
            values = (1 - shrinkage) * values + shrinkage * scatter.diagonal().mean() / freedom
        return values, vectors.flip(1)

    def _freedom(self) -> int:
        """Divisor of the covariance."""
        freedom = self.count - self.centered
        if freedom < 1:
            raise ValueError(f'{self.count} vectors have no covariance: give at least {1 + self.centered}.')
        return freedom

    def _whole_scatter(self) -> torch.Tensor:
        """The scatter matrix, below its diagonal too."""
        self._flush()
        for i in range(0, self.dim, COLUMNS):
            j = i + COLUMNS
            block = self._scatter[i:j, i:j]
            block.copy_(block.triu() + block.triu(1).T)
            self._scatter[j:, i:j] = self._scatter[i:j, j:].T
        return self._scatter

    def _flush(self) -> None:
        rows = self._rows[:self._waiting]
        self._waiting = 0
        if not len(rows):
            return
        mean = rows.mean(0) if self.centered else torch.zeros(self.dim, dtype=torch.float64)
        if self.centered:
            rows -= mean
        self._add(len(rows), mean, None)
        for i in range(0, self.dim, COLUMNS):
            self._scatter[i:i + COLUMNS, i:].addmm_(rows[:, i:i + COLUMNS].T, rows[:, i:])

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor | None) -> None:
        total = self._count + count
        if scatter is not None:
            self._scatter += scatter
        if self.centered:
            step = mean - self._mean
            if self._count:
                self._scatter.addr_(step, step, alpha=self._count * count / total)
            self._mean += step * (count / total)
        self._count = total


def oas_shrinkage(eigenvalues: torch.Tensor, count: int) -> float:
    """Shrinkage towards the identity that approximates the one of least error, for ``count`` normal vectors.

    Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE Trans. Signal Processing 58,
    2010, eq. 23. It needs no more than the eigenvalues of the covariance.

    Args:
        eigenvalues: Of the covariance, (dim,).
        count: Number of vectors.
    """
    dim = len(eigenvalues)
    square, trace = float(eigenvalues.square().sum()), float(eigenvalues.sum())
    spread = (count + 1 - 2 / dim) * (square - trace * trace / dim)
    return 1. if spread <= 0 else min(1., ((1 - 2 / dim) * square + trace * trace) / spread)
