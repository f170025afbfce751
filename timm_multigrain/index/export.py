"""Export of an index, to Milvus or to a Parquet file, by the form of the target."""
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .milvus import MilvusExport
    from .parquet import ParquetExport

__all__ = ['export_index']


def export_index(
        index: str | os.PathLike,
        target: str,
        *,
        mirror: bool = False,
        index_type: str | None = None,
        batch_size: int = 1000,
        progress: bool = True,
) -> 'MilvusExport | ParquetExport':
    """Export an index folder.

    Args:
        index: The folder.
        target: 'milvus:URI#COLLECTION', or a file that ends in '.parquet'.
        mirror: See `export_milvus`.
        index_type: See `export_milvus`.
        batch_size: See `export_milvus`.
        progress: Show a bar.

    Raises:
        ValueError: The target is neither, or as `export_milvus`.
        OSError, RuntimeError, ImportError: As `export_milvus` and `export_parquet`.
    """
    from .index import Index
    from .milvus_client import PREFIX, MilvusAddress

    if target.startswith(PREFIX):
        from .milvus import export_milvus
        address = MilvusAddress.parse(target)
        return export_milvus(Index.open(index), address, mirror=mirror, index_type=index_type, batch_size=batch_size,
                             progress=progress)
    if target.endswith('.parquet'):
        from .parquet import export_parquet
        return export_parquet(Index.open(index), target, progress)
    raise ValueError(f'{target!r} is no target: give milvus:URI or a file that ends in .parquet.')
