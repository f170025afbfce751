"""Nearest images of descriptors."""
import difflib
import os
import warnings

import numpy as np
import torch

__all__ = ['approximate_search', 'exact_search', 'open_collection', 'rows_of_class', 'search_index']

MILVUS = 'milvus:'
APPROXIMATE_UP_TO = 1000  # images asked for, with which a structure is of use
CHUNK = 1 << 25  # bytes of descriptors that are compared at a time


def open_collection(name: str | os.PathLike):
    """What a command searches in: an index folder, or with 'milvus:URI' a collection that an index was exported to.

    Both have `search_images`.
    """
    if str(name).startswith(MILVUS):
        from .milvus import MilvusIndex
        return MilvusIndex.open(str(name))
    from .index import Index
    return Index.open(name)


def search_index(
        index, vectors, k: int, class_name: str | None = None, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    queries = check_queries(vectors, index.vectors.shape[1])
    if k < 1:
        raise ValueError(f'k is {k}: ask for at least one image.')
    if class_name is not None:
        return exact_search(index.vectors, queries, k, rows_of_class(index, class_name))
    structure = None if exact or k > APPROXIMATE_UP_TO else index.structure
    if structure is None:
        return exact_search(index.vectors, queries, k)
    return approximate_search(index, structure, queries, k)


def approximate_search(index, structure, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_search` among what a structure proposes, and all images that were added after it was built."""
    row_of = index.row_of_vector
    k, late = min(k, len(index)), row_of[structure.rows:]
    late = np.sort(late[late >= 0])
    all_scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    all_rows = np.full((len(queries), k), -1, dtype=np.int64)
    for i, proposed in enumerate(structure.candidates(queries, k)):
        rows = np.union1d(row_of[proposed[proposed >= 0]], late)
        scores, rows = exact_search(index.vectors, queries[i:i + 1], k, rows[rows >= 0])
        all_scores[i, :scores.shape[1]], all_rows[i, :rows.shape[1]] = scores[0], rows[0]
    if (all_rows < 0).any():  # a structure that cannot propose so many
        return exact_search(index.vectors, queries, k)
    return all_scores, all_rows


def rows_of_class(index, class_name: str) -> np.ndarray:
    """Rows of the images whose most probable class has this name, or this number where classes have no names.

    Raises:
        ValueError: Class not found.
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
    n, k = (len(vectors) if rows is None else len(rows)), min(k, len(vectors) if rows is None else len(rows))
    queries = torch.from_numpy(queries)
    best_scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    best_rows = np.full((len(queries), k), -1, dtype=np.int64)
    step = max(k, CHUNK // (vectors.shape[1] * 4))
    for start in range(0, n, step):
        numbers = np.arange(start, min(start + step, n)) if rows is None else rows[start:start + step]
        chunk = vectors[start:start + step] if rows is None else vectors[numbers]
        scores = (_to_float32(chunk) @ queries.T).T.numpy()
        # after the first chunk only a few are better than the worst of the best; an equal one that comes later is not
        better = np.flatnonzero((scores > best_scores[:, -1:]).any(axis=0))
        if not len(better):
            continue
        found = np.concatenate([best_scores, scores[:, better]], axis=1)
        found_rows = np.concatenate([best_rows, np.broadcast_to(numbers[better], (len(queries), len(better)))], axis=1)
        order = np.argsort(-found, axis=1, kind='stable')[:, :k]
        best_scores, best_rows = np.take_along_axis(found, order, axis=1), np.take_along_axis(found_rows, order, axis=1)
    return best_scores, best_rows


def _to_float32(chunk: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that the map is read-only: nothing is written to it
        return torch.from_numpy(chunk).float()


def check_queries(vectors, dim: int) -> np.ndarray:
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().cpu().float().numpy()
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f'descriptors must have shape (queries, {dim}), got {vectors.shape}: were they made by the '
                         "index's model?")
    if not np.isfinite(vectors).all():
        raise ValueError(f'Row {int(np.argmax(~np.isfinite(vectors).all(axis=1)))} of the descriptors is not finite.')
    return vectors
