"""Principal components of any number of vectors, in float64 and in memory that does not grow with their number.

Chunks of rows are centred by their own mean and added up by the pairwise formula of Chan, Golub, LeVeque ("Updating
formulae and a pairwise algorithm for computing sample variances", 1979), which does not cancel however far the data are
from the origin.
"""
import torch

ROWS = 1024  # vectors at a time


class StreamingPCA:
    """Mean and covariance of vectors that come in batches.

    Args:
        dim: Size of the vectors.
        centered: Whether scatter is about the mean; otherwise about the origin, as for differences of pairs.

    Attributes:
        count: Vectors seen.
        mean: (dim,) float64; zero when not centred.
    """

    def __init__(self, dim: int, centered: bool = True):
        self.dim, self.centered, self.count = dim, centered, 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, vectors: torch.Tensor) -> 'StreamingPCA':
        """Add (n, dim) vectors of any floating dtype and device."""
        for chunk in vectors.split(ROWS) if len(vectors) else ():
            rows = chunk.cpu().to(torch.float64)  # not every device has float64
            if not torch.isfinite(rows).all():
                raise ValueError('The vectors hold NaN or infinity.')
            total = self.count + len(rows)
            if self.centered:
                mean = rows.mean(0)
                rows, step = rows - mean, mean - self.mean
                self._scatter.addr_(step, step, alpha=self.count * len(rows) / total)
                self.mean += step * (len(rows) / total)
            self._scatter.addmm_(rows.T, rows)
            self.count = total
        return self

    def covariance(self) -> torch.Tensor:
        """(dim, dim) float64; divisor n - 1, or n about the origin."""
        freedom = self.count - self.centered
        return (self._scatter + self._scatter.T).div_(2 * freedom)

    def eigh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (dim,), largest first, and eigenvectors (dim, dim), a column each, of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance())
        return values.flip(0).clamp_(min=0), vectors.flip(1)


def oas_shrinkage(eigenvalues: torch.Tensor, count: int) -> float:
    """Shrinkage towards the identity of least error, about, for the covariance of ``count`` normal vectors.

    Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE Trans. Signal Processing 58,
    2010, eq. 23, from the (dim,) eigenvalues of the covariance.
    """
    dim = len(eigenvalues)
    square, trace = float(eigenvalues.square().sum()), float(eigenvalues.sum())
    spread = (count + 1 - 2 / dim) * (square - trace * trace / dim)
    return 1. if spread <= 0 else min(1., ((1 - 2 / dim) * square + trace * trace) / spread)
