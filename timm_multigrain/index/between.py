"""Which images of one set are copies of images of another, such as those of a validation set of training images."""
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from timm_multigrain.files import counted, printable

from .dedup import BASES, Copies, CopyFile, CopySearch
from .index import Index
from .keep import Rules
from .records import OtherModel


class ImageSet:
    """Images of an index: all, or those below a folder."""

    def __init__(self, index: Index, folder: str | os.PathLike | None = None):
        self.index, self.name = index, printable(index.path if folder is None else folder)
        self.folders, self.rows = index.info['folders'], np.arange(len(index))
        if folder is not None:
            self.folders = [os.path.realpath(os.fsdecode(folder))]
            self.rows = np.flatnonzero([self.name_of(path) is not None for path in index.paths])
        if not len(self.rows):
            raise ValueError(f'{self.name} has no images in {printable(index.path)}: name a folder that was indexed.')

    def name_of(self, path: str) -> str | None:
        """The path below its folder, None if it is in none of them."""
        folders = [os.path.join(folder, '') for folder in self.folders]
        return next((path[len(folder):] for folder in folders if path.startswith(folder)), None)

    def class_of(self, path: str) -> str:
        """The first folder below its own, '' if it lies in that itself."""
        return self.name_of(path).rpartition(os.sep)[0].split(os.sep)[0]


class _Joined:
    """Two sets as one index; the folders that `Candidate` knows are the sets."""

    def __init__(self, *sets: ImageSet):
        self.places = [(images.index, int(row)) for images in sets for row in images.rows]
        self.vectors = np.concatenate([np.asarray(images.index.vectors[images.rows]) for images in sets])
        self.columns = np.concatenate([images.index.columns[images.rows] for images in sets])
        self.columns['root'] = np.repeat(np.arange(len(sets)), [len(images.rows) for images in sets])
        self.protocol = sets[0].index.protocol

    def __len__(self) -> int:
        return len(self.places)

    def path_of(self, row: int) -> str:
        index, own = self.places[row]
        return index.path_of(own)

    def records(self, row: int):
        index, own = self.places[row]
        return index.records(own)


@dataclass(frozen=True)
class CopiesBetween(Copies):
    """As `Copies`; the file to keep is of the first set, the others of a group are of the second one."""
    first: ImageSet | None = None
    second: ImageSet | None = None

    def pairs(self) -> list[tuple[CopyFile, CopyFile]]:
        """Each copy in the second set, by its path, with the image of the first set that it is a copy of."""
        return sorted(self.surplus(likely=True), key=lambda pair: os.fsencode(pair[0].record.path))

    def to_dict(self) -> dict:
        return {**super().to_dict(), 'between': [self.first.name, self.second.name], 'pairs': [
            {'path': file.record.path, 'class': self.second.class_of(file.record.path), 'copy_of': kept.record.path,
             'class_of_copy': self.first.class_of(kept.record.path), 'certain': file.certain, 'basis': file.basis,
             'edits': list(file.edits)} for file, kept in self.pairs()]}

    def __str__(self) -> str:
        rows = [(printable(self.second.name_of(copy.record.path)), printable(self.first.name_of(kept.record.path)),
                 ', '.join([BASES[copy.basis].lower(), *copy.edits])) for copy, kept in self.pairs()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [f'{a:{widths[0]}}  {b:{widths[1]}}  {how}' for a, b, how in rows]
        if lines:
            lines.insert(0, f'{self.second.name:{widths[0]}}  {self.first.name:{widths[1]}}  how')
        return '\n'.join([*lines, *self.summary()])

    def summary(self) -> list[str]:
        pairs = self.pairs()
        certain = sum(file.certain for file, _ in pairs)
        other = sum(self.second.class_of(file.record.path) != self.first.class_of(kept.record.path)
                    for file, kept in pairs)
        images = counted(len(self.second.rows), 'image')
        return [f'{self.second.name} has {counted(len(pairs), "copy")} of images of {self.first.name}, among {images}: '
                f'{certain:,} for certain, {len(pairs) - certain:,} likely; {other:,} of another class', *self.notes()]


def find_copies_between(
        first: ImageSet, second: ImageSet, threshold: float | None = None, **options) -> CopiesBetween:
    """Find the images of the second set that are copies of images of the first one.

    Arguments are those of `find_copies`, without keep and prefer.

    Raises:
        ValueError: The sets share images; or as `find_copies`.
        OtherModel: The sets were indexed with different models or preprocessing.
    """
    described = [(images.index.config['model']['weights_sha256'], images.index.config['model']['pool'],
                  images.index.config['protocol']) for images in (first, second)]
    if described[0] != described[1]:
        raise OtherModel(f'{first.name} and {second.name} were indexed with different models or preprocessing: index '
                         'one of them again as the other was.')
    joined = _Joined(first, second)
    paths = [joined.path_of(row) for row in range(len(joined))]
    if len(set(paths)) < len(paths):
        raise ValueError(f'{first.name} and {second.name} have images in common: name folders that do not overlap.')
    search = CopySearch(joined, threshold, rules=Rules(first_set=True), **options)
    in_second = joined.columns['root'] == 1
    groups, twins = [], {}
    for kept, *others in search.identical:
        others = [row for row in others if in_second[row]]
        if in_second[kept]:
            twins[kept] = others
        elif others:
            groups.append(search.identical_group([kept, *others]))
    if not options.get('exact_only'):
        pairs = search.pairs(in_second)
        best = {}  # of each image of the second set the most similar one of the first; rows of the first are lower
        for one, other, score in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.scores.tolist(), strict=True):
            best[other] = max(best.get(other, (-2., 0)), (score, one))
        copies_of = defaultdict(list)
        for row, (_, one) in best.items():
            copies_of[one] += [row, *twins.get(row, ())]
        groups += search.groups([np.array([one, *copies]) for one, copies in copies_of.items()])
    return replace(search.result(groups, CopiesBetween, itself=True), first=first, second=second)


def sets_of(names: Sequence[str], index: Index | None) -> list[ImageSet]:
    """The sets that a command line names: folders in an index, or indexes if none is given."""
    return [ImageSet(Index(name)) if index is None else ImageSet(index, name) for name in names]
