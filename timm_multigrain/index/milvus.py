"""An index in Milvus, the distributed vector engine: export of descriptors and records, and search there.

The same code talks to a cluster and to milvus-lite, which keeps a collection in a local file. Every image has one row,
whose key is the hash of its path, so exporting again changes what has changed and goes on where it stopped.
"""
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from timm_multigrain.files import check_json, parse_json

from .errors import OtherModel
from .milvus_client import PREFIX, MilvusAddress, create_collection, milvus_errors, path_from_text, path_to_text
from .records import Record

if TYPE_CHECKING:
    from pymilvus import MilvusClient

    from .index import Hit, Index

__all__ = ['MilvusExport', 'MilvusIndex', 'export_milvus', 'open_collection']

PROPERTY = 'multigrain'
FLAT_UP_TO = 1_000_000  # rows for which comparing with every one, which is exact, is the default
_FIELDS = ['path', 'width', 'height', 'bytes', 'mtime_ns', 'sha256', 'classes']
_MOST_HITS = 16_384
_CONFIG = {
    'model': {'source': str, 'options': {}, 'weights_sha256': str, 'pool': (str, None), 'dim': int, 'num_classes': int,
              'label_names': ([str], None)},
    'protocol': {}}
_ROW = {'path': str, 'width': int, 'height': int, 'bytes': int, 'mtime_ns': int, 'sha256': str,
        'classes': [[(str, float)]]}


@dataclass(frozen=True)
class MilvusExport:
    """What an export has done: rows written, found unchanged, removed, and left there of other images."""
    address: MilvusAddress
    written: int
    unchanged: int
    removed: int
    others: int
    seconds: float

    def __str__(self) -> str:
        rate = f', {self.written / self.seconds:,.0f} a second' if self.written and self.seconds else ''
        text = (f'{self.address}: {self.written:,} images written{rate}, {self.unchanged:,} already there, '
                f'{self.removed:,} removed')
        return text if not self.others else f'{text}; it also holds {self.others:,} that are not in this index'


def export_milvus(
        index: 'Index',
        address: str | MilvusAddress,
        *,
        token: str | None = None,
        mirror: bool = False,
        index_type: str | None = None,
        batch_size: int = 1000,
        progress: bool = True,
) -> MilvusExport:
    """Send an index to a collection of Milvus, which is made if it is not there.

    Args:
        index: What to send.
        address: 'milvus:URI#COLLECTION'.
        token: See `MilvusAddress.connect`.
        mirror: Remove the rows of images that are not in this index.
        index_type: Milvus's kind of index of a new collection; None: FLAT, which is exact, and above a million rows
            AUTOINDEX.
        batch_size: Rows sent at once.
        progress: Show a bar.

    Raises:
        OtherModel: The collection holds descriptors of another model or another preprocessing.
        ValueError: The address is none, or the collection was not made by this function.
        RuntimeError: What Milvus reports. What was sent stays, and the next run goes on from there.
        FileNotFoundError, ImportError: See `MilvusAddress.connect`.
    """
    from tqdm import tqdm

    address = MilvusAddress.parse(address) if isinstance(address, str) else address
    client = address.connect(token, create=True)
    start, written, unchanged, removed = time.perf_counter(), 0, 0, 0
    try:
        with milvus_errors(f'{address} could not be written to'):
            _prepare(client, address, index, index_type)
            client.load_collection(address.collection)  # a killed process may have left it released
            batches = tqdm(
                range(0, len(index), batch_size), unit='batch', desc='export', disable=not progress or None)
            for first in batches:
                rows = list(_rows(index, first, min(first + batch_size, len(index))))
                changed = _changed(client, address.collection, rows)
                if changed:
                    client.upsert(address.collection, changed)
                written, unchanged = written + len(changed), unchanged + len(rows) - len(changed)
            if mirror:
                removed = _remove_others(client, address.collection, index)
            client.flush(address.collection)
            others = _count(client, address.collection) - len(index)
    finally:
        client.close()
    return MilvusExport(address, written, unchanged, removed, others, time.perf_counter() - start)


