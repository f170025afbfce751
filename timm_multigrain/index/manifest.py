"""index.json: what an index folder holds, replaced in one step at every commit.

It is JSON whose first line is the SHA-256 of everything below it, so that any changed byte is noticed. It names the
committed extent of every file; a file is what its extent says and nothing else.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from timm_multigrain.files import check_json, fsync, open_regular, parse_json, printable, write_text
from timm_multigrain.version import __version__

from .blocks import Extent
from .errors import DamagedIndex

__all__ = ['FAISS_FILE', 'FORMAT', 'MANIFEST', 'Manifest', 'NewerFormat', 'is_index']

FORMAT = 1
MANIFEST = 'index.json'
FAISS_FILE = re.compile(r'faiss\.[0-9]{1,9}\.bin')
_EXTENT = {'size': int, 'crc32': str}
_FORM = {  # anybody can write a manifest with a checksum that is right
    'generation': int, 'config': str, 'files': {str: _EXTENT}, 'roots': [str],
    'faiss': ({'file': str, 'kind': str, 'rows': int, 'settings': {str: int}, 'extent': _EXTENT}, None)}
_FIRST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')


class NewerFormat(ValueError):
    """An index that a later version of the package has written."""


@dataclass(frozen=True)
class Manifest:
    """Committed state of an index.

    Attributes:
        generation: Counts the rewritings of the data files; their names end in it.
        config: SHA-256 of config.json.
        files: Extent of each data file by its name in the folder.
        roots: Indexed folders; relative ones are relative to the index folder.
        faiss: Structure for approximate search: its file, its kind, rows, settings and measured recall; None without.
    """
    generation: int
    config: str
    files: dict[str, Extent]
    roots: tuple[str, ...] = ()
    faiss: dict | None = field(default=None, repr=False)

    def write(self, folder: Path) -> None:
        """Put it in the place of the last one. It is on the disk when this returns."""
        body = json.dumps({
            'format': FORMAT, 'written_by': f'timm_multigrain {__version__}', 'generation': self.generation,
            'config': self.config, 'roots': self.roots, 'faiss': self.faiss,
            'files': {name: extent.to_json() for name, extent in self.files.items()},
        }, indent=1).removeprefix('{\n') + '\n'
        write_text(folder / MANIFEST, f'{{"sha256": "{hashlib.sha256(body.encode()).hexdigest()}",\n{body}')
        fsync(folder)

    @classmethod
    def read(cls, folder: Path) -> 'Manifest':
        """The manifest of an index folder.

        Raises:
            FileNotFoundError: The folder is not there or no index.
            DamagedIndex: It is not what was written.
            NewerFormat: A later version of the package wrote it.
        """
        path = folder / MANIFEST
        if not os.path.lexists(path):
            what = 'is no index' if folder.is_dir() else 'is not there'
            raise FileNotFoundError(f'{folder} {what}: make one with timm-multigrain index DIR -o {folder}')
        with open_regular(path) as file:
            data = file.readall()
        first = _FIRST_LINE.match(data)
        if not first or hashlib.sha256(data[first.end():]).hexdigest().encode() != first[1]:
            raise DamagedIndex(path, 'its checksum differs')
        try:
            value = parse_json(data)
            check_json(value, {'format': int, 'written_by': str}, 'it')
            if value['format'] != FORMAT:
                raise NewerFormat(f'{folder} has format {value["format"]}, written by {value["written_by"]}; this is '
                                  f'timm_multigrain {__version__}, which reads format {FORMAT}: update the package.')
            check_json(value, _FORM, 'it')
            _check_faiss(value['faiss'])
            files = {name: Extent.from_json(extent) for name, extent in value['files'].items()}
        except NewerFormat:
            raise
        except ValueError as e:
            raise DamagedIndex(path, str(e)) from e
        return cls(value['generation'], value['config'], files, tuple(value['roots']), value['faiss'])


def _check_faiss(faiss: dict | None) -> None:
    if faiss is None:
        return
    if not FAISS_FILE.fullmatch(faiss['file']):
        raise ValueError(f'{printable(faiss["file"])} is not a name of a file of an index')
    if 'candidates' not in faiss['settings'] or not faiss['settings'].keys() & {'probes', 'ef'}:
        raise ValueError('settings of the structure are missing')
    if min(faiss['rows'], *faiss['settings'].values()) < 1:
        raise ValueError('settings of the structure are below 1')


def is_index(folder: str | bytes | os.PathLike) -> bool:
    """Whether a folder is an index, damaged or not."""
    try:
        with open_regular(Path(os.fsdecode(folder)) / MANIFEST) as file:
            return _FIRST_LINE.match(file.read(80)) is not None
    except OSError:
        return False
