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

from timm_multigrain.files import read_json
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.retrieval.archives import RemoteFile
from timm_multigrain.retrieval.metrics import RevisitedQuery, revisited_scores
from timm_multigrain.retrieval.unpickle import load_plain_pickle

from .benchmark import Benchmark, Figure, Scores
from .files import locate, require_folder, some

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
    data = require_folder(data, title, SOURCE)
    path = Path(ground_truth) if ground_truth else data / f'gnd_{name}.pkl'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no ground truth of {title}; {SOURCE}.')
    images, queries, entries = read_ground_truth(path)
    counts = f'{len(images)} images and {len(queries)} queries'
    if (len(images), len(queries)) != (NUM_IMAGES[name], NUM_QUERIES):
        if not subset:
            raise ValueError(f'{path} has {counts}, where {title} has {NUM_IMAGES[name]} and {NUM_QUERIES}: ask for a '
                             'subset if that is meant.')
        title += f' ({counts})'
    located = locate(data, [*queries, *images], TITLES[name], SOURCE, prefer=('jpg',))
    return Revisited(
        title=title, database=ImageFiles(located[len(queries):], names=images),
        queries=ImageFiles(located[:len(queries)], names=queries, boxes=[entry['bbx'] for entry in entries]),
        truth=[RevisitedQuery(*(entry[part] for part in ('easy', 'hard', 'junk'))) for entry in entries])


def read_ground_truth(path: str | os.PathLike) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Images, queries, and for each query its box `bbx` and the indices of its `easy`, `hard` and `junk` images.

    Raises:
        FileNotFoundError, ValueError: There is none, or it is not of this form.
    """
    path = Path(path)
    content = read_json(path) if path.suffix == '.json' else load_plain_pickle(path)
    if not isinstance(content, dict) or not {'imlist', 'qimlist', 'gnd'} <= set(content):
        raise ValueError(f'{path} is no ground truth: imlist, qimlist and gnd are needed.')
    images, queries = ([str(name) for name in content[key]] for key in ('imlist', 'qimlist'))
    repeated = [name for name, count in Counter(images).items() if count > 1]
    if repeated:
        raise ValueError(f'{path} names images more than once: {some(repeated)}.')
    if not queries or len(content['gnd']) != len(queries):
        raise ValueError(f'{path} has {len(content["gnd"])} entries for {len(queries)} queries.')
    entries = [_entry(entry, len(images), f'{path}, query {name}')
               for entry, name in zip(content['gnd'], queries, strict=True)]
    if not any(len(entry['easy']) + len(entry['hard']) for entry in entries):
        raise ValueError(f'{path} has no query with an image to be found.')
    return images, queries, entries


def _entry(entry: Any, num_images: int, shown: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not {'bbx', 'easy', 'hard', 'junk'} <= set(entry):
        raise ValueError(f'{shown} lacks one of bbx, easy, hard, junk.')
    result = {}
    for part in ('easy', 'hard', 'junk'):
        values = np.asarray(entry[part])
        values = values.astype(np.int64) if not values.size else values
        if values.ndim != 1 or values.dtype.kind not in 'iu':
            raise ValueError(f'{shown}: {part} has to be a list of integers.')
        if values.size and not 0 <= values.min() <= values.max() < num_images:
            raise ValueError(f'{shown}: {part} names image {values.max()} of {num_images}.')
        result[part] = values.astype(np.int64)
    together = np.concatenate([result[part] for part in ('easy', 'hard', 'junk')])
    if len(np.unique(together)) < len(together):
        raise ValueError(f'{shown}: an image is named more than once among easy, hard and junk.')
    try:
        left, top, right, bottom = (float(side) for side in entry['bbx'])
    except (TypeError, ValueError):
        raise ValueError(f'{shown}: bbx is {entry["bbx"]!r}, not four numbers.') from None
    if not (left < right and top < bottom):
        raise ValueError(f'{shown}: the box {left, top, right, bottom} is empty.')
    return {**result, 'bbx': (left, top, right, bottom)}
