"""An index of a photo collection: descriptors, classes, sizes and hashes of the images below some folders."""
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from .model import check_same_model, open_described, options_of
from .records import Record, classes_of
from .store import Store
from .vectors import Vectors

__all__ = ['Hit', 'Index']


@dataclass(frozen=True)
class Hit:
    """An image that a search has found; score is the cosine similarity of the descriptors, at most 1."""
    path: str
    score: float
    record: Record


class Index:
    """An index folder as of its last commit, for reading. `Index.build` makes or updates one.

    Row i of everything here is the same image. Files are mapped, and checked when they are first touched, so opening
    costs nothing and memory is the system's cache.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: It is not there or no index.
        DamagedIndex: A file is not what was written; reading later may raise it too.
        NewerFormat: A later version of the package wrote it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.store = Store(path)
        self._model = None

    @classmethod
    def open(cls, path: str | os.PathLike) -> 'Index':
        """The index in a folder, as the constructor gives it."""
        return cls(path)

    @classmethod
    def build(cls, dirs: Iterable[str | os.PathLike], out: str | os.PathLike, model=None, protocol=None, **options):
        """Make or update an index and open it; arguments as for `build_index`."""
        from .build import build_index
        build_index(dirs, out, model, protocol, **options)
        return cls(out)

    def __len__(self) -> int:
        return len(self.store.rows)

    def __repr__(self) -> str:
        return f'Index({str(self.path)!r}): {len(self):,} images, {self.vectors.shape[1]} dimensions'

    @cached_property
    def vectors(self) -> Vectors:
        """Descriptors, (N, D) float32 or float16, L2-normalised, mapped from the disk."""
        return Vectors(self.store)

    @property
    def columns(self) -> np.ndarray:
        """All records as one structured array (N,): width, height, bytes, mtime_ns, sha256, classes, ..."""
        return self.store.records

    @cached_property
    def paths(self) -> list[str]:
        """Absolute paths, as os.fsdecode gives them."""
        return [os.fsdecode(path) for path in self.store.absolute_paths()]

    def path_of(self, row: int) -> str:
        """Absolute path of one image."""
        record = self.columns[row]
        return os.fsdecode(os.path.join(self.store.root(int(record['root'])), self.store.relative_path(record)))

    def records(self, row: int) -> Record:
        """What is known of one image."""
        r = self.columns[row]
        return Record(
            self.path_of(row), int(r['width']), int(r['height']), int(r['bytes']), r['sha256'].tobytes().hex(),
            int(r['mtime_ns']), classes_of(r, self.label_names))

    @property
    def label_names(self) -> list[str] | None:
        """Names of the model's classes, None if it has no classes or they have no names."""
        return self.store.config['model']['label_names']

    @property
    def skipped(self) -> dict[str, str]:
        """Files below the folders that are no images that can be read: path to reason."""
        return {os.fsdecode(path): entry['reason'] for path, entry in self.store.skipped.items()}

    @property
    def info(self) -> dict:
        """How it was made: model, protocol, versions; and what it holds."""
        roots = [os.fsdecode(root) for root in self.store.roots]
        return {**self.store.config, 'path': str(self.path), 'images': len(self), 'skipped': len(self.store.skipped),
                'folders': roots, 'size': self.store.size, 'faiss': self.store.manifest.faiss}

    def protocol(self):
        """The preprocessing it was built with, which queries go through too."""
        from .queries import protocol_from_json
        return protocol_from_json(self.store.config['protocol'])

    def model(self, model=None, device: str | None = None):
        """The model it was built with, opened once.

        Args:
            model: A model, or what `open_model` opens, to take in place of the one the index names; it must have the
                same weights.
            device: Where to put it.

        Raises:
            OtherModel: It has other weights.
            OSError, ValueError, RuntimeError: It cannot be opened.
        """
        described = self.store.config['model']
        if model is not None:
            shown = model if isinstance(model, str) else 'This model'
            if isinstance(model, str):
                from timm_multigrain.models.open import open_model
                model = open_model(model, **options_of(described))
            check_same_model(described, model, self.path, shown)
            self._model = model
        elif self._model is None:
            self._model = open_described(described, self.path)
        return self._model.to(device) if device else self._model

    @cached_property
    def structure(self):
        """The index's `Structure` for approximate search; None without one, or without faiss."""
        if self.store.manifest.faiss is None:
            return None
        from .faiss_index import Structure
        try:
            return Structure(self.store)
        except ImportError:
            return None

    @cached_property
    def row_of_vector(self) -> np.ndarray:
        """Row of the image that each row of the vector file belongs to, -1 where none does any more."""
        row_of = np.full(self.store.num_vectors, -1, dtype=np.int64)
        row_of[self.columns['vector'].astype(np.int64)] = np.arange(len(self))
        return row_of

    def search(
            self, vectors, k: int = 10, class_name: str | None = None, exact: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest images of each descriptor.

        Args:
            vectors: (Q, D), numpy or tensor, L2-normalised.
            k: Images a query; fewer come if there are not so many.
            class_name: Only images whose most probable class has this name.
            exact: Compare with all images, also where the index has a structure that spares that (`info['faiss']` says
                which, and the share of the 10 nearest that it finds).

        Returns:
            Cosine similarities (Q, k) float32, highest first, and rows (Q, k) int64.

        Raises:
            ValueError: Wrong shape, values that are not finite, k below 1, or a class that the model does not know.
        """
        from .search import search_index
        return search_index(self, vectors, k, class_name, exact)

    def search_images(
            self,
            images: Sequence[str | os.PathLike | Image.Image],
            k: int = 10,
            crop: Sequence[float] | None = None,
            class_name: str | None = None,
            exact: bool = False,
    ) -> list[list[Hit]]:
        """The k nearest images of each picture, nearest first; a picture that is in the index is among them.

        Args:
            images: Files or pictures.
            k: Images a query.
            crop: (x, y, width, height) in pixels, the part of each picture to search for.
            class_name: Only images whose most probable class has this name.
            exact: As of `search`.

        Raises:
            UnreadableImage: A file is no image that can be read.
            ValueError: As `search`, or a crop outside of the picture.
        """
        from .queries import embed_queries
        queries = embed_queries(self.model(), self.protocol(), images, crop).vectors
        scores, rows = self.search(queries, k, class_name, exact)
        return [[Hit(self.path_of(row), score, self.records(row)) for score, row in zip(s, r, strict=True)]
                for s, r in zip(scores.tolist(), rows.tolist(), strict=True)]
