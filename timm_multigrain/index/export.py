"""Export of an index, one row per image: to Milvus, the distributed vector engine, where it can be searched, or to a
Parquet file, for pandas, DuckDB, Spark and the like.

One client talks to a cluster of Milvus and to milvus-lite, which keeps collections in a local file. The key of a row is
the hash of its path, so exporting again changes what has changed and goes on where it stopped.
"""
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
from tqdm import tqdm

from timm_multigrain.extras import extra
from timm_multigrain.files import check_json, counted, parse_json, replacing

from .index import Collection, Hit, Index
from .records import OtherModel, Record

if TYPE_CHECKING:
    from pymilvus import MilvusClient

PREFIX = 'milvus:'
PROPERTY = 'multigrain'  # of a collection: the model and the preprocessing as JSON
METADATA = b'timm_multigrain'  # of a Parquet file: the same, and the versions
FLAT_UP_TO = 1_000_000  # rows for which comparing with every one, which is exact, is the default
ROWS = 8192  # of a row group of Parquet
_BYTES = 'bytes:'  # marks a path in percent encoding
_CONFIG = {
    'model': {'source': str, 'options': {}, 'weights_sha256': str, 'pool': (str, None), 'dim': int, 'num_classes': int,
              'label_names': ([str], None)},
    'protocol': {}}
_ROW = {'path': str, 'width': int, 'height': int, 'bytes': int, 'mtime_ns': int, 'sha256': str,
        'classes': [[(str, float)]]}


def parse_address(text: str) -> tuple[str, str]:
    """URI and collection of 'milvus:URI' or 'milvus:URI#COLLECTION'; ValueError if it is not an address."""
    uri, _, collection = text.removeprefix(PREFIX).partition('#')
    if not text.startswith(PREFIX) or not uri or ('://' not in uri and not uri.endswith('.db')):
        raise ValueError(f'{text!r} is not an address of Milvus: give milvus:http://HOST:19530, or milvus:FILE.db for '
                         'a local file, and #COLLECTION behind it if its name is not multigrain.')
    collection = collection or 'multigrain'
    if not re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]{0,254}', collection):  # of a cluster; a local file takes others, too
        raise ValueError(f'{collection!r} is not a name of a collection: take letters, digits and _, a letter first.')
    return uri, collection


def _connect(uri: str, create: bool) -> 'MilvusClient':
    """A client of the server, with the token in MILVUS_TOKEN, or of the local file."""
    why = 'check the address, the network and the token (MILVUS_TOKEN)'
    if '://' not in uri:
        why, path = 'is it open in another process, or not a database of milvus-lite?', Path(uri).absolute()
        uri, needed = str(path), path.parent if create else path
        if not needed.exists():
            raise FileNotFoundError(f'{needed} was not found: check the address.')
    with extra('milvus', 'Milvus'):
        from pymilvus import MilvusClient
    logging.getLogger('pymilvus').setLevel(logging.CRITICAL)  # it logs each error that it raises, with a traceback
    with _errors(f'{uri} could not be opened', why):
        return MilvusClient(uri, token=os.environ.get('MILVUS_TOKEN', ''))


