"""Nearest images of descriptors."""
import difflib
import os

import numpy as np
import torch

__all__ = ['exact_search', 'open_collection', 'rows_of_class', 'search_index']

MILVUS = 'milvus:'


def open_collection(name: str | os.PathLike):
    """What a command searches in: an index folder, or with 'milvus:URI' a collection that an index was exported to.

    Both have `search_images`.
    """
    if str(name).startswith(MILVUS):
        from .milvus import MilvusIndex
        return MilvusIndex.open(str(name))
    from .index import Index
    return Index.open(name)


def search_index(index, vectors, k: int, class_name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    queries = _check_queries(vectors, index.vectors.shape[1])
    if k < 1:
        raise ValueError(f'k is {k}: ask for at least one image.')
    rows = None if class_name is None else rows_of_class(index, class_name)
    return exact_search(index.vectors, queries, k, rows)


def rows_of_class(index, class_name: str) -> np.ndarray:
    """Rows of the images whose most probable class has this name, or this number where classes have no names.

    Raises:
        ValueError: There is no such class.
    """
    names = index.label_names or [str(i) for i in range(index.store.config['model']['num_classes'])]
    numbers = [i for i, name in enumerate(names) if name == class_name]
    if not numbers:
        near = difflib.get_close_matches(class_name, names, n=3, cutoff=0.4) or names[:5]
        hint = f'did you mean {" or ".join(map(repr, near))}?' if near else 'its model predicts no classes.'
        raise ValueError(f'{index.path} knows no class {class_name!r}: {hint}')
    return np.flatnonzero(np.isin(index.columns['classes'][:, 0], numbers))


def exact_search(vectors, queries: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the highest product with each query; among equals the first ones.

    Args:
        vectors: `Vectors`, (N, D).
        queries: (Q, D) float32.
        k: Rows a query.
        rows: Only these rows, ascending.

    Returns:
        Products (Q, min(k, N)) and rows (Q, min(k, N)).
    """
    n = len(vectors) if rows is None else len(rows)
    best_scores = np.empty((len(queries), 0), dtype=np.float32)
    best_rows = np.empty((len(queries), 0), dtype=np.int64)
    step = max(1, (1 << 25) // (vectors.shape[1] * 4))
    for start in range(0, n, step):
        numbers = np.arange(start, min(start + step, n)) if rows is None else rows[start:start + step]
        chunk = vectors[start:start + step] if rows is None else vectors[numbers]
        scores = queries @ chunk.astype(np.float32, copy=False).T
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best_rows = np.concatenate([best_rows, np.broadcast_to(numbers, scores.shape)], axis=1)
        order = np.argsort(-best_scores, axis=1, kind='stable')[:, :k]
        best_scores, best_rows = (np.take_along_axis(a, order, axis=1) for a in (best_scores, best_rows))
    return best_scores, best_rows


def _check_queries(vectors, dim: int) -> np.ndarray:
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().cpu().float().numpy()
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f'descriptors must have shape (queries, {dim}), got {vectors.shape}: were they made by the '
                         "index's model?")
    if not np.isfinite(vectors).all():
        raise ValueError(f'Row {int(np.argmax(~np.isfinite(vectors).all(axis=1)))} of the descriptors is not finite.')
    return vectors
