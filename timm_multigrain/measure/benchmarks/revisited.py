"""Revisited Oxford and Paris: 70 queries cut out by a box, Easy, Medium and Hard; mAP and mP@k.

`Revisiting Oxford and Paris: large-scale image retrieval benchmarking`, Radenović, Iscen, Tolias, Avrithis, Chum 2018.
The published ground truth is a pickle of numbers, texts, lists and dicts, read by an unpickler that calls nothing; JSON
of the same fields is read too. The distractors of the paper (R1M) are 1,001,001 more images for the database.
"""
import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timm_multigrain.files import check_json, printable, read_json
from timm_multigrain.images.sources import Entry
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import RevisitedQuery, revisited_scores

from .base import Figure, Scores, SetFolder
from .lists import Layout, ListBenchmark, Listing

NUM_QUERIES = 70
MAX_PICKLE = 16 << 20  # bytes
_IMAGES = 'https://www.robots.ox.ac.uk/~vgg/data'
_TRUTH = 'http://cmp.felk.cvut.cz/revisitop/data/datasets'
DISTRACTORS = tuple(
    RemoteFile(f'http://ptak.felk.cvut.cz/revisitop/revisitop1m/jpg/revisitop1m.{i}.tar.gz') for i in range(1, 101))
_KINDS = ('easy', 'hard', 'junk')
_FORM = {'imlist': [str], 'qimlist': [str], 'gnd': [{'bbx': [float], **{kind: [int] for kind in _KINDS}}]}


@dataclass(frozen=True)
class _Revisited(Layout):
    """The layout of a set.

    Attributes:
        truth: File of its ground truth.
    """
    truth: str = ''

    def load(self, data: str | os.PathLike, ground_truth: str | os.PathLike | None = None,
             subset: bool = False) -> ListBenchmark:
        """The set in a folder: gnd_<roxford5k or rparis6k>.pkl, the images in jpg/ or anywhere below it.

        Args:
            ground_truth: Another file of ground truth, .pkl or .json.
            subset: Take the images that are there and cut the ground truth down to them; it may have other counts than
                the published one.
        """
        folder = SetFolder(data, self)
        images, names, entries = read_ground_truth(Path(ground_truth) if ground_truth else folder.file(self.truth))
        queries = []
        for name, entry in zip(names, entries, strict=True):
            easy, hard, junk = ({images[number] for number in entry[kind]} for kind in _KINDS)
            queries.append(Entry(name, box=tuple(entry['bbx']), relevant=easy | hard, junk=junk, easy=easy))
        return self._build(folder, Listing([Entry(name) for name in images], queries), subset)


def _judge(benchmark: ListBenchmark, scores: Scores) -> list[Figure]:
    truth = []
    for entry, relevant, junk in zip(benchmark.asked, benchmark.relevant, benchmark.ignore, strict=True):
        easy = np.array([benchmark.gallery[place].path in entry.easy for place in relevant])
        truth.append(RevisitedQuery(relevant[easy], relevant[~easy], junk))
    result = revisited_scores(scores, truth)
    figures = [Figure('mAP', 100 * part.map, name) for name, part in result.items()]
    return figures + [Figure(f'mP@{k}', 100 * part.mp_at(k), name) for k in (1, 5, 10) for name, part in result.items()]


def _layout(title: str, name: str, images: int, *archives: str) -> Layout:
    downloads = [RemoteFile(f'{_TRUTH}/{name}/gnd_{name}.pkl'),
                 *(RemoteFile(f'{_IMAGES}/{archive}', 'jpg') for archive in archives)]
    return _Revisited(
        title, 'images and ground truth are linked at http://cmp.felk.cvut.cz/revisitop', None, _judge,
        (NUM_QUERIES, images), {'kind': 'thumbnail', 'exif': False}, 'jpg', downloads, truth=f'gnd_{name}.pkl')


ROXFORD = _layout('Revisited Oxford', 'roxford5k', 4993, 'oxbuildings/oxbuild_images-v1.tgz')
RPARIS = _layout('Revisited Paris', 'rparis6k', 6322, 'parisbuildings/paris_1-v1.tgz', 'parisbuildings/paris_2-v1.tgz')


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
