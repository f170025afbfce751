"""Your own images: one group per image; every image of a group of two or more is a query, itself left out; mAP.

The groups are folders, DIR/<group>/<image>, or a JSON file that maps paths to numbers: -1 for a distractor, -2 for an
image to leave out.
"""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from timm_multigrain.files import check_json, read_json
from timm_multigrain.images.sources import printable
from timm_multigrain.measure.metrics import mean_average_precision

from .benchmark import Benchmark, Figure, Scores, SetFolder, some

__all__ = ['Groups', 'load_folder']

SOURCE = 'give a folder of images'
DISTRACTOR, IGNORED = -1, -2
TRUTH = 'gt.json'


@dataclass(frozen=True, eq=False)
class Groups(Benchmark):
    """The images; `groups` has the group of each, -1 for a distractor."""
    groups: np.ndarray = None

    published = {}

    def measure(self, scores: Scores) -> list[Figure]:
        return [Figure('mAP', 100 * float(self.average_precisions(scores).mean()))]

    def average_precisions(self, scores: Scores) -> np.ndarray:
        """Average precision of each query, (Q,) float64 in [0, 1]; scores as of `measure`."""
        members = {group: np.flatnonzero(self.groups == group) for group in np.unique(self.groups)}
        relevant = [np.setdiff1d(members[self.groups[row]], [row]) for row in self.query_rows]
        return mean_average_precision(scores, relevant, [[row] for row in self.query_rows]).ap


def load_folder(data: str | os.PathLike, ground_truth: str | os.PathLike | None = None) -> Groups:
    """Images of a folder in groups.

    Args:
        data: The folder.
        ground_truth: JSON object of paths, relative to the file's own folder, and the numbers of their groups; what
            lies outside of `data` is passed over. None: gt.json of the folder, if there is one, or else the
            subfolders.

    Raises:
        FileNotFoundError: The folder, the ground truth, or images that it names are missing.
        ValueError: It is not of this form, or no image has another one to find.
    """
    images = SetFolder(data, 'an image set', SOURCE)
    data = images.path
    if ground_truth is None and (data / TRUTH).is_file():
        ground_truth = data / TRUTH
    names, groups = _from_folders(images) if ground_truth is None else _from_file(data, Path(ground_truth))
    found, counts = np.unique(groups[groups != DISTRACTOR], return_counts=True)
    rows = np.flatnonzero(np.isin(groups, found[counts > 1]))
    if not len(rows):
        raise ValueError(f'{data} has {len(names)} images in groups, but no two of a group: nothing is to be found.')
    title = data.resolve().name or str(data)
    return Groups(title=title, database=images.files(names), query_rows=rows, groups=groups)


def _from_folders(images: SetFolder) -> tuple[list[str], np.ndarray]:
    names, data = images.names, images.path
    loose = [name for name in names if '/' not in name]
    if loose:
        raise ValueError(f'{data} holds images outside of groups ({some(loose)}): put each into {data}/<group>/, or '
                         f'say the groups in {TRUTH}.')
    folders = [name.rpartition('/')[0] for name in names]
    return names, np.unique(np.array(folders, dtype=str), return_inverse=True)[1]


def _from_file(data: Path, path: Path) -> tuple[list[str], np.ndarray]:
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
    if missing or not inside:
        raise FileNotFoundError(f'{data} lacks {len(missing)} of the {len(inside)} images that {path} names there'
                                + (f': {some(missing)}.' if missing else '.'))
    names = sorted(inside)
    return names, np.array([inside[name] for name in names])
