"""Photographs in groups of the same scene or object: your own folders, INRIA Holidays, UKBench."""
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from timm_multigrain.files import check_json, printable, read_json, read_lines
from timm_multigrain.images.sources import ImageFiles, ImageSource
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import mean_average_precision, ukb_score

from .base import Benchmark, Figure, Scores, SetFolder, part_of, some

DISTRACTOR, IGNORED = -1, -2
TRUTH = 'gt.json'


@dataclass(frozen=True, eq=False)
class Groups(Benchmark):
    """Your own images: one group per image; every image of a group of two or more is a query, itself left out; mAP.

    `groups` has the group of each image, -1 for a distractor.
    """
    groups: np.ndarray = None

    name, source, published = 'an image set', 'give a folder of images', {}

    def measure(self, scores: Scores) -> list[Figure]:
        return [Figure('mAP', 100 * float(self.average_precisions(scores).mean()))]

    @property
    def query_groups(self) -> np.ndarray:
        """Group of each query, (Q,) integers."""
        return self.groups[self.query_rows]

    def average_precisions(self, scores: Scores) -> np.ndarray:
        """Average precision of each query, (Q,) float64 in [0, 1]; scores as of `measure`."""
        members = {group: np.flatnonzero(self.groups == group) for group in np.unique(self.groups)}
        relevant = [np.setdiff1d(members[self.groups[row]], [row]) for row in self.query_rows]
        return mean_average_precision(scores, relevant, [[row] for row in self.query_rows]).ap

    @classmethod
    def load(cls, data: str | os.PathLike, ground_truth: str | os.PathLike | None = None,
             subset: bool = False) -> 'Groups':
        """Images of a folder in groups, which are subfolders, DIR/<group>/<image>, or in a file.

        Args:
            ground_truth: JSON object of paths, relative to the file's own folder, and the numbers of their groups, -1
                for a distractor, -2 for an image to leave out; what lies outside of `data` is passed over. None:
                gt.json of the folder, if there is one, or else the subfolders.
            subset: Leave out images that the file names and that are not there.
        """
        images = SetFolder(data, cls)
        data = images.path
        if ground_truth is None and (data / TRUTH).is_file():
            ground_truth = data / TRUTH
        names, groups = _from_folders(images) if ground_truth is None else _from_file(
            data, Path(ground_truth), subset)
        found, counts = np.unique(groups[groups != DISTRACTOR], return_counts=True)
        rows = np.flatnonzero(np.isin(groups, found[counts > 1]))
        if not len(rows):
            raise ValueError(f'{data} has no two images of one group: give two or more of each thing.')
        return cls(data.resolve().name or str(data), images.files(names), query_rows=rows, groups=groups)


def _from_folders(images: SetFolder) -> tuple[list[str], np.ndarray]:
    names, data = images.names, images.path
    loose = [name for name in names if '/' not in name]
    if loose:
        raise ValueError(f'{data} holds images outside of groups ({some(loose)}): put each into {data}/<group>/, or '
                         f'say the groups in {TRUTH}.')
    folders = [name.rpartition('/')[0] for name in names]
    return names, np.unique(np.array(folders, dtype=str), return_inverse=True)[1]


def _from_file(data: Path, path: Path, subset: bool) -> tuple[list[str], np.ndarray]:
    content = read_json(path)
    check_json(content, {str: int}, str(path))
    wrong = next((name for name, group in content.items() if group < IGNORED), None)
    if wrong is not None:
        raise ValueError(f'{path}: the group of {printable(wrong)} is {content[wrong]}, and has to be at least 0, or '
                         f'{DISTRACTOR} for a distractor or {IGNORED} for an image to leave out.')
    inside, base = {}, data.resolve()
    for name, group in content.items():
        image = Path(os.path.normpath(path.resolve().parent / name))
        if group != IGNORED and image.is_relative_to(base):
            inside[image.relative_to(base).as_posix()] = group
    missing = [name for name in inside if not (data / name).is_file()]
    if subset:
        inside, missing = {name: group for name, group in inside.items() if name not in set(missing)}, []
    if missing or not inside:
        raise FileNotFoundError(f'{data} lacks {len(missing)} of the {len(inside)} images that {path} names there'
                                + (f': {some(missing)}.' if missing else '.'))
    names = sorted(inside)
    return names, np.array([inside[name] for name in names])


_HOLIDAYS = 'http://pascal.inrialpes.fr/data2/holidays'
# Photographs of scene 1000, 1001, ... to 1499, the query among them, as digits to the base 36.
_COUNTS = (
    '3223242223222255232222343222323355242323724233223335222222323232427524224222232327422222332222322232'
    '2223222332322222242242239232232222532222322235242422222233233222322442232342223242343222422242226522'
    '222222242222225222223343353a224262523222423332223223422224323332332693223244323232222322224232223232'
    '2324222232232234426223243c2223423222343242224564524523342433b4424628648423254632d64a2869466664574222'
    '2222242243223522254252232322222222222345252332255443423322434384633222243533433252422242233323225223'
)


