"""Revisited Oxford and Paris: 70 queries cut out by a box, Easy, Medium and Hard; mAP and mP@k.

`Revisiting Oxford and Paris: large-scale image retrieval benchmarking`, Radenović, Iscen, Tolias, Avrithis, Chum 2018.
The published ground truth is a pickle of numbers, texts, lists and dicts, read by an unpickler that calls nothing; JSON
of the same fields is read too. The distractors of the paper (R1M) are 1,001,001 more images for the database.
"""
import io
import os
import pickle
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timm_multigrain.files import check_json, printable, read_json
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import RevisitedQuery, revisited_scores

from .base import Benchmark, Figure, Scores, SetFolder, part_of

NUM_QUERIES = 70
MAX_PICKLE = 16 << 20  # bytes
_IMAGES = 'https://www.robots.ox.ac.uk/~vgg/data'
_TRUTH = 'http://cmp.felk.cvut.cz/revisitop/data/datasets'
DISTRACTORS = tuple(
    RemoteFile(f'http://ptak.felk.cvut.cz/revisitop/revisitop1m/jpg/revisitop1m.{i}.tar.gz') for i in range(1, 101))
_KINDS = ('easy', 'hard', 'junk')
_FORM = {'imlist': [str], 'qimlist': [str], 'gnd': [{'bbx': [float], **{kind: [int] for kind in _KINDS}}]}


@dataclass(frozen=True, eq=False)
class RevisitedOxford(Benchmark):
    """The set; `truth` has the easy, hard and junk images of each query."""
    truth: list[RevisitedQuery] = None

    name, published = 'Revisited Oxford', {'kind': 'thumbnail', 'exif': False}
    source = 'images and ground truth are linked at http://cmp.felk.cvut.cz/revisitop'
    short_name, num_images = 'roxford5k', 4993
    downloads = (RemoteFile(f'{_TRUTH}/roxford5k/gnd_roxford5k.pkl'),
                 RemoteFile(f'{_IMAGES}/oxbuildings/oxbuild_images-v1.tgz', 'jpg'))

    def measure(self, scores: Scores) -> list[Figure]:
        result = revisited_scores(scores, self.truth)
        figures = [Figure('mAP', 100 * part.map, name) for name, part in result.items()]
        return figures + [Figure(f'mP@{k}', 100 * part.mp_at(k), name)
                          for k in (1, 5, 10) for name, part in result.items()]

    @classmethod
    def load(cls, data: str | os.PathLike, ground_truth: str | os.PathLike | None = None,
             subset: bool = False) -> 'RevisitedOxford':
        """The set in a folder: gnd_<roxford5k or rparis6k>.pkl, the images in jpg/ or anywhere below it.

        Args:
            ground_truth: Another file of ground truth, .pkl or .json.
            subset: Take the images that are there and cut the ground truth down to them; it may have other counts than
                the published one.
        """
        data, title = SetFolder(data, cls), cls.name
        path = Path(ground_truth) if ground_truth else data.file(f'gnd_{cls.short_name}.pkl')
        images, queries, entries = read_ground_truth(path)
        if subset:
            images, queries, entries = _cut_down(data.find([*queries, *images], 'jpg'), images, queries, entries)
            if not queries:
                raise ValueError(f'{data.path} has no query of {title} with an image to find; {cls.source}.')
        if (len(images), len(queries)) != (cls.num_images, NUM_QUERIES):
            title = part_of(title, len(queries), len(images))
            if not subset:
                raise ValueError(f'{path} has {len(images)} images and {len(queries)} queries, where {cls.name} has '
                                 f'{cls.num_images} and {NUM_QUERIES}: ask for a subset if that is meant.')
        located = data.locate([*queries, *images], prefer='jpg')
        return cls(
            title=title, database=ImageFiles(located[len(queries):], names=images),
            queries=ImageFiles(located[:len(queries)], names=queries, boxes=[entry['bbx'] for entry in entries]),
            truth=[RevisitedQuery(entry['easy'], entry['hard'], entry['junk']) for entry in entries])


def _cut_down(found: Container[str], images: list[str], queries: list[str], entries: list[dict]) -> tuple:
    """A ground truth of the images that are there, without the queries that have nothing left to find."""
    kept = [number for number, name in enumerate(images) if name in found]
    places = {number: place for place, number in enumerate(kept)}
    left = []
    for name, entry in zip(queries, entries, strict=True):
        lists = {kind: [places[number] for number in entry[kind] if number in places] for kind in _KINDS}
        if name in found and (lists['easy'] or lists['hard']):
            left.append((name, {**entry, **lists}))
    return [images[number] for number in kept], [name for name, _ in left], [entry for _, entry in left]


class RevisitedParis(RevisitedOxford):
    """The set, as `RevisitedOxford`."""
    name, short_name, num_images = 'Revisited Paris', 'rparis6k', 6322
    downloads = (RemoteFile(f'{_TRUTH}/rparis6k/gnd_rparis6k.pkl'),
                 RemoteFile(f'{_IMAGES}/parisbuildings/paris_1-v1.tgz', 'jpg'),
                 RemoteFile(f'{_IMAGES}/parisbuildings/paris_2-v1.tgz', 'jpg'))


def read_ground_truth(path: str | os.PathLike) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Images, queries, and for each query its box `bbx` and the indices of its `easy`, `hard` and `junk` images."""
    path = Path(path)
    content = read_json(path) if path.suffix == '.json' else _read_pickle(path)
    check_json(content, _FORM, printable(path))
    images, queries, entries = content['imlist'], content['qimlist'], content['gnd']
    if len(set(images)) < len(images):
        raise ValueError(f'{path} names images more than once.')
    if not queries or len(entries) != len(queries):
        raise ValueError(f'{path} has {len(entries)} entries for {len(queries)} queries.')
    for name, entry in zip(queries, entries, strict=True):
        labelled = np.array([*entry['easy'], *entry['hard'], *entry['junk']], dtype=np.int64)
        if len(np.unique(labelled)) < len(labelled) or ((labelled < 0) | (labelled >= len(images))).any():
            raise ValueError(f'{path}, query {printable(name)}: easy, hard and junk are numbers of the {len(images)} '
                             'images, each once.')
    return images, queries, entries


class _Unpickler(pickle._Unpickler):
    """Of plain values, without a class or a call. In the one written in C a few bytes ask for a memo of gigabytes."""
    # The hash of a tuple of tuples that are one and the same takes forever, a bytearray the memory that it claims.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if 'tuple' not in load.__name__ and 'bytearray' not in load.__name__}

    def find_class(self, module: str, name: str) -> None:
        raise ValueError(f'it calls {module}.{name}')


def _read_pickle(path: Path) -> Any:
    try:
        with open(path, 'rb') as file:
            content = file.read(MAX_PICKLE + 1)
        if len(content) > MAX_PICKLE:
            raise ValueError(f'it is larger than {MAX_PICKLE} bytes')
        return _Unpickler(io.BytesIO(content), encoding='latin1').load()
    except FileNotFoundError:
        raise FileNotFoundError(f'{printable(path)} not found.') from None
    except Exception as e:  # a damaged pickle raises whatever its opcodes run into
        reason = printable(str(e)[:200] or type(e).__name__)
        raise ValueError(f'{printable(path)} is not a whole pickle of numbers, texts, lists and dicts ({reason}); '
                         'nothing in it was run. JSON of the same fields is read, too.') from e