def _prepare(client: 'MilvusClient', address: MilvusAddress, index: 'Index', index_type: str | None) -> None:
    """Make the collection, or see that its rows compare with those of the index."""
    if client.has_collection(address.collection):
        there, own = _read_config(client, address), _config(index)
        for what, of in (('weights', lambda c: (c['model']['weights_sha256'], c['model']['pool'])),
                         ('preprocessing', lambda c: c['protocol']), ('dimension', lambda c: c['model']['dim'])):
            if of(there) != of(own):
                raise OtherModel(f'{address} holds descriptors made with another model or preprocessing (its {what}: '
                                 f'{of(there)}, here {of(own)}): name another collection with #NAME.')
        return
    index_type = index_type or ('FLAT' if len(index) <= FLAT_UP_TO else 'AUTOINDEX')
    dim = index.vectors.shape[1]
    create_collection(client, address.collection, dim, index_type, {PROPERTY: json.dumps(_config(index))})


def _config(index: 'Index') -> dict[str, Any]:
    """The index's config.json, as it is after a round trip through JSON."""
    config = dict(index.store.config)
    model = dict(config['model'])
    if model['source'] is None:
        model.update(source=os.path.abspath(index.path / 'model'), options={})
    return json.loads(json.dumps({'model': model, 'protocol': config['protocol']}))


def _read_config(client: 'MilvusClient', address: MilvusAddress) -> dict[str, Any]:
    if not client.has_collection(address.collection):
        known = ', '.join(sorted(client.list_collections())) or 'none'
        raise FileNotFoundError(f'{address.uri} has no collection {address.collection} (it has: {known}): put one '
                                f'there with timm-multigrain export INDEX --to {address}')
    try:
        config = parse_json(client.describe_collection(address.collection)['properties'][PROPERTY])
        check_json(config, _CONFIG, PROPERTY)
        return config
    except (KeyError, ValueError) as e:
        raise ValueError(
            f'{address} was not made by timm-multigrain export: name another collection with #NAME.') from e


def _rows(index: 'Index', start: int, stop: int) -> Iterator[dict[str, Any]]:
    vectors = np.asarray(index.vectors[start:stop], dtype=np.float32)
    for row, vector in zip(range(start, stop), vectors, strict=True):
        record = index.records(row)
        fields = {
            'path': path_to_text(record.path), 'width': record.width, 'height': record.height, 'bytes': record.bytes,
            'mtime_ns': record.mtime_ns, 'sha256': record.sha256,
            'class_name': record.classes[0][0] if record.classes else '',
            'classes': [[name, probability] for name, probability in record.classes],
        }
        version = hashlib.sha256(json.dumps(fields).encode() + vector.tobytes()).hexdigest()[:32]
        yield {'id': _key(record.path), 'vector': vector, 'version': version, **fields}


