"""Structures of FAISS (Douze et al., arXiv 2401.08281) that find the nearest images without comparing with all of them.

Up to `EXACT_UP_TO` images none is needed: comparing with all is exact and takes milliseconds. Above, HNSW (Malkov
and Yashunin, arXiv 1603.09320) over 8-bit codes; above `HNSW_UP_TO`, where its memory counts, IVF-PQ (Jégou et al.
2011). Either proposes candidates, which are compared exactly: scores are always true ones, only a candidate can be
missed. How many are is measured when the structure is built, with images of the index as queries, and kept with it.
"""
import mmap
import sys
import zlib
from pathlib import Path

import numpy as np

from timm_multigrain.extras import extra
from timm_multigrain.files import open_regular, replacing
from timm_multigrain.search.exact import nearest

from .records import DamagedIndex, writing
from .store import Store, Writer
from .vectors import Vectors, in_chunks

KINDS = ('exact', 'hnsw', 'ivf-pq')
EXACT_UP_TO = 100_000
HNSW_UP_TO = 1_000_000
TARGET_RECALL = 0.95  # of the 10 nearest images, the share to be found
UNCOVERED = 0.2  # share of images added since the structure was built, at which it is built anew
QUERIES = 200  # for measuring the recall
CANDIDATES = (100, 400, 1600)  # compared exactly for each query: as few as do
LINKS = 32  # of a node of HNSW


