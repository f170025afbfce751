"""UKBench: 10,200 photographs of 2550 objects, four of each; how many of the four are among the first four.

`Scalable recognition with a vocabulary tree`, Nistér and Stewénius 2006. Every photograph is a query and stays in its
own ranking, so that the score (N-S, 4 at best) starts at 1 for any system.
"""
import os
import re
from dataclasses import dataclass

import numpy as np

from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import ukb_score

from .benchmark import Benchmark, Figure, Scores, SetFolder, some

__all__ = ['DOWNLOADS', 'UKBench', 'load_ukbench']

TITLE = 'UKBench'
SOURCE = 'it is ukbench.zip at https://archive.org/details/ukbench'
DOWNLOADS = (RemoteFile('https://archive.org/download/ukbench/ukbench.zip'),)
NUM_IMAGES = 10_200


@dataclass(frozen=True, eq=False)
class UKBench(Benchmark):
    """The set; `groups` has the object of each image."""
    groups: np.ndarray = None

    def measure(self, scores: Scores) -> list[Figure]:
        return [Figure('N-S', ukb_score(scores, self.groups).score)]


def load_ukbench(data: str | os.PathLike, subset: bool = False) -> UKBench:
    """UKBench in a folder, in full/ or anywhere below it.

    Args:
        data: The folder.
        subset: Use the images found instead of asking for all of them; groups have to be complete.

    Raises:
        FileNotFoundError: Images are missing.
        ValueError: A subset has no image, or not all four of a group.
    """
    data = SetFolder(data, TITLE, SOURCE)
    numbers = list(range(NUM_IMAGES))
    if subset:
        there = (re.fullmatch(r'(?:.*/)?ukbench(\d{5})\.jpg', name) for name in data.names)
        numbers = sorted({int(match[1]) for match in there if match})
        groups, counts = np.unique(np.array(numbers, dtype=int) // 4, return_counts=True)
        if not numbers:
            raise ValueError(f'{data.path} has no image of {TITLE} (ukbench00000.jpg and so on); {SOURCE}.')
        if (counts != 4).any():
            partial = [f'ukbench{4 * group:05} to {4 * group + 3:05}' for group in groups[counts != 4]]
            raise ValueError(f'{data.path} lacks images of {len(partial)} groups of {TITLE}: {some(partial)}.')
    names = [f'ukbench{number:05}.jpg' for number in numbers]
    title = TITLE if len(names) == NUM_IMAGES else f'{TITLE} ({len(names)} of its images)'
    return UKBench(title=title, database=ImageFiles(data.locate(names, prefer='full'), names=names),
                   query_rows=np.arange(len(names)), groups=np.array(numbers) // 4)
