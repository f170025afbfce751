"""An index of a photo collection: descriptors, classes, sizes and hashes of the images below some folders."""
import copy
import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import counted
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.search import rerank as after
from timm_multigrain.search.exact import nearest
from timm_multigrain.search.local import LocalDescriber, LocalFeatures, Match, check_local, match_images, verified_score

from .ann import Structure
from .build import build_index
from .model import Queries, embed_queries, open_described, protocol_from_json
from .records import DamagedIndex, Record
from .store import PCA, Store
from .vectors import Vectors, in_chunks

APPROXIMATE_UP_TO = 1000  # images asked for, with which a structure is of use


@dataclass(frozen=True)
class Hit:
    """An image that a search has found; score is the cosine similarity of the descriptors, at most 1, match what its
    details and the query's have in common, if that was asked for."""
    path: str
    score: float
    record: Record
    match: Match | None = None


class Collection:
    """What can be searched by picture: an index, or a collection of another store that an index was exported to."""
    path: str | os.PathLike
    config: dict  # 'model' and 'protocol' as an index describes them
    _model = None

    def protocol(self) -> Protocol:
        """The preprocessing it was built with, which queries go through too."""
        return protocol_from_json(self.config['protocol'])

    def model(self, model: str | os.PathLike | torch.nn.Module | None = None) -> torch.nn.Module:
        """The model it was built with, opened once, or another of the same weights, as `open_described` takes it."""
        if model is not None or self._model is None:
            self._model = open_described(self.config['model'], self.path, model)
        return self._model

    def search_images(
            self,
            images: Sequence[str | os.PathLike | Image.Image],
            k: int = 10,
            crop: Sequence[float] | None = None,
            local: int | None = None,
            **options,
    ) -> list[list[Hit]]:
        """The k nearest images of each picture, nearest first; a picture that is in the index is among them.

        Args:
            images: Files or pictures.
            k: Images per query.
            crop: (x, y, width, height) in pixels, the part of each picture to search for.
            local: How many of the nearest images to compare by their details, and to order by both, see
                `timm_multigrain.search.local`. Details that the index does not keep are computed anew; a file that is
                gone has none then.
            **options: class_name, category, exact, qe, dba, rerank and report of `Index.search`.

        Raises:
            UnreadableImage: A file is not a readable image.
            ValueError: As `Index.search`, or a crop outside of the picture.
        """
        if local is not None:
            check_local(local)
        queries = embed_queries(self.model(), self.protocol(), images, crop)
        found = self.hits(queries.vectors, k if k < 1 else max(k, local or 0), **options)
        if local is not None:
            found = self._verified(Queries(images, crop), found, local)
        return [hits[:k] for hits in found]

    def _verified(self, queries: Queries, found: list[list[Hit]], local: int) -> list[list[Hit]]:
        """Hits, the first ones with what they have in common with the query, and in the order of both."""
        records = {hit.path: hit.record for hits in found for hit in hits[:local]}
        if not records:
            return found
        describer = LocalDescriber(self.model(), self.protocol())
        details = self._kept_details(records, describer)
        missing = ImageFiles(sorted(records.keys() - details.keys()))
        if describer.basis is None:
            describer.fit(missing)
        details |= zip(missing.names, describer.describe(missing), strict=True)
        verified = []
        for query, hits in zip(describer.describe(queries), found, strict=True):
            first = [replace(hit, match=match_images(query, details[hit.path])) for hit in hits[:local]]
            verified.append(sorted(first, key=lambda hit: -verified_score(hit.score, hit.match)) + hits[local:])
        return verified

    def _kept_details(self, records: dict[str, Record], describer: LocalDescriber) -> dict[str, LocalFeatures]:
        """Those of some images by their paths, and the describer made to agree with them."""
        return {}

    def hits(self, vectors, k: int = 10, **options) -> list[list[Hit]]:
        """The k nearest images of each descriptor, nearest first; arguments and errors as of `Index.search`."""
        raise NotImplementedError

    def _check(self, vectors, k: int, class_name: str | None) -> tuple[np.ndarray, list[int]]:
        """Queries (Q, D) float32, and the numbers of the classes of a name; ValueError for what cannot be searched."""
        if isinstance(vectors, torch.Tensor):
            vectors = vectors.detach().cpu().float().numpy()
        vectors, described = np.asarray(vectors, dtype=np.float32), self.config['model']
        if vectors.ndim != 2 or vectors.shape[1] != described['dim']:
            raise ValueError(f'descriptors must have shape (queries, {described["dim"]}), got {vectors.shape}: were '
                             "they made by the index's model?")
        if not np.isfinite(vectors).all():
            raise ValueError('The descriptors hold NaN or infinity.')
        if k < 1:
            raise ValueError(f'k is {k}: ask for at least one image.')
        names = described['label_names'] or [str(i) for i in range(described['num_classes'])]
        numbers = [i for i, name in enumerate(names) if name == class_name] or [  # of 'tench, Tinca tinca' one will do
            i for i, name in enumerate(names) if str(class_name).lower() in name.lower().split(', ')]
        if class_name is not None and not numbers:
            self._refuse('class', class_name, described['label_names'] or [],
                         f'its classes have no names: give a number from 0 to {names[-1]}.' if names else
                         'its model predicts no classes.')
        return vectors, numbers

    def _refuse(self, what: str, name: str, known: list[str], otherwise: str) -> None:
        near = ' or '.join(map(repr, difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]))
        raise ValueError(f'{self.path} does not know the {what} {name!r}: '
                         + (f'did you mean {near}?' if near else otherwise))