@contextmanager
def _errors(what: str, remedy: str = 'run the same again') -> Iterator[None]:
    """The client's errors as a RuntimeError of one sentence."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as e:
        said = ' '.join(str(e.message).split()).rstrip('. ')
        raise RuntimeError(f'{what} ({said or type(e).__name__}): {remedy}.') from e


@dataclass(frozen=True)
class Export:
    """What an export has done: images written, found unchanged, removed, and left there of other indexes."""
    target: str | os.PathLike
    written: int
    unchanged: int
    removed: int = 0
    others: int = 0

    def __str__(self) -> str:
        text = f'{self.target}: {counted(self.written, "image")} written, {self.unchanged:,} already there'
        text += f', {self.removed:,} removed' if self.removed else ''
        return text if not self.others else f'{text}; it also has {self.others:,} that are not in this index'


def export_index(index: str | os.PathLike, target: str, progress: bool = True, **options: Any) -> Export:
    """Export an index folder to 'milvus:URI#COLLECTION', or to a file that ends in '.parquet'.

    Options are those of `export_milvus`, of no use to a Parquet file; so are the errors, and those of `export_parquet`.
    """
    if target.startswith(PREFIX):
        return export_milvus(Index(index), target, progress=progress, **options)
    if target.endswith('.parquet'):
        return export_parquet(Index(index), target, progress)
    raise ValueError(f'{target!r} is not a target: give milvus:URI or a file that ends in .parquet.')


def export_parquet(index: Index, path: str | os.PathLike, progress: bool = True) -> Export:
    """Write an index to a Parquet file, which appears whole or not at all; one that is up to date is left alone.

    The columns are path, vector (a list of D float32), width, height, bytes, mtime_ns, sha256, and classes (a list of
    name and probability). A path whose bytes are not UTF-8 is 'bytes:' and percent encoding. The metadata of the schema
    has under 'timm_multigrain' the model, the preprocessing and the versions as JSON.
    """
    with extra('parquet', 'Parquet'):
        import pyarrow as pa
        import pyarrow.parquet as pq

    # the totals have the sums of the checksums of the index, so that its states can be distinguished
    about = json.dumps({'config': index.store.config, 'totals': index.store.state['totals']}, sort_keys=True).encode()
    classes = pa.list_(pa.struct([('name', pa.string()), ('probability', pa.float32())]))
    schema = pa.schema([
        ('path', pa.string()), ('vector', pa.list_(pa.float32(), index.vectors.shape[1])), ('width', pa.int32()),
        ('height', pa.int32()), ('bytes', pa.int64()), ('mtime_ns', pa.int64()), ('sha256', pa.string()),
        ('classes', classes)], metadata={METADATA: about})
    path = Path(path)
    try:
        there = pq.read_metadata(path).metadata
    except (OSError, pa.ArrowException):
        there = None
    if there and there.get(METADATA) == about:
        return Export(path, 0, len(index))
    with replacing(path) as unfinished, pq.ParquetWriter(
            unfinished, schema, compression='zstd', use_dictionary=False) as writer:
        for start in tqdm(range(0, len(index), ROWS), unit='group', desc='export', disable=not progress or None):
            writer.write_table(pa.Table.from_pylist(list(_rows(index, start, min(start + ROWS, len(index)))), schema))
    return Export(path, len(index), 0)


def export_milvus(
        index: Index, address: str, *, mirror: bool = False, batch_size: int = 1000,
        progress: bool = True) -> Export:
    """Send an index to a collection of Milvus, which is created if it does not exist.

    Args:
        address: 'milvus:URI#COLLECTION'.
        mirror: Remove the rows of images that are not in this index.
        batch_size: Rows sent at once.

    Raises:
        OtherModel: The collection has descriptors of another model or another preprocessing.
        RuntimeError: What Milvus reports. What was sent stays, and the next run goes on from there.
        FileNotFoundError, ImportError, ValueError: As `MilvusIndex`.
    """
    uri, name = parse_address(address)
    client, written, removed = _connect(uri, create=True), 0, 0
    with closing(client), _errors(f'{address} could not be written to'):
        if client.has_collection(name):
            there, own = _read_config(client, uri, name), _config(index)
            for what in ('protocol', 'dim', 'weights_sha256', 'pool'):
                a, b = (config.get(what, config['model'].get(what)) for config in (there, own))
                if a != b:
                    raise OtherModel(f'{address} has descriptors made with another model or preprocessing (its {what}: '
                                     f'{a}, here {b}): name another collection with #NAME.')
        else:
            _create(client, name, index)
        client.load_collection(name)  # a killed process may have left it released
        for first in tqdm(range(0, len(index), batch_size), 'export', unit='batch', disable=not progress or None):
            rows = list(_rows(index, first, min(first + batch_size, len(index))))
            there = client.get(name, ids=[row['id'] for row in rows], output_fields=['version'])
            versions = {row['id']: row['version'] for row in there}
            changed = [row for row in rows if versions.get(row['id']) != row['version']]
            if changed:
                client.upsert(name, changed)
            written += len(changed)
        if mirror:
            others, own = [], set(map(_key, index.paths))
            pages = client.query_iterator(name, batch_size=batch_size, output_fields=['id'])
            while page := pages.next():
                others += [row['id'] for row in page if row['id'] not in own]
            pages.close()
            for first in range(0, len(others), batch_size):
                client.delete(name, ids=others[first:first + batch_size])
            removed = len(others)
        client.flush(name)
        others = _count(client, name) - len(index)
    return Export(address, written, len(index) - written, removed, others)


def _config(index: Index) -> dict[str, Any]:
    """What a collection keeps of the index it was made from."""
    model = dict(index.config['model'])
    if model['source'] is None:
        model.update(source=os.path.abspath(index.path / 'model'), options={})
    return {'model': model, 'protocol': index.config['protocol']}


def _create(client: 'MilvusClient', name: str, index: Index) -> None:
    """An empty collection; similarity is the inner product of unit vectors."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field('id', DataType.VARCHAR, is_primary=True, max_length=32)
    schema.add_field('vector', DataType.FLOAT_VECTOR, dim=index.vectors.shape[1])
    for field in ('width', 'height', 'bytes', 'mtime_ns'):
        schema.add_field(field, DataType.INT64)
    for field, length in (('path', 16384), ('sha256', 64), ('class_name', 1024), ('version', 32)):
        schema.add_field(field, DataType.VARCHAR, max_length=length)
    schema.add_field('classes', DataType.JSON)
    params = client.prepare_index_params()
    params.add_index('vector', index_type='FLAT' if len(index) <= FLAT_UP_TO else 'AUTOINDEX', metric_type='IP')
    client.create_collection(name, schema=schema, index_params=params, consistency_level='Strong',
                             properties={PROPERTY: json.dumps(_config(index))})


