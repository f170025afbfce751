"""Space that an index no longer needs: what killed writers left, and what was removed from it."""
import json
import os
import re
from pathlib import Path

import numpy as np

from timm_multigrain.files import fsync

from .blocks import Extent, GrowingFile
from .manifest import Manifest
from .store import DATA_FILES, Store, StoreWriter

__all__ = ['compact', 'compact_if_worthwhile', 'delete_leftovers']

_OWN_FILE = re.compile(rf'(?:{"|".join(DATA_FILES)})\.\d+\.bin|faiss\.\d+\.bin|\.(?:index|config)\.json-[0-9a-f]{{8}}'
                       r'|\.faiss\..*')
REMOVED_SHARE = 0.25  # of the records that are removed when the files are written anew


def delete_leftovers(writer: StoreWriter) -> None:
    """Delete files that the manifest does not name. The lock must be held."""
    manifest = writer.manifest
    named = {f'{name}.{manifest.generation}.bin' for name in DATA_FILES}
    if manifest.faiss:
        named.add(manifest.faiss['file'])
    for path in writer.folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.name not in named:
            path.unlink()


def compact_if_worthwhile(folder: Path) -> bool:
    """`compact` once a quarter of the records holds no more. The lock must be held."""
    store = Store(folder)
    removed = len(store.all_records) - len(store.rows)
    if removed <= REMOVED_SHARE * len(store.all_records):
        return False
    compact(store)
    return True


def compact(store: Store) -> None:
    """Write the files anew without what was removed. Readers that have the index open keep what they see.

    Raises:
        OSError: No room; the index is as it was.
    """
    folder, generation = store.folder, store.manifest.generation + 1
    files = {name: GrowingFile(folder / f'{name}.{generation}.bin', Extent()) for name in DATA_FILES}
    try:
        _copy(store, files)
        extents = {name: file.sync() for name, file in files.items()}
        fsync(folder)
        Manifest(generation, store.manifest.config, extents, store.manifest.roots).write(folder)
    except OSError:
        for file in files.values():
            file.path.unlink(missing_ok=True)
        raise
    finally:
        for file in files.values():
            file.close()
    for name in DATA_FILES:
        (folder / f'{name}.{generation - 1}.bin').unlink()
    if store.manifest.faiss:
        (folder / store.manifest.faiss['file']).unlink(missing_ok=True)


def _copy(store: Store, files: dict[str, GrowingFile], step: int = 4096) -> None:
    for start in range(0, len(store.rows), step):
        records = store.records[start:start + step].copy()
        paths = [store.relative_path(record) for record in records]
        files['vectors'].append(store.vectors_at(records['vector'].astype(np.int64)))
        ends = np.cumsum([len(path) for path in paths])
        records['path_offset'] = files['paths'].size + np.concatenate([[0], ends[:-1]])
        records['vector'] = np.arange(start, start + len(records))
        files['paths'].append(b''.join(paths))
        files['records'].append(records)
    for path, entry in store.skipped.items():
        files['skipped'].append(json.dumps({'path': os.fsdecode(path), **entry}).encode() + b'\n')

