"""DISC21, of the Image Similarity Challenge 2021: edited copies among a million images; micro average precision.

`The 2021 Image Similarity Dataset and Challenge`, Douze et al. 2021, arXiv 2106.09672. One ranking of all pairs of
query and reference, cut after 500,000 of them as the challenge demands; most queries have no reference, and a good
system gives those low scores. The training images serve to normalise scores.
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path

from timm_multigrain.files import read_lines
from timm_multigrain.images.sources import ImageFiles, ImageSource
from timm_multigrain.measure.metrics import micro_average_precision
from timm_multigrain.measure.ranks import best_pairs

from .base import Benchmark, Figure, Scores, SetFolder, part_of, some

MAX_PAIRS = 500_000


@dataclass(frozen=True, eq=False)
class Disc21(Benchmark):
    """The set.

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
            training=ImageFiles([data.path / name for name in training], training) if training else None,
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