def _read_config(client: 'MilvusClient', uri: str, name: str) -> dict[str, Any]:
    if not client.has_collection(name):
        known = ', '.join(sorted(client.list_collections())) or 'none'
        raise FileNotFoundError(f'{uri} does not have a collection {name} (it has: {known}): put one there with '
                                f'timm-multigrain export INDEX -o {PREFIX}{uri}#{name}')
    try:
        config = parse_json(client.describe_collection(name)['properties'][PROPERTY])
        check_json(config, _CONFIG, PROPERTY)
        return config
    except (KeyError, ValueError) as e:
        raise ValueError(f'{name} in {uri} was not made by timm-multigrain export: name another collection with '
                         '#NAME.') from e


def _rows(index: Index, start: int, stop: int) -> Iterator[dict[str, Any]]:
    for i, vector in enumerate(np.asarray(index.vectors[start:stop], dtype=np.float32), start):
        record = index.records(i)
        fields = {**{name: getattr(record, name) for name in _ROW}, 'path': path_to_text(record.path),
                  'class_name': record.classes[0][0] if record.classes else '', 'classes': list(record.classes)}
        version = hashlib.sha256(json.dumps(fields).encode() + vector.tobytes()).hexdigest()[:32]
        yield {'id': _key(record.path), 'vector': vector, 'version': version, **fields}


def path_to_text(path: str) -> str:
    """A path as Unicode; one whose bytes are not UTF-8 is percent-encoded, and marked."""
    plain = not any('\udc80' <= c <= '\udcff' for c in path)
    return path if plain and not path.startswith(_BYTES) else _BYTES + quote_from_bytes(os.fsencode(path))


def path_from_text(text: str) -> str:
    """The path that `path_to_text` was given."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_BYTES))) if text.startswith(_BYTES) else text


def _key(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def _count(client: 'MilvusClient', collection: str) -> int:
    return int(client.query(collection, filter='', output_fields=['count(*)'])[0]['count(*)'])


class MilvusIndex(Collection):
    """A collection that an index was exported to, to be searched like the index; address: 'milvus:URI#COLLECTION'."""

    def __init__(self, address: str):
        uri, self.collection = parse_address(address)
        self.path, self.client = address, _connect(uri, create=False)
        with _errors(f'{address} could not be read'):
            self.config = _read_config(self.client, uri, self.collection)
            self.client.load_collection(self.collection)

    def __len__(self) -> int:
        return _count(self.client, self.collection)

    def hits(self, vectors, k: int = 10, class_name: str | None = None, exact: bool = False, report=None,
             **others) -> list[list[Hit]]:
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f'A collection in Milvus has whole pictures, and is not re-ranked: leave {given[0]} out, '
                             'or search the index that it was exported from.')
        queries, _ = self._check(vectors, k, class_name)
        kind = self.client.describe_index(self.collection, 'vector')['index_type'] if exact else 'FLAT'
        if kind != 'FLAT':
            raise ValueError(f'{self.path} has an index of type {kind}, which is not exact: leave --exact out.')
        chosen = '' if class_name is None else f'class_name == {json.dumps(class_name, ensure_ascii=False)}'
        # a few more, so that the order among equals, which Milvus leaves open, does not decide who is among the k
        with _errors(f'{self.path} could not be searched'):
            found = self.client.search(
                self.collection, data=list(queries), limit=k + 16, filter=chosen,
                output_fields=list(_ROW), search_params={'metric_type': 'IP'})
        hits = [[Hit(record.path, score, record) for record, score in map(_record, part)] for part in found]
        return [sorted(part, key=lambda hit: (-round(hit.score, 6), hit.path))[:k] for part in hits]


def _record(found: dict[str, Any]) -> tuple[Record, float]:
    fields = found['entity']
    check_json(fields, _ROW, 'a row of the collection')
    if any(len(pair) != 2 for pair in fields['classes']):
        raise ValueError('A row of the collection has classes that are not pairs of name and probability.')
    classes = tuple((str(name), float(probability)) for name, probability in fields['classes'])
    fields = {name: fields[name] for name in _ROW}
    return Record(**{**fields, 'path': path_from_text(fields['path']), 'classes': classes}), float(found['distance'])


def open_collection(name: str | os.PathLike) -> Index | MilvusIndex:
    """What a command searches in: an index folder, or with 'milvus:URI' a collection that an index was exported to."""
    return MilvusIndex(str(name)) if str(name).startswith(PREFIX) else Index(name)
