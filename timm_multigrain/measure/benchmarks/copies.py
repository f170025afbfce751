"""Benchmarks of copy detection."""
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from timm_multigrain.files import read_lines
from timm_multigrain.images.sources import ImageFiles, ImageSource
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import average_precision, mean_average_precision, micro_average_precision
from timm_multigrain.measure.ranks import best_pairs
from timm_multigrain.search.exact import nearest_of

from .base import Benchmark, Figure, Scores, SetFolder, part_of, some

NUM_ORIGINALS, NUM_STRONG, NUM_FAMILIES = 157, 229, 20
NEAREST = 100  # of a query, for the micro average precision
# Folder names in use, to the family; the ones of crop and jpeg have a folder for each strength.
_FAMILIES = {'original': 'original', 'originals': 'original', 'strong': 'strong', 'crop': 'crop', 'crops': 'crop',
             'jpeg': 'jpeg', 'jpegqual': 'jpeg'}
_ADDRESS = 'http://pascal.inrialpes.fr/data2/holidays/copydays'


@dataclass(frozen=True, eq=False)
class Copydays(Benchmark):
    """INRIA Copydays: copies of 157 holiday photographs, cropped, compressed or strongly edited, to be traced to them.

    `Evaluation of GIST descriptors for web-scale image search`, Douze et al. 2009. The queries are the originals and
    the copies, the database is the originals and, if given, distractors; every query has one original, that with the
    same number but for the last two digits. Mean average precision per family, of which "strong" is the one quoted, and
    micro average precision as in the code of SSCD (Pizzi et al. 2022): the 100 nearest images of every query of all
    families in one ranking.

    Attributes:
        families: Family of each query.
        truth: Place of its original in the database.
    """
    families: np.ndarray = None
    truth: np.ndarray = None

    name, task = 'INRIA Copydays', 'copy-detection'
    source = ('its archives copydays_original.tar.gz, _crop, _jpeg and _strong are at '
              'https://lear.inrialpes.fr/~jegou/data.php; unpack each into a folder of that name')
    downloads = tuple(RemoteFile(f'{_ADDRESS}_{part}.tar.gz', part) for part in ('original', 'crop', 'jpeg', 'strong'))

    def measure(self, scores: Scores) -> list[Figure]:
        ap = mean_average_precision(scores, self.truth[:, None]).ap
        kinds = np.array([family.partition(' ')[0] for family in self.families])
        figures = []
        for kind in ('strong', 'crop', 'jpeg', 'original'):
            strengths = sorted(set(self.families[kinds == kind]), key=lambda family: (len(family), family))
            figures += [Figure('mAP', 100 * ap[self.families == family].mean(), family) for family in strengths]
            if len(strengths) > 1:
                figures.append(Figure('mAP', 100 * ap[kinds == kind].mean(), f'{kind}, all'))
        split = 'all' if len(set(self.families)) == NUM_FAMILIES else ', '.join(dict.fromkeys(kinds))
        return [*figures, Figure('uAP', 100 * self._micro_average_precision(scores), split)]

    def _micro_average_precision(self, scores: Scores) -> float:
        """Trapezoidal average precision of the nearest images of all queries in one ranking, wrong first if equal."""
        best, places = (found.cpu() for found in nearest_of(scores, NEAREST))
        right = (places == torch.from_numpy(self.truth)[:, None]).flatten().numpy()
        order = np.lexsort((right, -best.flatten().numpy()))
        return average_precision(np.flatnonzero(right[order]), len(self.truth))

    @classmethod
    def load(cls, data: str | os.PathLike, subset: bool = False) -> 'Copydays':
        """Copydays in a folder with original/, strong/, crops/<percent>/ and jpeg/<quality>/ or jpegqual/<quality>/.

        The families that have no folder are left out, the strong one must be there. With `subset` the copies and
        originals that are there, whatever their number. Copies without their original are left out.
        """
        data = SetFolder(data, cls)
        found: dict[str, dict[int, str]] = {'original': {}, 'strong': {}}
        for path in data.names:
            family, number = _place(path)
            if family is not None:
                if number in found.setdefault(family, {}):
                    raise ValueError(f'{data.path} has the {family} image {number} twice ({found[family][number]}, '
                                     f'{path}): leave one.')
                found[family][number] = path
        cls._check_counts(data.path, found, subset)
        places = {number // 100: place for place, number in enumerate(found['original'])}
        copies = [(family, number, path) for family in sorted(found) for number, path in found[family].items()]
        copies = [copy for copy in copies if copy[1] // 100 in places]
        return cls(
            title=part_of(cls.name, len(copies), len(places)) if subset else cls.name,
            database=data.files(found['original'].values()), queries=data.files(path for *_, path in copies),
            families=np.array([family for family, *_ in copies]),
            truth=np.array([places[number // 100] for _, number, _ in copies]))

    @classmethod
    def _check_counts(cls, data: Path, found: dict[str, dict[int, str]], subset: bool) -> None:
        for family, expected in (('original', NUM_ORIGINALS), ('strong', NUM_STRONG)):
            number = len(found[family])
            if not number or (number != expected and not subset):
                raise FileNotFoundError(f'{data}/{family} holds {number} images of {cls.name}, not {expected}: '
                                        f'{cls.source}.')
        for family in [] if subset else found:
            missing = sorted(set(found['original']) - set(found[family])) if family[-1].isdigit() else []
            if missing:
                raise FileNotFoundError(f'{data} lacks {len(missing)} of the {NUM_ORIGINALS} images of "{family}": '
                                        f'{some([f"{n}.jpg" for n in missing])}; {cls.source}.')


def _place(path: str) -> tuple[str | None, int]:
    """Family, with its strength, and number of an image; None for a file that is not of the set."""
    *folders, base = path.split('/')
    match = re.fullmatch(r'(\d{5,7})\.jpe?g', base.lower())
    family = next((_FAMILIES[name.lower()] for name in folders if name.lower() in _FAMILIES), None)
    if family in ('crop', 'jpeg'):
        strength = next((name for name in reversed(folders) if name.isdigit()), None)
        family = strength and f'{family} {strength}'
    return (family, int(match[1])) if match and family else (None, 0)


MAX_PAIRS = 500_000


@dataclass(frozen=True, eq=False)
class Disc21(Benchmark):
    """DISC21, of the Image Similarity Challenge 2021: edited copies among a million images; micro average precision.

    `The 2021 Image Similarity Dataset and Challenge`, Douze et al. 2021, arXiv 2106.09672. One ranking of all pairs of
    query and reference, cut after 500,000 of them as the challenge demands; most queries have no reference, and a good
    system gives those low scores. The training images serve to normalise scores.

    Attributes:
        pairs: Query and reference of each true match, as places in `queries` and `database`.
        training: The training images, where they are there.
    """
    pairs: list = None
    training: ImageSource | None = None

    name, task, published = 'DISC21', 'copy-detection', {'kind': 'thumbnail', 'exif': False}
    source = 'it is given out, against its terms of use, at https://ai.meta.com/datasets/disc21-dataset'
    num_references = 1_000_000

    def measure(self, scores: Scores) -> list[Figure]:
        result = micro_average_precision(*best_pairs(scores, MAX_PAIRS), self.pairs)
        return [Figure('uAP', 100 * result.uap), Figure('recall@P90', 100 * result.recall_at_p90)]

    @classmethod
    def load(cls, data: str | os.PathLike, ground_truth: str | os.PathLike | None = None,
             queries: str | os.PathLike | None = None, subset: bool = False) -> 'Disc21':
        """DISC21 in a folder with Q*.jpg, R*.jpg and T*.jpg (training) in it or below it, and the ground truth as CSV.

        Args:
            ground_truth: The CSV file; None for the only one in the folder.
            queries: Text file with one query name per line. None: those that the ground truth has a row for, which is
                right only if it has rows without a reference for the queries that have none.
            subset: Search only the queries and references that the ground truth names, as the organisers' "subset 1",
                and of these the ones that are there.
        """
        data = SetFolder(data, cls)
        path = Path(ground_truth) if ground_truth else data.file('*ground*truth*.csv')
        named, pairs = read_pairs(path)
        matched = {query for query, _ in pairs}
        if queries is not None:
            named = list(dict.fromkeys(
                Path(line).stem for line in read_lines(queries, 'list of queries') if not line.startswith('#')))
            if unknown := sorted(matched.difference(named)):
                raise ValueError(f'{queries} lacks {len(unknown)} queries that {path} has a reference for: '
                                 f'{some(unknown)}.')
        elif not subset and len(named) == len(matched):
            raise ValueError(
                f'{path} has no row for queries without a reference, so it does not say which queries there are: give '
                'a list of them, or ask for the subset of the queries and references it names.')
        references = [f'R{number:06}' for number in range(cls.num_references)]
        if subset:
            references = sorted({reference for _, reference in pairs})
            there = data.find([*named, *references])
            named, references = ([name for name in names if name in there] for names in (named, references))
            pairs = [pair for pair in pairs if there.keys() >= set(pair)]
            if not pairs:
                raise ValueError(f'{data.path} has no query of {cls.name} with its reference; {cls.source}.')
        places = {name: place for place, name in enumerate(references)}
        rows = {name: row for row, name in enumerate(named)}
        if absent := sorted({reference for _, reference in pairs}.difference(places)):
            raise ValueError(f'{path} names {len(absent)} references that {cls.name} does not have: {some(absent)}.')
        training = [name for name in data.names if re.match(r'T\d{6}', name.rpartition('/')[2])]
        located = data.locate([*named, *references])
        return cls(
            title=part_of(cls.name, len(named), len(references)) if subset else f'{cls.name} ({len(named)} queries)',
            queries=ImageFiles(located[:len(named)], names=named),
            database=ImageFiles(located[len(named):], names=references),
            training=data.files(training) if training else None,
            pairs=[(rows[query], places[reference]) for query, reference in pairs])


def read_pairs(path: str | os.PathLike) -> tuple[list[str], list[tuple[str, str]]]:
    """All queries of a ground truth, and its pairs of query and reference; a query may have no reference."""
    lines = [line for line in read_lines(path, 'ground truth') if not line.startswith('query_id,')]
    if wrong := [line for line in lines if line.count(',') != 1 or line.startswith(',')]:
        raise ValueError(f'{path}: {some(wrong)} is not a query and a reference or nothing.')
    rows = [tuple(map(str.strip, line.split(','))) for line in lines]
    pairs = list(dict.fromkeys(row for row in rows if row[1]))
    if not pairs:
        raise ValueError(f'{path} has no query with a reference.')
    return list(dict.fromkeys(query for query, _ in rows)), pairs