class Index(Collection):
    """An index folder as of its last commit, for reading. `Index.build` makes or updates one.

    Row i of everything here is the same image; searches give rows from len(index) on, too, which are regions of images.
    Descriptors are mapped, and checked when they are first touched.

    Raises:
        FileNotFoundError: Not found, or not an index.
        DamagedIndex: A file is not what was written; reading later may raise it too.
        NewerFormat: Another version of the package wrote it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.store = Path(path), Store(path)
        self.config, self._others = self.store.config, {}
        if self.pending:
            warnings.warn(
                f'{self.path} is not complete; still to come of its last update: {counted(self.pending, "picture")}. '
                'If that is not running, let timm-multigrain index go on with it.', stacklevel=2)

    @classmethod
    def build(cls, dirs: Iterable[str | os.PathLike], out: str | os.PathLike, model=None, protocol=None, **options):
        """Make or update an index and open it; arguments as for `build_index`."""
        build_index(dirs, out, model, protocol, **options)
        return cls(out)

    @property
    def pending(self) -> int:
        """Pictures that an update, which is running or was stopped, has yet to embed."""
        return self.store.state['pending']

    def __len__(self) -> int:
        return len(self.store.ids)

    def __repr__(self) -> str:
        return f'Index({str(self.path)!r}): {counted(len(self), "image")}, {self.vectors.shape[1]} dimensions'

    @cached_property
    def vectors(self) -> Vectors:
        """Descriptors, (N, D) float32 or float16, L2-normalised, mapped from the disk."""
        return self.store.file.take(self.store.vector_rows[:len(self)])

    @cached_property
    def _searched(self) -> Vectors:
        """Descriptors of the images and of their regions, (N + R, D)."""
        return self.store.file.take(self.store.vector_rows)

    @cached_property
    def image_rows(self) -> np.ndarray:
        """Row of the image that each row is of, also the regions', (N + R,) int64."""
        return np.concatenate([np.arange(len(self)), self.store.region_rows])

    @cached_property
    def categories(self) -> list[str]:
        """Categories of the regions."""
        return sorted({name.decode(errors='replace') for name in self.store.regions['category'].tolist()} - {''})

    @property
    def columns(self) -> np.ndarray:
        """All records as one array, (N,) of `RECORD`."""
        return self.store.records

    @cached_property
    def paths(self) -> list[str]:
        """Absolute paths, as os.fsdecode gives them."""
        return [os.fsdecode(path) for path in self.store.paths()]

    def path_of(self, row: int) -> str:
        """Absolute path of one image."""
        return os.fsdecode(self.store.path(self.image_rows[row]))

    def name_of(self, path: str) -> str:
        """A path below the indexed folder that it is in; its last part if it is in none."""
        folders = [os.path.join(os.fsdecode(root), '') for root in self.store.roots]
        return next((path[len(folder):] for folder in folders if path.startswith(folder)), os.path.basename(path))

    def class_name(self, number: int) -> str:
        """A class without a name is called by its number."""
        return self.label_names[number] if self.label_names else str(number)

    def records(self, row: int) -> Record:
        """What is known of one image or region."""
        r, region = self.columns[self.image_rows[row]], ()
        if row >= len(self):
            box, category, _ = self.store.regions[row - len(self)].tolist()
            region = tuple(box.tolist()), category.decode(errors='replace')
        classes = tuple((self.class_name(number), probability) for number, probability in zip(
            r['classes'].tolist(), r['probabilities'].tolist(), strict=True) if number >= 0)
        return Record(self.path_of(row), int(r['width']), int(r['height']), int(r['bytes']),
                      r['sha256'].tobytes().hex(), int(r['mtime_ns']), classes, *region)

    @property
    def label_names(self) -> list[str] | None:
        """Names of the model's classes, None if it has no classes or they have no names."""
        return self.config['model']['label_names']

    @property
    def skipped(self) -> dict[str, str]:
        """Files below the folders that are not readable images: path to reason."""
        return self.store.skipped_paths()

    @property
    def info(self) -> dict:
        """How it was made: model, protocol, versions; and what is in it."""
        roots = [os.fsdecode(root) for root in self.store.roots]
        return {**self.config, 'path': str(self.path), 'images': len(self), 'regions': len(self.store.regions),
                'skipped': len(self.store.skipped), 'folders': roots,
                'local': max(0, len(self.store.local) - 1), 'faiss': self.store.faiss}

    @cached_property
    def structure(self) -> Structure | None:
        """What proposes images to an approximate search; None where all are compared, or without faiss."""
        try:
            return Structure(self.store) if self.store.faiss else None
        except ImportError:
            return None

    @cached_property
    def row_of_vector(self) -> np.ndarray:
        """Row of the image or region that each row of the file of vectors belongs to, -1 where it was deleted."""
        row_of = np.full(len(self.store.file), -1, dtype=np.int64)
        row_of[self.store.vector_rows] = np.arange(len(self._searched))
        return row_of

    @cached_property
    def _most_parts(self) -> int:
        """Of an image: itself and its regions."""
        return int(np.bincount(self.image_rows).max(initial=1))

    @cached_property
    def background(self) -> after.Background:
        """What the photographs have in common, from 2000 of them."""
        return after.Background.of(self.vectors[::max(1, -(-len(self) // after.SAMPLE))])

    def search(
            self,
            vectors,
            k: int = 10,
            class_name: str | None = None,
            category: str | None = None,
            exact: bool = False,
            qe: tuple[int, float] | None = None,
            dba: tuple[int, float] | None = None,
            rerank: int | Literal['auto'] | None = None,
            report: Callable[[str], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest images of each descriptor, each image once, by itself or by its nearest region.

        Args:
            vectors: (Q, D), numpy or tensor, L2-normalised.
            k: Images per query; fewer if the index has fewer.
            class_name: Only images whose most probable class has this name.
            category: Only regions of this category.
            exact: Compare with all images, also where the index has a structure that spares that (`info['faiss']` says
                which, and the share of the 10 nearest that it finds).
            qe: Neighbours k and alpha of an `alpha_query_expansion`; the neighbours are what this search finds.
            dba: Neighbours k and alpha of a `database_augmentation`: all descriptors are taken into memory and compared
                with each other, once while the index is open, and then with the queries.
            rerank: Neighbours by which the first 400 images (k, if that is more) refine each other and the query, or
                'auto' for 3 where they are not a matter of chance, see `rerank_candidates`; in place of both.
            report: Takes a sentence on what the re-ranking chose.

        Returns:
            Cosine similarities (Q, k) float32, highest first, and rows (Q, k) int64, of images or of regions.

        Raises:
            ValueError: Wrong shape, values that are not finite, k below 1, or a class that the model does not know, or
                a category that no region has.
        """
        queries, numbers = self._check(vectors, k, class_name)
        if rerank is not None:
            after.check_neighbours(rerank, qe, dba)
            return self._reranked(queries, k, rerank, report, class_name=class_name, category=category, exact=exact)
        if dba is not None:
            return self._augmented(*dba).search(queries, k, class_name, category, qe=qe)
        if qe is not None:
            _, rows = self.search(queries, qe[0], class_name, category, exact)
            if rows.size:
                queries = np.concatenate([after.alpha_query_expansion(query[None], self._searched[near], *qe)
                                          for query, near in zip(queries, rows, strict=True)])
        # that k images are among them in any case
        asked = k * self._most_parts
        if class_name is not None or category is not None:
            chosen = np.ones(len(self._searched), dtype=bool)
            if class_name is not None:
                chosen = np.isin(self.columns['classes'][self.image_rows, 0], numbers)
            if category is not None:
                if category not in self.categories:
                    self._refuse('category', category, self.categories, 'index it with boxes that have categories.')
                chosen[:len(self)] = False
                chosen[len(self):] &= self.store.regions['category'] == category.encode()
            return self._each_once(*self._exact(queries, asked, np.flatnonzero(chosen)), k)
        structure = None if exact or asked > APPROXIMATE_UP_TO else self.structure
        found = None if structure is None else self._approximate(structure, queries, asked)
        return self._each_once(*(self._exact(queries, asked) if found is None else found), k)

    def _augmented(self, k: int, alpha: float) -> 'Index':
        """This index with other descriptors, all of them in memory."""
        if (k, alpha) not in self._others:
            other, vectors = copy.copy(self), after.database_augmentation(
                np.asarray(self._searched, np.float32), k, alpha).numpy()
            other.structure, other._searched = None, vectors
            self._others[k, alpha] = other
        return self._others[k, alpha]

    def _each_once(self, scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first k of each query that are of different images."""
        if len(self.store.regions):
            first = np.array([np.sort(np.unique(self.image_rows[row], return_index=True)[1])[:k] for row in rows],
                             dtype=np.int64).reshape(len(rows), -1)
            scores, rows = (np.take_along_axis(values, first, 1) for values in (scores, rows))
        return scores, rows

    def hits(self, vectors, k: int = 10, **options) -> list[list[Hit]]:
        found = (values.tolist() for values in self.search(vectors, k, **options))
        return [[Hit(self.path_of(row), score, self.records(row)) for score, row in zip(s, r, strict=True)]
                for s, r in zip(*found, strict=True)]

    def _kept_details(self, records: dict[str, Record], describer: LocalDescriber) -> dict[str, LocalFeatures]:
        hashes = {path: bytes.fromhex(record.sha256) for path, record in records.items()}
        kept = self.store.details(hashes.values())
        try:
            dim = describer.restore(kept[PCA]).basis.shape[1] if PCA in kept else 0
            return {path: LocalFeatures.from_bytes(kept[hashes[path]], dim, (record.width, record.height))
                    for path, record in records.items() if dim and hashes[path] in kept}
        except ValueError as e:  # whoever makes an index makes its checksums, too
            raise DamagedIndex(self.path, str(e)) from e

    def _reranked(self, queries: np.ndarray, k: int, neighbours: int | str, report: Callable[[str], None] | None,
                  **options) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self.search(queries, max(k, after.TOP), **options)
        agreements = []
        for i, query in enumerate(torch.from_numpy(queries)):
            candidates = torch.from_numpy(self._searched[rows[i]].astype(np.float32))
            found, agreement = after.rerank_candidates(query, candidates, self.background, neighbours)
            order = found.argsort(descending=True, stable=True)
            scores[i], rows[i] = found[order], rows[i][order]
            agreements.append(agreement)
        if report and agreements:
            report(after.chosen(agreements, neighbours))
        return scores[:, :k], rows[:, :k]

    def _exact(self, queries: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of all rows or of these, ascending; among equals the first ones."""
        if not len(self._searched if rows is None else rows):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        scores, found = (values.numpy() for values in nearest(queries, in_chunks(self._searched, rows), k))
        return scores, found if rows is None else rows[found]

    def _approximate(self, structure: Structure, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The nearest among what a structure proposes and all that was added later; None if it proposes too few."""
        k, late = min(k, len(self._searched)), self.row_of_vector[structure.rows:]
        scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for i, proposed in enumerate(structure.candidates(queries, k)):
            rows = np.union1d(self.row_of_vector[proposed[proposed >= 0]], late)
            rows = rows[rows >= 0]
            if len(rows) < k:
                return None
            scores[i], found[i] = (values[0] for values in self._exact(queries[i:i + 1], k, rows))
        return scores, found