@dataclass(frozen=True, eq=False)
class Holidays(Groups):
    """INRIA Holidays: 1491 photographs of 500 scenes, the first of each scene the query; mean average precision.

    `Hamming embedding and weak geometric consistency for large scale image search`, Jégou, Douze, Schmid 2008. The
    query itself is left out of its ranking. Many photographs lie on their side; results are quoted both for the files
    as they are and for upright ones (`Neural codes for image retrieval`, Babenko et al. 2014): give the list of turns,
    or a folder of turned files.
    """
    name, published = 'INRIA Holidays', Benchmark.published
    source = 'its archives jpg1.tar.gz and jpg2.tar.gz are at https://lear.inrialpes.fr/~jegou/data.php'
    downloads = tuple(RemoteFile(f'{_HOLIDAYS}/{file}') for file in ('jpg1.tar.gz', 'jpg2.tar.gz'))

    @classmethod
    def load(cls, data: str | os.PathLike, upright: str | os.PathLike | None = None,
             subset: bool = False) -> 'Holidays':
        """INRIA Holidays in a folder, in jpg/ or anywhere below it.

        Args:
            upright: List of turns, see `read_turns`.
            subset: Use the photographs that are there, and the queries that have another one of their scene.
        """
        data, title = SetFolder(data, cls), cls.name
        names = [f'{scene}{number:02}.jpg' for scene, count in enumerate(_COUNTS, 1000)
                 for number in range(int(count, 36))]
        if subset:
            there = data.find(names, prefer='jpg')
            names = [name for name in names if name in there]
        numbers = np.array([int(name.partition('.')[0]) for name in names], dtype=np.int64)
        scenes, counts = np.unique(numbers // 100, return_counts=True)
        rows = np.flatnonzero((numbers % 100 == 0) & np.isin(numbers // 100, scenes[counts > 1]))
        if not len(rows):
            raise ValueError(f'{data.path} has no query of {title} with an image to find; {cls.source}.')
        if len(rows) < len(_COUNTS):
            title = part_of(title, len(rows), len(names))
        source = ImageFiles(data.locate(names, prefer='jpg'), names=names)
        if upright is not None:
            turns = read_turns(upright)
            unknown = sorted(set(turns).difference(names))
            if unknown and not subset:
                raise ValueError(f'{upright} turns {len(unknown)} images that {title} does not have: {some(unknown)}.')
            source = TurnedImages(source, [turns.get(name, 0) for name in names])
            title += ', upright'
        return cls(title, source, query_rows=rows, groups=numbers // 100)


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


@dataclass(frozen=True, eq=False)
class UKBench(Groups):
    """UKBench: 10,200 photographs of 2550 objects, four of each; how many of the four are among the first four.

    `Scalable recognition with a vocabulary tree`, Nistér and Stewénius 2006. Every photograph is a query and stays in
    its own ranking, so that the score (N-S, 4 at best) starts at 1 for any system.
    """
    name, published = 'UKBench', Benchmark.published
    source = 'it is ukbench.zip at https://archive.org/details/ukbench'
    downloads = (RemoteFile('https://archive.org/download/ukbench/ukbench.zip'),)
    num_images = 10_200

    def measure(self, scores: Scores) -> list[Figure]:
        return [Figure('N-S', ukb_score(scores, self.groups))]

    @classmethod
    def load(cls, data: str | os.PathLike, subset: bool = False) -> 'UKBench':
        """UKBench in a folder, in full/ or anywhere below it.

        With `subset` the objects of which all four photographs are there.
        """
        data, title, numbers = SetFolder(data, cls), cls.name, list(range(cls.num_images))
        if subset:
            there = data.find([f'ukbench{number:05}.jpg' for number in numbers], prefer='full')
            numbers = [n for n in numbers if all(f'ukbench{n // 4 * 4 + i:05}.jpg' in there for i in range(4))]
            if not numbers:
                raise ValueError(f'{data.path} has no four images of an object of {title} (ukbench00000.jpg to 00003 '
                                 f'and so on); {cls.source}.')
            title = part_of(title, len(numbers), len(numbers)) if len(numbers) < cls.num_images else title
        names = [f'ukbench{number:05}.jpg' for number in numbers]
        return cls(title, ImageFiles(data.locate(names, prefer='full'), names=names), query_rows=np.arange(len(names)),
                   groups=np.array(numbers) // 4)
