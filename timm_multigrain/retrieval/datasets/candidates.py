"""The best pairs of query and reference over a whole set, kept while the scores stream by."""
from collections.abc import Iterable

import numpy as np
import torch

__all__ = ['best_pairs']


def best_pairs(scores: Iterable[torch.Tensor], limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `limit` highest scores over all queries together.

    Memory is a few times the limit. Among equal scores at the limit the choice is arbitrary.

    Args:
        scores: (Q, n) pieces of columns, in the order of the database.
        limit: Pairs to keep at most.

    Returns:
        Rows, columns and scores of the pairs, best first.
    """
    kept = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    threshold, start = -np.inf, 0
    waiting, count = [], 0
    for piece in scores:
        piece = piece.cpu().numpy()
        rows, columns = np.nonzero(piece > threshold)
        waiting.append((rows, columns + start, piece[rows, columns]))
        count += len(rows)
        start += piece.shape[1]
        if count >= limit:
            kept, waiting, count = _best([kept, *waiting], limit), [], 0
            if len(kept[2]) == limit:
                threshold = kept[2].min()
    rows, columns, values = _best([kept, *waiting], limit)
    order = np.argsort(-values, kind='stable')
    return rows[order], columns[order], values[order]


def _best(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], limit: int) -> tuple[np.ndarray, ...]:
    rows, columns, values = map(np.concatenate, zip(*parts, strict=True))
    if len(values) > limit:
        chosen = np.argpartition(-values, limit - 1)[:limit]
        rows, columns, values = rows[chosen], columns[chosen], values[chosen]
    return rows, columns, values
