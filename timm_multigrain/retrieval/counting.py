"""How many scores reach given levels, without sorting them.

Scores are put into equal bins between the lowest and the highest level by a subtraction and a multiplication. Rounding
keeps their order, so that a bin without a level is counted as a whole, and only scores that share a bin with a level
are compared with it: the counts are exact. Where a row has few levels, all scores are compared with each.
"""
import numpy as np
import torch

__all__ = ['Array', 'count_reaching', 'to_numpy']

Array = np.ndarray | torch.Tensor

PIECE = 1 << 17  # scores at a time: they stay in the cache
DEVICE_PIECE = 1 << 22
MOST_BINS = 1 << 14
FEW_LEVELS = 16  # of a row: comparing with each is quicker than bins


def count_reaching(scores: Array, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Number of scores of row rows[i] that are at least levels[i].

    Args:
        scores: (Q, n), n above 0, of any real dtype; those of a GPU are counted there.
        levels: (L,) in the dtype of `to_numpy(scores)`, none NaN, ascending within a row.
        rows: (L,) int64, ascending.

    Returns:
        (L,) int64.

    Raises:
        ValueError: If a score is NaN.
    """
    if isinstance(scores, torch.Tensor) and scores.is_cuda:
        return _count_on_device(scores.detach(), levels, rows)
    if isinstance(scores, torch.Tensor) and scores.dtype not in (torch.float16, torch.bfloat16):
        scores = to_numpy(scores)  # a view: only half precision is converted, piece by piece
    num_rows, num = scores.shape
    starts = np.searchsorted(rows, np.arange(num_rows + 1))
    if np.diff(starts).max() <= FEW_LEVELS:
        return _compare(scores, levels, starts)
    counts = np.zeros(len(levels), dtype=np.int64)
    group = max(1, PIECE // num)
    for row in range(0, num_rows, group):
        own = starts[row:row + group + 1]
        part = slice(own[0], own[-1])
        for start in range(0, num, PIECE * 16):
            piece = scores[row:row + group, start:start + PIECE * 16]
            counts[part] += _count(piece, levels[part], rows[part] - row, own - own[0], row)
    return counts


def to_numpy(scores: Array) -> np.ndarray:
    """The scores as an array of a dtype that numpy can compare, on the CPU.

    Raises:
        ValueError: If they are no real numbers.
    """
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu()
        scores = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()
    if scores.dtype == np.float16:
        scores = scores.astype(np.float32)
    if scores.dtype.kind not in 'fiub':
        raise ValueError(f'scores must be real numbers, got {scores.dtype}.')
    return scores


def _compare(scores: Array, levels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    counts = np.zeros(len(levels), dtype=np.int64)
    for row in range(len(scores)):
        for start in range(0, scores.shape[1], PIECE):
            piece = to_numpy(scores[row, start:start + PIECE])
            _refuse_nan(piece[None], row)
            for i in range(starts[row], starts[row + 1]):
                counts[i] += np.count_nonzero(piece >= levels[i])
    return counts


def _count(scores: Array, levels: np.ndarray, rows: np.ndarray, starts: np.ndarray, first_row: int) -> np.ndarray:
    """`count_reaching` of a few rows; the levels of row i are levels[starts[i]:starts[i + 1]]."""
    num_rows, num = scores.shape
    num_bins = min(MOST_BINS, max(64, num // 4))
    bins = _Bins(levels, starts, num_bins)
    level_bins = bins.of(levels, rows) if bins.usable else np.empty(0, dtype=np.int64)
    shared = np.zeros(num_rows * (num_bins + 2), dtype=bool)
    shared[level_bins] = True
    binned, near_below = np.zeros(len(shared), dtype=np.int64), np.zeros(len(levels), dtype=np.int64)
    for start in range(0, num, PIECE):
        piece = to_numpy(scores[:, start:start + PIECE])
        _refuse_nan(piece, first_row)
        near, ends = piece.ravel(), np.arange(num_rows + 1) * piece.shape[1]
        if bins.usable:
            places = bins.of(piece).ravel()
            binned += np.bincount(places, minlength=len(shared))
            sharing = np.flatnonzero(shared.take(places))
            near, ends = near.take(sharing), np.searchsorted(sharing, ends)
        for row in range(num_rows):
            own = slice(starts[row], starts[row + 1])
            near_below[own] += np.searchsorted(np.sort(near[ends[row]:ends[row + 1]]), levels[own])
    if not bins.usable:
        return num - near_below
    binned[level_bins] = 0
    reached = binned.cumsum()
    row_starts = np.arange(num_rows) * (num_bins + 2)
    below = reached[level_bins] - (reached[row_starts] - binned[row_starts])[rows]
    return num - below - near_below


def _refuse_nan(scores: np.ndarray, first_row: int) -> None:
    if np.isnan(scores.max()):
        raise ValueError(f'scores[{first_row + np.flatnonzero(np.isnan(scores).any(1))[0]}] holds NaN.')


class _Bins:
    """Equal bins between the lowest and the highest level of each row, and one more at either end.

    Attributes:
        usable: Whether the levels are floating-point numbers, finite and far enough apart for the arithmetic.
    """

    def __init__(self, levels: np.ndarray, starts: np.ndarray, num_bins: int) -> None:
        self.num_bins = num_bins
        self.usable = levels.dtype in (np.float32, np.float64) and len(levels) > 0
        if not self.usable:
            return
        filled = starts[1:] > starts[:-1]
        with np.errstate(all='ignore'):
            lowest = np.where(filled, levels[np.minimum(starts[:-1], len(levels) - 1)], 0)
            span = np.where(filled, levels[starts[1:] - 1] - lowest, 1)
            scale = num_bins / np.where(span == 0, 1, span)
        self.lowest, self.scale = lowest.astype(levels.dtype), scale.astype(levels.dtype)
        self.usable = bool(np.isfinite(span).all() and np.isfinite(self.scale).all())

    def of(self, values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Bin of each value, int64, those of row i from i * (num_bins + 2) on; values are (rows, n) without `rows`."""
        if rows is None:
            rows = np.arange(len(values))[:, None]
        with np.errstate(over='ignore'):
            places = values - self.lowest[rows]
            places *= self.scale[rows]
        np.maximum(places, -1, out=places)
        np.minimum(places, self.num_bins, out=places)
        places += 1
        places = places.astype(np.int64)
        if len(self.lowest) > 1:
            places += rows * (self.num_bins + 2)
        return places


def _count_on_device(scores: torch.Tensor, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    starts = np.searchsorted(rows, np.arange(len(scores) + 1))
    levels = torch.from_numpy(levels).to(scores.device)
    counts, nan = [], []
    for row in range(len(scores)):
        own, reached = levels[starts[row]:starts[row + 1]], 0
        for piece in scores[row].split(DEVICE_PIECE):
            piece = piece.to(levels.dtype)
            nan.append(piece.isnan().any())
            reached = reached + torch.bincount(
                torch.searchsorted(own, piece, right=True), minlength=len(own) + 1)
        counts.append(reached[1:].flip(0).cumsum(0).flip(0))
    if torch.stack(nan).any():
        row = int(scores.isnan().any(1).nonzero()[0])
        raise ValueError(f'scores[{row}] holds NaN.')
    return torch.cat(counts).cpu().numpy()
