"""INRIA Holidays: 1491 photographs of 500 scenes, the first of each scene the query; mean average precision.

`Hamming embedding and weak geometric consistency for large scale image search`, Jégou, Douze, Schmid 2008. The query
itself is left out of its ranking. Many photographs lie on their side; results are quoted both for the files as they are
and for upright ones (`Neural codes for image retrieval`, Babenko et al. 2014): give the list of turns, or a folder of
turned files.
"""
import hashlib
import os
import re
from dataclasses import replace

from PIL import Image

from timm_multigrain.files import check_json, printable, read_json, read_lines
from timm_multigrain.images.sources import Entry, ImageSource
from timm_multigrain.measure.archives import RemoteFile

from .base import Benchmark, SetFolder, some
from .lists import Layout, ListBenchmark, Listing

# Photographs of scene 1000, 1001, ... to 1499, the query among them, as digits to the base 36.
_COUNTS = (
    '3223242223222255232222343222323355242323724233223335222222323232427524224222232327422222332222322232'
    '2223222332322222242242239232232222532222322235242422222233233222322442232342223242343222422242226522'
    '222222242222225222223343353a224262523222423332223223422224323332332693223244323232222322224232223232'
    '2324222232232234426223243c2223423222343242224564524523342433b4424628648423254632d64a2869466664574222'
    '2222242243223522254252232322222222222345252332255443423322434384633222243533433252422242233323225223'
)


def _read(folder: SetFolder) -> Listing:
    return Listing([Entry(f'{scene}{number:02}.jpg', instance=str(scene), split='gallery' if number else 'query')
                    for scene, count in enumerate(_COUNTS, 1000) for number in range(int(count, 36))])


class _Holidays(Layout):

    def load(self, data: str | os.PathLike, upright: str | os.PathLike | None = None,
             subset: bool = False) -> ListBenchmark:
        """As `Layout.load`; `upright` is a list of turns, see `read_turns`."""
        benchmark = super().load(data, subset)
        if upright is None:
            return benchmark
        turns, names = read_turns(upright), benchmark.database.names
        unknown = sorted(set(turns).difference(names))
        if unknown and not subset:
            raise ValueError(f'{upright} turns {len(unknown)} images that {self.name} does not have: {some(unknown)}.')
        return replace(benchmark, title=f'{benchmark.title}, upright', database=TurnedImages(
            benchmark.database, [turns.get(name, 0) for name in names]))


class TurnedImages(ImageSource):
    """Images of a source, each turned clockwise by a multiple of 90 degrees after it is read."""

    def __init__(self, source: ImageSource, degrees: list[int]):
        self.source, self.degrees, self.names = source, degrees, source.names

    def load(self, i: int, exif: bool = True) -> Image.Image:
        image = self.source.load(i, exif=exif)
        turn = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
        degrees = self.degrees[i] % 360
        return image.transpose(turn[degrees]) if degrees else image

    def fingerprint(self) -> str:
        return hashlib.sha256(f'{self.source.fingerprint()} {self.degrees}'.encode()).hexdigest()


def read_turns(path: str | os.PathLike) -> dict[str, int]:
    """Degrees to turn images clockwise by: a JSON object of names, or a text with a name and a number per line."""
    if os.fspath(path).endswith('.json'):
        entries = read_json(path)
        check_json(entries, {str: int}, str(path))
        entries = [(name, str(degrees)) for name, degrees in entries.items()]
    else:
        entries = [line.split() for line in read_lines(path, 'list of turns') if not line.startswith('#')]
    turns = {}
    for entry in entries:
        if len(entry) != 2 or not re.fullmatch(r'-?\d{1,9}', entry[1]) or int(entry[1]) % 90:
            raise ValueError(f'{path}: {printable(" ".join(entry))} is not a name and a multiple of 90 degrees.')
        turns[entry[0].rpartition('/')[2]] = int(entry[1])
    return turns


HOLIDAYS = _Holidays(
    'INRIA Holidays', 'its archives jpg1.tar.gz and jpg2.tar.gz are at https://lear.inrialpes.fr/~jegou/data.php',
    _read, ('mAP',), (500, 1491), Benchmark.published, 'jpg', tuple(RemoteFile(
        f'http://pascal.inrialpes.fr/data2/holidays/{file}') for file in ('jpg1.tar.gz', 'jpg2.tar.gz')))
