"""Revisited Oxford and Paris: 70 queries cut out by a box, Easy, Medium and Hard; mAP and mP@k.

`Revisiting Oxford and Paris: large-scale image retrieval benchmarking`, Radenović, Iscen, Tolias, Avrithis, Chum 2018.
The published ground truth is a pickle, read without running any code in it; JSON of the same fields is read too. The
distractors of the paper (R1M) are 1,001,001 more images for the database.
"""
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timm_multigrain.files import check_json, read_json
from timm_multigrain.images.sources import ImageFiles, printable
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import RevisitedQuery, revisited_scores
from timm_multigrain.measure.unpickle import load_plain_pickle

from .benchmark import Benchmark, Figure, Scores, SetFolder, some

__all__ = ['DISTRACTORS', 'DOWNLOADS', 'Revisited', 'load_revisited', 'read_ground_truth']

TITLES = {'roxford5k': 'Revisited Oxford', 'rparis6k': 'Revisited Paris'}
NUM_IMAGES = {'roxford5k': 4993, 'rparis6k': 6322}
NUM_QUERIES = 70
_IMAGES = 'https://www.robots.ox.ac.uk/~vgg/data'
_TRUTH = 'http://cmp.felk.cvut.cz/revisitop/data/datasets'
DOWNLOADS = {
    'roxford5k': (RemoteFile(f'{_TRUTH}/roxford5k/gnd_roxford5k.pkl'),
                  RemoteFile(f'{_IMAGES}/oxbuildings/oxbuild_images-v1.tgz', 'jpg')),
    'rparis6k': (RemoteFile(f'{_TRUTH}/rparis6k/gnd_rparis6k.pkl'),
                 RemoteFile(f'{_IMAGES}/parisbuildings/paris_1-v1.tgz', 'jpg'),
                 RemoteFile(f'{_IMAGES}/parisbuildings/paris_2-v1.tgz', 'jpg')),
}
DISTRACTORS = tuple(
    RemoteFile(f'http://ptak.felk.cvut.cz/revisitop/revisitop1m/jpg/revisitop1m.{i}.tar.gz') for i in range(1, 101))
_FORM = {'imlist': [str], 'qimlist': [str], 'gnd': [{'bbx': [float], 'easy': [int], 'hard': [int], 'junk': [int]}]}
SOURCE = 'images and ground truth are linked at http://cmp.felk.cvut.cz/revisitop'


@dataclass(frozen=True, eq=False)
class Revisited(Benchmark):
    """The set; `truth` has the easy, hard and junk images of each query."""
    truth: list = None

    published = {'kind': 'thumbnail', 'exif': False}

    def measure(self, scores: Scores) -> list[Figure]:
        result = revisited_scores(scores, self.truth)
        figures = [Figure('mAP', 100 * part.map, part.name) for part in result.parts]
        return figures + [Figure(f'mP@{k}', 100 * part.mp_at[k], part.name)
                          for k in result.parts[0].mp_at for part in result.parts]


def load_revisited(data: str | os.PathLike, name: str, ground_truth: str | os.PathLike | None = None,
                   subset: bool = False) -> Revisited:
    """Revisited Oxford or Paris: gnd_<name>.pkl in a folder, the images in jpg/ or anywhere below it.

    Args:
        data: The folder.
        name: 'roxford5k' or 'rparis6k'.
        ground_truth: Another file of ground truth, .pkl or .json.
        subset: Take a ground truth of other counts than the published one.

    Raises:
        FileNotFoundError: Ground truth or images are missing.
        ValueError: The ground truth is not of this form, or has other counts.
    """
    title = TITLES[name]
    data = SetFolder(data, title, SOURCE)
    path = Path(ground_truth) if ground_truth else data.path / f'gnd_{name}.pkl'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: ground truth of {title} not found; {SOURCE}.')
    images, queries, entries = read_ground_truth(path)
    counts = f'{len(images)} images and {len(queries)} queries'
    if (len(images), len(queries)) != (NUM_IMAGES[name], NUM_QUERIES):
        if not subset:
            raise ValueError(f'{path} has {counts}, where {title} has {NUM_IMAGES[name]} and {NUM_QUERIES}: ask for a '
                             'subset if that is meant.')
        title += f' ({counts})'
    located = data.locate([*queries, *images], prefer='jpg')
    return Revisited(
        title=title, database=ImageFiles(located[len(queries):], names=images),
        queries=ImageFiles(located[:len(queries)], names=queries, boxes=[entry['bbx'] for entry in entries]),
        truth=[RevisitedQuery(*(entry[part] for part in ('easy', 'hard', 'junk'))) for entry in entries])


def read_ground_truth(path: str | os.PathLike) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Images, queries, and for each query its box `bbx` and the indices of its `easy`, `hard` and `junk` images.

    Raises:
        FileNotFoundError, ValueError: Not found, or not of this form.
    """
    path = Path(path)
    content = read_json(path) if path.suffix == '.json' else load_plain_pickle(path)
    check_json(content, _FORM, printable(path))
    images, queries = content['imlist'], content['qimlist']
    repeated = [name for name, count in Counter(images).items() if count > 1]
    if repeated:
        raise ValueError(f'{path} names images more than once: {some(repeated)}.')
    if not queries or len(content['gnd']) != len(queries):
        raise ValueError(f'{path} has {len(content["gnd"])} entries for {len(queries)} queries.')
    entries = [_entry(entry, len(images), f'{path}, query {printable(name)}')
               for entry, name in zip(content['gnd'], queries, strict=True)]
    if not any(len(entry['easy']) + len(entry['hard']) for entry in entries):
        raise ValueError(f'{path} has no query with an image to be found.')
    return images, queries, entries


def _entry(entry: dict[str, Any], num_images: int, shown: str) -> dict[str, Any]:
    result = {part: np.array(entry[part], dtype=np.int64) for part in ('easy', 'hard', 'junk')}
    together = np.concatenate(list(result.values()))
    if len(together) and not 0 <= together.min() <= together.max() < num_images:
        raise ValueError(f'{shown}: easy, hard or junk names an image that is not one of the {num_images}.')
    if len(np.unique(together)) < len(together):
        raise ValueError(f'{shown}: an image is named more than once among easy, hard and junk.')
    box = tuple(map(float, entry['bbx']))
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f'{shown}: bbx is {box}, not left, top, right and bottom.')
    return {**result, 'bbx': box}