class Structure:
    """The structure of an index on the disk, for searching; DamagedIndex if the file is not what was written."""

    def __init__(self, store: Store):
        described, faiss = store.faiss, import_faiss()
        path = store.folder / f'faiss.{described["number"]}.bin'
        try:
            if _size_and_crc32(path) != (described['size'], described['crc32']):
                raise ValueError('its checksum differs')
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            if (self._index.ntotal, self._index.d) != (described['rows'], store.dim):
                raise ValueError('it is of another index')
        except (OSError, ValueError, RuntimeError) as e:
            raise DamagedIndex(path, str(e).splitlines()[0]) from e
        self.rows, self._settings = described['rows'], described['settings']
        kept = np.zeros(self.rows, dtype=bool)
        kept[store.vector_rows[store.vector_rows < self.rows]] = True
        self._kept = np.packbits(kept, bitorder='little')  # the selector does not own what it points to
        self._selector = None if kept.all() else faiss.IDSelectorBitmap(self._kept)

    def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows of the vector file where the k nearest are likely to be, (Q, n) int64; -1 fills up."""
        wanted = min(self.rows, max(self._settings.get('candidates', CANDIDATES[0]), 4 * k))
        return _candidates(self._index, queries, wanted, self._settings, self._selector)


def update_structure(writer: Writer, kind: str = 'auto', progress: bool = True) -> dict | None:
    """Bring the structure of an index, 'auto' or one of `KINDS`, up to date; it stays while it covers most images.

    The writer has nothing left to commit. What the index keeps is returned, None if images are compared with all.
    """
    if kind not in ('auto', *KINDS):
        raise ValueError(f'kind is {kind!r}: choose auto, {", ".join(KINDS)}.')
    store = Store(writer.folder)
    images, rows, old = len(store.vector_rows), len(store.file), store.faiss
    wanted = kind
    if kind == 'auto':
        wanted = 'exact' if images <= EXACT_UP_TO else 'hnsw' if images <= HNSW_UP_TO else 'ivf-pq'
    if wanted == 'exact' or images < 100:  # too few to train anything
        writer.commit(faiss=None)
        return None
    if old and old['kind'] == wanted and rows - old['rows'] <= UNCOVERED * rows:
        return old
    try:
        import_faiss()
    except ImportError as e:
        if kind != 'auto':
            raise
        print(f'{images:,} images are searched one by one: {e}', file=sys.stderr)
        return None
    if progress:
        print(f'building {wanted} for {images:,} images', file=sys.stderr)
    described = _build(store, wanted)
    writer.commit(faiss=described)
    return described


def import_faiss():
    """The module."""
    with extra('retrieval', 'A structure for search'):
        import faiss
    return faiss


def _build(store: Store, kind: str) -> dict:
    faiss, vectors, rows = import_faiss(), store.file.take(store.vector_rows), len(store.file)
    index, settings = _create(faiss, vectors, rows, kind)
    for start in range(0, rows, 16384):
        index.add(store.file[start:start + 16384].astype(np.float32))
    settings, recall = _tune(index, vectors, store.vector_rows, settings)
    number = 1 + (store.faiss['number'] if store.faiss else 0)
    path = store.folder / f'faiss.{number}.bin'
    with writing(store.folder), replacing(path) as unfinished:
        try:
            faiss.write_index(index, str(unfinished))
        except RuntimeError as e:  # what faiss makes of a full disk
            raise OSError(f'{path.name} is incomplete: {str(e).splitlines()[0]}') from e
    size, crc32 = _size_and_crc32(path)
    return {'number': number, 'kind': kind, 'rows': rows, 'settings': settings, 'recall_at_10': recall,
            'recall_queries': min(QUERIES, len(vectors)), 'faiss': faiss.__version__, 'size': size, 'crc32': crc32}


def _size_and_crc32(path: Path) -> tuple[int, int]:
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return len(data), zlib.crc32(data)


def _create(faiss, vectors: Vectors, rows: int, kind: str) -> tuple:
    """An empty structure for so many rows, trained, and its settings."""
    dim = vectors.shape[1]
    if kind == 'hnsw':
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        index.train(vectors[_sample(vectors, 50_000)].astype(np.float32))
        return index, {'links': LINKS, 'ef': 64}
    lists = max(1, min(int(4 * rows ** 0.5), rows // 40))
    code = next(m for m in range(min(128, max(16, dim // 8), dim), 0, -1) if dim % m == 0)
    bits = 8 if rows >= 39 * 256 else 4  # what training 256 centroids takes
    index = faiss.index_factory(dim, f'IVF{lists},PQ{code}x{bits}', faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 64, 1
    index.pq.cp.min_points_per_centroid, index.pq.cp.niter = 1, 10
    index.train(vectors[_sample(vectors, max(64 * lists, 65_536))].astype(np.float32))
    return index, {'lists': lists, 'code_bytes': code * bits // 8, 'probes': 1}


def _sample(vectors: Vectors, count: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(len(vectors))[:count])


def _tune(index, vectors: Vectors, vector_rows: np.ndarray, settings: dict) -> tuple[dict, float]:
    """The cheapest settings that reach the recall, or the dearest ones, and the recall that they have."""
    queried = _sample(vectors, QUERIES, seed=1)
    queries = vectors[queried].astype(np.float32)
    # an image does not count as its own match: anything would find it
    truth = [vector_rows[found[found != own]][:10]
             for found, own in zip(nearest(queries, in_chunks(vectors), 11)[1].numpy(), queried, strict=True)]
    knob, values = ('ef', [128, 256, 512, 1024])
    if 'probes' in settings:
        knob, values = 'probes', [2 ** i for i in range(11) if 2 ** i < 2 * settings['lists']]
    best, best_recall = settings, -1.
    for candidates in CANDIDATES:
        last = -1.
        for value in values:
            tried = {**settings, 'candidates': candidates, knob: value}
            found = _candidates(index, queries, min(candidates, index.ntotal), tried, None)
            recall = float(np.mean([len(np.intersect1d(t, f)) / max(1, len(t))
                                    for t, f in zip(truth, found, strict=True)]))
            if recall > best_recall:
                best, best_recall = tried, recall
            if recall >= TARGET_RECALL:
                return best, best_recall
            if 0 < recall < last + 0.005:
                break  # the codes, not the lists, are what misses the rest
            last = recall
    return best, best_recall


def _candidates(index, queries: np.ndarray, count: int, settings: dict, selector) -> np.ndarray:
    faiss = import_faiss()
    chosen = {} if selector is None else {'sel': selector}
    if 'probes' in settings:
        parameters = faiss.SearchParametersIVF(nprobe=settings['probes'], **chosen)
    else:
        parameters = faiss.SearchParametersHNSW(efSearch=max(settings.get('ef', 0), count), **chosen)
    # faiss.contrib.torch_utils, which others import, puts a search without parameters in its place
    search = getattr(index, 'search_numpy', index.search)
    return search(np.ascontiguousarray(queries, dtype=np.float32), count, params=parameters)[1]
