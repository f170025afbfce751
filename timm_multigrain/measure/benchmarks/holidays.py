"""INRIA Holidays: 1491 photographs of 500 scenes, the first of each scene the query; mean average precision.

`Hamming embedding and weak geometric consistency for large scale image search`, Jégou, Douze, Schmid 2008. The query
itself is left out of its ranking. Many photographs lie on their side; results are quoted both for the files as they are
and for upright ones (`Neural codes for image retrieval`, Babenko et al. 2014): give the list of turns, or a folder of
turned files.
"""
import hashlib
import os
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from timm_multigrain.files import check_json, read_json, read_lines
from timm_multigrain.images.sources import ImageFiles, ImageSource, printable
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import mean_average_precision

from .benchmark import Benchmark, Figure, Scores, SetFolder, some

__all__ = ['DOWNLOADS', 'Holidays', 'TurnedImages', 'load_holidays', 'read_turns']

TITLE = 'INRIA Holidays'
SOURCE = 'its archives jpg1.tar.gz and jpg2.tar.gz are at https://lear.inrialpes.fr/~jegou/data.php'
_ADDRESS = 'http://pascal.inrialpes.fr/data2/holidays'
DOWNLOADS = tuple(RemoteFile(f'{_ADDRESS}/{name}') for name in ('jpg1.tar.gz', 'jpg2.tar.gz'))

# Photographs of scene 1000, 1001, ... to 1499, the query among them, as digits to the base 36.
_COUNTS = (
    '3223242223222255232222343222323355242323724233223335222222323232427524224222232327422222332222322232'
    '2223222332322222242242239232232222532222322235242422222233233222322442232342223242343222422242226522'
    '222222242222225222223343353a224262523222423332223223422224323332332693223244323232222322224232223232'
    '2324222232232234426223243c2223423222343242224564524523342433b4424628648423254632d64a2869466664574222'
    '2222242243223522254252232322222222222345252332255443423322434384633222243533433252422242233323225223'
)
FIRST_SCENE = 1000


@dataclass(frozen=True, eq=False)
class Holidays(Benchmark):
    """The set; `scenes` has the scene of each image of the database."""
    scenes: np.ndarray = None

    def measure(self, scores: Scores) -> list[Figure]:
        relevant = [np.setdiff1d(np.flatnonzero(self.scenes == self.scenes[row]), [row]) for row in self.query_rows]
        result = mean_average_precision(scores, relevant, [[row] for row in self.query_rows])
        return [Figure('mAP', 100 * result.map)]


class TurnedImages(ImageSource):
    """Images of a source, each turned clockwise by a multiple of 90 degrees after it is read."""

    def __init__(self, source: ImageSource, degrees: list[int]):
        self.source = source
        self.degrees = degrees
        self.names = source.names

    def load(self, i: int, exif: bool = True) -> Image.Image:
        image = self.source.load(i, exif=exif)
        turn = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
        degrees = self.degrees[i] % 360
        return image.transpose(turn[degrees]) if degrees else image

    def fingerprint(self) -> str:
        return hashlib.sha256(f'{self.source.fingerprint()} {self.degrees}'.encode()).hexdigest()


def load_holidays(data: str | os.PathLike, upright: str | os.PathLike | None = None,
                  subset: bool = False) -> Holidays:
    """INRIA Holidays in a folder, in jpg/ or anywhere below it.

    Args:
        data: The folder.
        upright: List of turns, see `read_turns`.
        subset: Use the complete scenes instead of asking for all of them.

    Raises:
        FileNotFoundError: Images are missing.
        ValueError: The list of turns names other images, or no scene is whole.
    """
    data = SetFolder(data, TITLE, SOURCE)
    scenes = [[f'{FIRST_SCENE + scene}{number:02}.jpg' for number in range(int(count, 36))]
              for scene, count in enumerate(_COUNTS)]
    title = TITLE
    if subset:
        there = {name.rpartition('/')[2] for name in data.names}
        scenes = [scene for scene in scenes if there.issuperset(scene)]
        if not scenes:
            raise ValueError(f'{data.path} has no whole scene of {TITLE}; {SOURCE}.')
        title += f' ({len(scenes)} of its scenes)'
    names = [name for scene in scenes for name in scene]
    source = ImageFiles(data.locate(names, prefer='jpg'), names=names)
    if upright is not None:
        turns = read_turns(upright)
        unknown = sorted(set(turns).difference(names))
        if unknown and not subset:
            raise ValueError(f'{upright} turns {len(unknown)} images that {TITLE} does not have: {some(unknown)}.')
        source = TurnedImages(source, [turns.get(name, 0) for name in names])
        title += ', upright'
    numbers = np.array([int(name.partition('.')[0]) for name in names])
    return Holidays(title=title, database=source, query_rows=np.flatnonzero(numbers % 100 == 0), scenes=numbers // 100)


def read_turns(path: str | os.PathLike) -> dict[str, int]:
    """Degrees to turn images clockwise by: a JSON object of names, or a text with a name and a number per line.

    Raises:
        FileNotFoundError: File not found.
        ValueError: A line of another form, a name twice, or a turn that is not a multiple of 90.
    """
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
        name = entry[0].rpartition('/')[2]
        if name in turns:
            raise ValueError(f'{path} names {printable(name)} twice.')
        turns[name] = int(entry[1])
    return turns
