"""Export of an index: to Milvus, or to a Parquet file, one row per image, for pandas, DuckDB, Spark and the like."""
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from timm_multigrain.extras import extra
from timm_multigrain.files import replacing

from .index import Index
from .milvus import PREFIX, Export, export_milvus
from .records import path_to_text

METADATA = b'timm_multigrain'
ROWS = 8192  # of a row group


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
    try:
        with replacing(path) as unfinished, pq.ParquetWriter(
                unfinished, schema, compression='zstd', use_dictionary=False) as writer:
            for start in tqdm(range(0, len(index), ROWS), unit='group', desc='export', disable=not progress or None):
                writer.write_table(pa.table(_columns(index, start, min(start + ROWS, len(index))), schema=schema))
    except OSError as e:
        raise OSError(f'{path} could not be written ({e}): free space there, or name another file.') from e
    return Export(path, len(index), 0)


def _columns(index: Index, start: int, stop: int) -> dict[str, Any]:
    import pyarrow as pa

    records = [index.records(row) for row in range(start, stop)]
    vectors = np.ascontiguousarray(index.vectors[start:stop], dtype=np.float32)
    columns: dict[str, Any] = {name: [getattr(record, name) for record in records]
                               for name in ('width', 'height', 'bytes', 'mtime_ns', 'sha256')}
    return {**columns, 'path': [path_to_text(record.path) for record in records],
            'vector': pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            'classes': [[{'name': n, 'probability': p} for n, p in record.classes] for record in records]}
