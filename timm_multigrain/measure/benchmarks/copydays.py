"""INRIA Copydays: copies of 157 holiday photographs, cropped, compressed or strongly edited, to be traced to them.

`Evaluation of GIST descriptors for web-scale image search`, Douze et al. 2009. The queries are the originals and the
copies, the database is the originals; every query has one original, that with the same number but for the last two
digits. Mean average precision per family, of which "strong" is the one quoted, and micro average precision as in the
code of SSCD (Pizzi et al. 2022): the 100 nearest images of every query of all families in one ranking.
"""
import os
import re

import numpy as np
import torch

from timm_multigrain.images.sources import Entry
from timm_multigrain.measure.archives import RemoteFile
from timm_multigrain.measure.metrics import average_precision, mean_average_precision
from timm_multigrain.search.exact import nearest_of

from .base import Benchmark, Figure, Scores, SetFolder, some
from .lists import Layout, ListBenchmark, Listing

NUM_ORIGINALS, NUM_STRONG, NUM_FAMILIES = 157, 229, 20
NEAREST = 100  # of a query, for the micro average precision
# Folder names in use, to the family; the ones of crop and jpeg have a folder for each strength.
_FAMILIES = {'original': 'original', 'originals': 'original', 'strong': 'strong', 'crop': 'crop', 'crops': 'crop',
             'jpeg': 'jpeg', 'jpegqual': 'jpeg'}
_ADDRESS = 'http://pascal.inrialpes.fr/data2/holidays/copydays'


class _Copydays(Layout):

    def load(self, data: str | os.PathLike, subset: bool = False) -> ListBenchmark:
        """Copydays in a folder with original/, strong/, crops/<percent>/ and jpeg/<quality>/ or jpegqual/<quality>/.

        The families that have no folder are left out, the strong one must be there. With `subset` the copies and
        originals that are there, whatever their number. Copies without their original are left out.
        """
        folder, found = SetFolder(data, self), {'original': {}, 'strong': {}}
        for path in folder.names:
            family, number = _place(path)
            if family is not None:
                if number in found.setdefault(family, {}):
                    raise ValueError(f'{data} has the {family} image {number} twice ({found[family][number]}, {path}): '
                                     'leave one.')
                found[family][number] = path
        for family, expected in (('original', NUM_ORIGINALS), ('strong', NUM_STRONG)):
            number = len(found[family])
            if not number or (number != expected and not subset):
                raise FileNotFoundError(f'{data}/{family} holds {number} images of {self.name}, not {expected}: '
                                        f'{self.source}.')
        for family in [] if subset else found:
            missing = sorted(set(found['original']) - set(found[family])) if family[-1].isdigit() else []
            if missing:
                raise FileNotFoundError(f'{data} lacks {len(missing)} of the {NUM_ORIGINALS} images of "{family}": '
                                        f'{some([f"{n}.jpg" for n in missing])}; {self.source}.')
        queries = [Entry(path, instance=str(number // 100), category=family)
                   for family in sorted(found) for number, path in found[family].items()]
        gallery = [entry._replace(category='') for entry in queries if entry.category == 'original']
        return self._build(folder, Listing(gallery, queries), subset)


def _place(path: str) -> tuple[str | None, int]:
    """Family, with its strength, and number of an image; None for a file that is not of the set."""
    *folders, base = path.split('/')
    match = re.fullmatch(r'(\d{5,7})\.jpe?g', base.lower())
    family = next((_FAMILIES[name.lower()] for name in folders if name.lower() in _FAMILIES), None)
    if family in ('crop', 'jpeg'):
        strength = next((name for name in reversed(folders) if name.isdigit()), None)
        family = strength and f'{family} {strength}'
    return (family, int(match[1])) if match and family else (None, 0)


def _judge(benchmark: ListBenchmark, scores: Scores) -> list[Figure]:
    families = np.array([entry.category for entry in benchmark.asked])
    ap = mean_average_precision(scores, benchmark.relevant).ap
    kinds = np.array([family.partition(' ')[0] for family in families])
    figures = []
    for kind in ('strong', 'crop', 'jpeg', 'original'):
        strengths = sorted(set(families[kinds == kind]), key=lambda family: (len(family), family))
        figures += [Figure('mAP', 100 * ap[families == family].mean(), family) for family in strengths]
        if len(strengths) > 1:
            figures.append(Figure('mAP', 100 * ap[kinds == kind].mean(), f'{kind}, all'))
    # trapezoidal average precision of the nearest images of all queries in one ranking, wrong first if equal
    best, places = (found.cpu() for found in nearest_of(scores, NEAREST))
    right = (places == torch.from_numpy(np.stack(benchmark.relevant))).flatten().numpy()
    order = np.lexsort((right, -best.flatten().numpy()))
    uap = average_precision(np.flatnonzero(right[order]), len(families))
    split = 'all' if len(set(families)) == NUM_FAMILIES else ', '.join(dict.fromkeys(kinds))
    return [*figures, Figure('uAP', 100 * uap, split)]


COPYDAYS = _Copydays(
    'INRIA Copydays', 'its archives copydays_original.tar.gz, _crop, _jpeg and _strong are at '
    'https://lear.inrialpes.fr/~jegou/data.php; unpack each into a folder of that name', None, _judge,
    published=Benchmark.published, task='copy-detection',
    downloads=tuple(RemoteFile(f'{_ADDRESS}_{part}.tar.gz', part) for part in ('original', 'crop', 'jpeg', 'strong')))
