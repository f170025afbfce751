"""A collection as a map: pictures with descriptors alike lie beside each other in two dimensions, on one page."""
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from timm_multigrain.index.index import Index

from .collection import class_caption
from .page import read_picture, write_page

TSNE_UP_TO = 5000  # pictures; beyond, t-SNE takes many minutes
COLORS = ('#2f7fe6', '#e0701a', '#1a9e62', '#c05bb0', '#8a7a00', '#d03b3b', '#0e9aa7', '#7a63d6')
SIDE = 280  # pixels of the longer side of a picture


def layout(vectors: np.ndarray) -> np.ndarray:
    """Places (N, 2) from 0 to 1 of L2-normalised descriptors (N, D): t-SNE (van der Maaten and Hinton, 2008) of up to
    5000, which keeps neighbours together; of more, the two principal components.
    """
    if len(vectors) < 3:
        raise ValueError(f'A map takes three pictures or more, not {len(vectors)}.')
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as e:
        raise ImportError("The map needs scikit-learn: pip install 'timm_multigrain[metric]'") from e
    near = len(vectors) <= TSNE_UP_TO
    with np.errstate(invalid='ignore'):  # of equal pictures, whose variance is 0
        places = PCA(min(50 if near else 2, *vectors.shape), random_state=0).fit_transform(vectors)
    if near:
        start = 1e-4 * places[:, :2] / max(places[:, 0].std(), 1e-9)  # theirs is not finite for these
        places = TSNE(perplexity=min(30, (len(places) - 1) / 3), init=start, random_state=0).fit_transform(places)
    low, high = places.min(axis=0), places.max(axis=0)
    return (places - low) / np.where(high > low, high - low, 1)


def write_map(path: str | os.PathLike, index: Index, number: int = 2000) -> Path:
    """Write a page with the map of an index, or of so many pictures evenly spread over it."""
    rows = np.unique(np.linspace(0, len(index) - 1, min(max(number, 0), len(index))).round().astype(np.int64))
    places, exif = layout(np.asarray(index.vectors[rows], dtype=np.float32)), index.protocol().exif
    records = [index.records(row) for row in rows.tolist()]
    names = [record.classes[0][0] if record.classes else '' for record in records]
    kinds = list(zip((name for name, _ in Counter(filter(None, names)).most_common()), COLORS, strict=False))
    number_of = {name: i for i, (name, _) in enumerate(kinds, 1)}
    dots = [(100 * x, 100 * y, number_of.get(name, 0), record) for (x, y), name, record in zip(
        places.tolist(), names, records, strict=True)]
    return write_page(
        path, 'map.html', title=f'Map of {index.path}', dots=tqdm(dots, 'pictures', disable=None),
        of=len(index), number=len(dots), kinds=kinds, side=SIDE,
        picture_of=lambda path: read_picture(path, exif, SIDE), class_caption=class_caption)