def _key(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def _changed(client: 'MilvusClient', collection: str, rows: list[dict]) -> list[dict]:
    there = client.get(collection, ids=[row['id'] for row in rows], output_fields=['version'])
    versions = {entry['id']: entry['version'] for entry in there}
    return [row for row in rows if versions.get(row['id']) != row['version']]


def _remove_others(client: 'MilvusClient', collection: str, index: 'Index', batch_size: int = 1000) -> int:
    own = {_key(index.path_of(row)) for row in range(len(index))}
    others, pages = [], client.query_iterator(collection, batch_size=batch_size, output_fields=['id'])
    while page := pages.next():
        others += [entry['id'] for entry in page if entry['id'] not in own]
    pages.close()
    for start in range(0, len(others), batch_size):
        client.delete(collection, ids=others[start:start + batch_size])
    return len(others)


def _count(client: 'MilvusClient', collection: str) -> int:
    return int(client.query(collection, filter='', output_fields=['count(*)'])[0]['count(*)'])


class MilvusIndex:
    """A collection that an index was exported to, to be searched like the index.

    Args:
        address: 'milvus:URI#COLLECTION'.
        token: See `MilvusAddress.connect`.

    Raises:
        FileNotFoundError: There is no such file or collection.
        ValueError: The address is none, or the collection was not made by `export_milvus`.
        ImportError, RuntimeError: See `MilvusAddress.connect`.
    """

    def __init__(self, address: str | MilvusAddress, token: str | None = None):
        self.address = MilvusAddress.parse(address) if isinstance(address, str) else address
        self.client = self.address.connect(token)
        with milvus_errors(f'{self.address} could not be read'):
            self.config = _read_config(self.client, self.address)
            self.client.load_collection(self.address.collection)
        self._model = None

    @classmethod
    def open(cls, address: str | MilvusAddress, token: str | None = None) -> 'MilvusIndex':
        """The collection, as the constructor gives it."""
        return cls(address, token)

    def __len__(self) -> int:
        with milvus_errors(f'{self.address} could not be read'):
            return _count(self.client, self.address.collection)

    @property
    def path(self) -> str:
        """The address."""
        return str(self.address)

    @property
    def label_names(self) -> list[str] | None:
        """Names of the model's classes, None if it has no classes or they have no names."""
        return self.config['model']['label_names']

    def protocol(self):
        """The preprocessing of the index, which queries go through too."""
        from .model import protocol_from_json
        return protocol_from_json(self.config['protocol'])

    def model(self, model=None, device: str | None = None):
        """As `Index.model`."""
        from .model import open_described, open_named

        described = self.config['model']
        if model is not None:
            self._model = open_named(described, model, self.path)
        elif self._model is None:
            self._model = open_described(described, Path(self.path))
        return self._model.to(device) if device else self._model

    def search(
            self, vectors, k: int = 10, class_name: str | None = None, exact: bool = False) -> 'list[list[Hit]]':
        """The k nearest images of each descriptor, nearest first; arguments and errors as for `Index.search`."""
        from .index import Hit, check_queries, class_numbers

        queries = check_queries(vectors, self.config['model']['dim'])
        if not 1 <= k <= _MOST_HITS:
            raise ValueError(f'k is {k}: ask for 1 to {_MOST_HITS:,} images.')
        if exact and self.index_type != 'FLAT':
            raise ValueError(
                f'{self.path} has an index of type {self.index_type}, which is not exact: leave --exact out.')
        chosen = ''
        if class_name is not None:
            class_numbers(self.config['model'], class_name, self.path)
            chosen = f'class_name == {json.dumps(class_name, ensure_ascii=False)}'
        # a few more, so that the order among equals, which Milvus leaves open, does not decide who is among the k
        with milvus_errors(f'{self.address} could not be searched'):
            found = self.client.search(
                self.address.collection, data=list(queries), limit=min(k + 16, _MOST_HITS), filter=chosen,
                output_fields=_FIELDS, search_params={'metric_type': 'IP'})
        hits = [[Hit(record.path, score, record) for record, score in map(_record, part)] for part in found]
        return [sorted(part, key=lambda hit: (-round(hit.score, 6), hit.path))[:k] for part in hits]

    def search_images(
            self,
            images: Sequence[str | os.PathLike | Image.Image],
            k: int = 10,
            crop: Sequence[float] | None = None,
            class_name: str | None = None,
            exact: bool = False,
    ) -> 'list[list[Hit]]':
        """As `Index.search_images`."""
        from .queries import embed_queries
        queries = embed_queries(self.model(), self.protocol(), images, crop).vectors
        return self.search(queries, k, class_name, exact)

    @property
    def index_type(self) -> str:
        """Milvus's kind of index; FLAT compares with every row."""
        return self.client.describe_index(self.address.collection, 'vector')['index_type']

    def close(self) -> None:
        """Let go of the connection or file."""
        self.client.close()


def _record(found: dict[str, Any]) -> tuple[Record, float]:
    fields = found['entity']
    check_json(fields, _ROW, 'a row of the collection')
    if any(len(pair) != 2 for pair in fields['classes']):
        raise ValueError('A row of the collection has classes that are not pairs of name and probability.')
    classes = tuple((str(name), float(probability)) for name, probability in fields['classes'])
    row = {**{name: fields[name] for name in _ROW}, 'path': path_from_text(fields['path']), 'classes': classes}
    return Record(**row), float(found['distance'])


def open_collection(name: str | os.PathLike) -> 'Index | MilvusIndex':
    """What a command searches in: an index folder, or with 'milvus:URI' a collection that an index was exported to."""
    from .index import Index
    return MilvusIndex(str(name)) if str(name).startswith(PREFIX) else Index(name)
