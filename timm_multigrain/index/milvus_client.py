"""Access to Milvus: the address of a collection, its schema, errors as sentences, and paths as text it can hold."""
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes, unquote_to_bytes

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ['PREFIX', 'MilvusAddress', 'create_collection', 'milvus_errors', 'path_from_text', 'path_to_text']

PREFIX = 'milvus:'
DEFAULT_COLLECTION = 'multigrain'
_BYTES = 'bytes:'  # marks a path in percent encoding


@dataclass(frozen=True)
class MilvusAddress:
    """A collection of a server or cluster, or of a local file that milvus-lite keeps.

    Attributes:
        uri: http(s)://HOST:PORT[/DATABASE], or the path of a local NAME.db.
        collection: Name of the collection.
    """
    uri: str
    collection: str = DEFAULT_COLLECTION

    @classmethod
    def parse(cls, text: str) -> 'MilvusAddress':
        """The address of 'milvus:URI' or 'milvus:URI#COLLECTION'.

        Raises:
            ValueError: It is none.
        """
        uri, _, collection = text.removeprefix(PREFIX).partition('#')
        collection = collection or DEFAULT_COLLECTION
        if not text.startswith(PREFIX) or not uri or ('://' not in uri and not uri.endswith('.db')):
            raise ValueError(f'{text!r} is no address of Milvus: give milvus:http://HOST:19530, or milvus:FILE.db for '
                             'a local file, and #COLLECTION behind it if the collection has another name than '
                             f'{DEFAULT_COLLECTION}.')
        if not re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]{0,254}', collection):
            raise ValueError(f'{collection!r} is no name of a collection: take letters, digits and _, a letter first.')
        return cls(uri, collection)

    def __str__(self) -> str:
        return f'{PREFIX}{self.uri}#{self.collection}'

    @property
    def local(self) -> bool:
        """Whether it is a file here."""
        return '://' not in self.uri

    def connect(self, token: str | None = None, create: bool = False) -> 'MilvusClient':
        """A client of the server, or of the local file.

        Args:
            token: 'USER:PASSWORD' or a key; None: the environment variable MILVUS_TOKEN.
            create: Make the local file if it is not there.

        Raises:
            FileNotFoundError: There is no local file or no folder for it.
            ImportError: The client is not installed.
            RuntimeError: The server cannot be reached, or another process has the file open.
        """
        if self.local:
            path = Path(self.uri)
            if not path.parent.is_dir() or not (create or path.exists()):
                missing = path if path.parent.is_dir() else path.parent
                raise FileNotFoundError(f'{missing} is not there: check the address {self}.')
        client_class = _import()
        token = token or os.environ.get('MILVUS_TOKEN', '')
        uri = str(Path(self.uri).absolute()) if self.local else self.uri
        why = ('is it open in another process, or something else than a database of milvus-lite?' if self.local else
               'check the address, the network and the token (MILVUS_TOKEN)')
        with milvus_errors(f'{self.uri} could not be opened', why):
            return client_class(uri, token=token)


def _import() -> 'type[MilvusClient]':
    try:
        from pymilvus import MilvusClient
    except ImportError as e:
        raise ImportError("Milvus needs its client: pip install 'timm_multigrain[milvus]'") from e
    logging.getLogger('pymilvus').setLevel(logging.CRITICAL)  # it logs every error that it raises, with a traceback
    return MilvusClient


@contextmanager
def milvus_errors(what: str, remedy: str = 'run the same again') -> Iterator[None]:
    """Turn the client's errors into a sentence.

    Raises:
        RuntimeError: Whatever the client reports.
    """
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as e:
        said = ' '.join(str(e.message).split()).rstrip('. ')
        raise RuntimeError(f'{what} ({said or type(e).__name__}): {remedy}.') from e


def create_collection(client: 'MilvusClient', name: str, dim: int, index_type: str, properties: dict[str, str]) -> None:
    """An empty collection for the rows of an index; similarity is the inner product of unit vectors."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field('id', DataType.VARCHAR, is_primary=True, max_length=32)
    schema.add_field('vector', DataType.FLOAT_VECTOR, dim=dim)
    for field in ('width', 'height', 'bytes', 'mtime_ns'):
        schema.add_field(field, DataType.INT64)
    for field, length in (('path', 16384), ('sha256', 64), ('class_name', 1024), ('version', 32)):
        schema.add_field(field, DataType.VARCHAR, max_length=length)
    schema.add_field('classes', DataType.JSON)
    params = client.prepare_index_params()
    params.add_index('vector', index_type=index_type, metric_type='IP')
    client.create_collection(
        name, schema=schema, index_params=params, consistency_level='Strong', properties=properties)


def path_to_text(path: str) -> str:
    """A path as Unicode that any store takes; one whose bytes are not UTF-8 is percent-encoded, and marked."""
    try:
        path.encode('utf-8')
    except UnicodeEncodeError:
        return _BYTES + quote_from_bytes(os.fsencode(path))
    return _BYTES + quote_from_bytes(os.fsencode(path)) if path.startswith(_BYTES) else path


def path_from_text(text: str) -> str:
    """The path that `path_to_text` was given."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_BYTES))) if text.startswith(_BYTES) else text
