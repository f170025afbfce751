"""Published sets that are lists, each read from the files that it comes with.

An entry of `LAYOUTS` per set: where it is to be had, what its files say, how rankings are judged, images prepared.
"""
import csv
import re
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from timm_multigrain.extras import extra
from timm_multigrain.files import check_json, read_json, read_lines
from timm_multigrain.images.sources import Entry
from timm_multigrain.measure.archives import RemoteFile

from .base import Benchmark, SetFolder
from .holidays import HOLIDAYS
from .lists import Layout, Listing, OwnGroups, OwnList

THUMBNAIL = {'kind': 'thumbnail', 'exif': False}  # of cnnimageretrieval-pytorch
# Files of Paris6k that hold no picture: https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/corrupt.txt
_CORRUPT = {f'paris_{name}' for name in (
    'louvre_000136', 'louvre_000146', 'moulinrouge_000422', 'museedorsay_001059', 'notredame_000188',
    'pantheon_000284', 'pantheon_000960', 'pantheon_000974', 'pompidou_000195', 'pompidou_000196', 'pompidou_000201',
    'pompidou_000467', 'pompidou_000640', 'sacrecoeur_000299', 'sacrecoeur_000330', 'sacrecoeur_000353',
    'triomphe_000662', 'triomphe_000833', 'triomphe_000863', 'triomphe_000867')}


def _rows(path: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """Words of the lines of a text, so many a line."""
    rows = [line.split() for line in read_lines(path, 'list')][skip:]
    if wrong := next((row for row in rows if len(row) != columns), None):
        raise ValueError(f'{path}: {" ".join(wrong)!r:.100} does not have {columns} words.')
    return rows


def _table(path: Path, *columns: str) -> list[dict[str, str]]:
    with open(path, encoding='utf-8', newline='') as file:
        reader = csv.DictReader(file)
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise ValueError(f'{path} has no column {missing[0]}: {", ".join(columns)} are needed.')
        return list(reader)


def _mat(path: Path) -> dict[str, Any]:
    with extra('metric', 'A file of MATLAB'):
        from scipy.io import loadmat
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as e:  # a damaged file raises whatever it runs into
        raise ValueError(f'{path} is not a file of MATLAB: {e}.') from e


def _cub(folder: SetFolder) -> Listing:
    """images.txt and image_class_labels.txt; classes 101 to 200."""
    labels = dict(_rows(folder.file('image_class_labels.txt'), 2))
    return Listing([Entry(path, labels[number]) for number, path in _rows(folder.file('images.txt'), 2)
                    if int(labels[number]) > 100])


def _cars(folder: SetFolder) -> Listing:
    """cars_annos.mat, or the lists of the training and test images in devkit/; classes 99 to 196."""
    try:
        lists = {'': _mat(folder.file('cars_annos.mat'))}
    except FileNotFoundError:
        lists = {'cars_train/': _mat(folder.file('cars_train_annos.mat')),
                 'cars_test/': _mat(folder.file('cars_test_annos_withlabels.mat'))}
    entries = []
    for where, content in lists.items():
        annotations = np.atleast_1d(content['annotations'])
        names = annotations['fname' if where else 'relative_im_path']
        entries += [Entry(where + str(name), str(label)) for name, label in zip(
            names, annotations['class'], strict=True) if label > 98]
    return Listing(entries)


def _products(folder: SetFolder) -> Listing:
    """Ebay_test.txt: image_id class_id super_class_id path."""
    return Listing([Entry(path, label) for _, label, _, path in _rows(folder.file('Ebay_test.txt'), 4, skip=1)])


def _inshop(folder: SetFolder) -> Listing:
    """list_eval_partition.txt: a number, a head, then image_name item_id evaluation_status."""
    rows = _rows(folder.file('list_eval_partition.txt', 'list_eval_partition_inshop.txt'), 3, skip=2)
    parts = {part: [Entry(path.removeprefix('img/'), item) for path, item, status in rows if status == part]
             for part in ('query', 'gallery')}
    return Listing(parts['gallery'], parts['query'])


def _consumer(folder: SetFolder) -> Listing:
    """list_eval_partition.txt: a number, a head, then consumer photo, shop photo, item_id, evaluation_status."""
    rows = [row for row in _rows(folder.file('list_eval_partition.txt'), 4, skip=2) if row[3] == 'test']
    parts = [dict.fromkeys(Entry(row[place].removeprefix('img/'), row[2]) for row in rows) for place in (0, 1)]
    return Listing(list(parts[1]), list(parts[0]))


def _street(folder: SetFolder) -> Listing:
    """retrieval_<category>.json of photo and product; test_pairs_<category>.json of photo, product and bbox."""
    files = {int(stem): name for name in folder.names if (stem := Path(name).stem).isdecimal()}  # 17.jpg, 000000017.png
    gallery, queries = [], []
    first = folder.file('retrieval_dresses.json')
    for path in sorted(first.parent.glob('retrieval_*.json')):
        category = path.stem.removeprefix('retrieval_')
        photos, wanted = read_json(path), defaultdict(set)
        pairs = read_json(path.with_name(f'test_pairs_{category}.json'), 'list of test pairs')
        check_json(photos, [{'photo': int, 'product': int}], str(path))
        check_json(pairs, [{'photo': int, 'product': int, 'bbox': dict.fromkeys(
            ('left', 'top', 'width', 'height'), float)}], f'test_pairs_{category}.json')
        of_product = defaultdict(list)
        for photo in photos:
            of_product[photo['product']].append(files.get(photo['photo'], str(photo['photo'])))
        gallery += [Entry(name, category=category) for name in dict.fromkeys(chain(*of_product.values()))]
        for pair in pairs:
            left, top, width, height = (pair['bbox'][side] for side in ('left', 'top', 'width', 'height'))
            wanted[pair['photo'], (left, top, left + width, top + height)].update(of_product[pair['product']])
        queries += [Entry(files.get(photo, str(photo)), category=category, box=box, relevant=right)
                    for (photo, box), right in wanted.items()]
    return Listing(gallery, queries)


def _instre(folder: SetFolder) -> Listing:
    """gnd_instre.mat: imlist, qimlist, and of each query the numbers of its images, from 1, and x, y, width, height."""
    content = _mat(folder.file('gnd_instre.mat'))
    names, queries = [str(name) for name in content['imlist']], []
    for name, truth in zip(content['qimlist'], content['gnd'], strict=True):
        numbers, (left, top, width, height) = (np.atleast_1d(truth[part]).tolist() for part in truth.dtype.names[:2])
        queries.append(Entry(str(name), box=(left, top, left + width, top + height),
                             relevant={names[number - 1] for number in numbers}))
    return Listing([Entry(name) for name in names], queries)


def _landmarks(folder: SetFolder) -> Listing:
    """index.csv, and retrieval_solution_v2.1.csv: id, images, Usage; images in index/a/b/c/ and test/a/b/c/."""
    def place(part: str, name: str) -> str:
        return '/'.join([part, *name[:3], name])

    truth = _table(folder.file('retrieval_solution_v2.1.csv'), 'id', 'images', 'Usage')
    truth = [row for row in truth if row['Usage'] != 'Ignored']
    return Listing(
        [Entry(place('index', row['id'])) for row in _table(folder.file('index.csv'), 'id')],
        [Entry(place('test', row['id']), category=row['Usage'].lower(),
               relevant={place('index', name) for name in row['images'].split()}) for row in truth])


def _ilias(folder: SetFolder) -> Listing:
    """<object>/query/Q*.jpg and <object>/pos/P*.jpg."""
    parts = {'query': [], 'pos': []}
    for name in folder.names:
        if match := re.fullmatch(r'(?:.*/)?([^/]+)/(query|pos)/[QP]\w+\.jpe?g', name):
            parts[match[2]].append(Entry(name, instance=match[1]))
    return Listing(parts['pos'], parts['query'])


def _buildings(folder: SetFolder) -> Listing:
    """<name>_query.txt of image and box, <name>_good.txt, _ok.txt and _junk.txt; all images of the folder."""
    names = [Path(name).stem for name in folder.names]
    gallery = [Entry(name) for name in names if name not in _CORRUPT]
    lists = sorted(folder.path.rglob('*_query.txt'))
    queries = []
    for path in lists:
        (image, *box), = _rows(path, 5)
        stem = path.name.removesuffix('query.txt')
        good, fair, bad = (set(read_lines(path.with_name(f'{stem}{kind}.txt'), 'ground truth'))
                           for kind in ('good', 'ok', 'junk'))
        queries.append(Entry(image.removeprefix('oxc1_'), box=tuple(map(float, box)), relevant=good | fair, junk=bad))
    if not lists:
        raise FileNotFoundError(f'{folder.path} has no ground truth of {folder.benchmark.name} '
                                f'(all_souls_1_query.txt and so on); {folder.benchmark.source}.')
    return Listing(gallery, queries)


def _grocery(folder: SetFolder) -> Listing:
    """train/ and test/, <kind>/<product>/<photograph> below each; train.txt and test.txt are not needed."""
    parts = {'train': [], 'test': []}
    for name in folder.names:
        part, _, rest = name.removeprefix('dataset/').partition('/')
        if part in parts and rest.count('/') >= 2:
            *_, kind, product, _ = rest.split('/')
            parts[part].append(Entry(name, kind, product))
    if not all(parts.values()):
        raise FileNotFoundError(f'{folder.path} has no photographs in train/ and test/ of {folder.benchmark.name}; '
                                f'{folder.benchmark.source}.')
    return Listing(parts['train'], parts['test'])


def _ukbench(folder: SetFolder, number: int = 10_200) -> Listing:
    """Four photographs of each object, in full/ or elsewhere: ukbench00000.jpg to 00003, 00004 to 00007 and so on."""
    return Listing([Entry(f'ukbench{i:05}.jpg', instance=str(i // 4)) for i in range(number)])


_VGG = 'https://www.robots.ox.ac.uk/~vgg/data'
_DEEPFASHION = 'it is given out, against an agreement, at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion'
_METRIC_LEARNING = ('Recall@1', 'Recall@2', 'Recall@4', 'Recall@8', 'MAP@R')

LAYOUTS: dict[str, Layout] = {
    'folder': OwnGroups('an image set', 'give a folder with two or more images of each thing', None, ('mAP',),
                        published={}),
    'list': OwnList('a list of images', 'give list.csv or list.jsonl, with path, split, label of its images', None,
                    ('Recall@1', 'Recall@5', 'Recall@10', 'mAP', 'MAP@R', 'k-NN'), published={}),
    'cub200': Layout(
        'CUB-200-2011', 'CUB_200_2011.tgz is at https://data.caltech.edu/records/65de6-vp158', _cub, _METRIC_LEARNING,
        (5924, 5924), downloads=(RemoteFile('https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz'),)),
    'cars196': Layout(
        'Cars-196', 'its first address is gone: take a copy with cars_annos.mat and car_ims/, or with devkit/, '
        'cars_train/, cars_test/ and cars_test_annos_withlabels.mat', _cars, _METRIC_LEARNING, (8131, 8131)),
    'sop': Layout(
        'Stanford Online Products', 'Stanford_Online_Products.zip is linked at https://cvgl.stanford.edu/projects/'
        'lifted_struct', _products, ('Recall@1', 'Recall@10', 'Recall@100', 'Recall@1000', 'MAP@R'), (60_502, 60_502)),
    'inshop': Layout(
        'In-Shop Clothes Retrieval', f'{_DEEPFASHION}/InShopRetrieval.html', _inshop,
        ('Recall@1', 'Recall@10', 'Recall@20', 'Recall@30', 'MAP@R'), (14_218, 12_612), prefer='img'),
    'consumer2shop': Layout(
        'Consumer-to-Shop Clothes Retrieval', f'{_DEEPFASHION}/Consumer2ShopRetrieval.html', _consumer,
        ('Recall@1', 'Recall@10', 'Recall@20', 'Recall@50', 'MAP@R'), prefer='img'),
    'street2shop': Layout(
        'Street2Shop', 'photos.tar, the addresses of its photos, and meta.zip are at '
        'http://www.tamaraberg.com/street2shop; save each photo as <number>.jpg', _street,
        ('Recall@1', 'Recall@20')),
    'instre': Layout(
        'INSTRE', 'instre.tar.gz and gnd_instre.mat are at ftp://ftp.irisa.fr/local/texmex/corpus/instre', _instre,
        ('mAP',), (1250, 27_293), THUMBNAIL),
    'gldv2': Layout(
        'Google Landmarks v2', 'its index and test images, index.csv and retrieval_solution_v2.1.csv are at '
        'https://github.com/cvdfoundation/google-landmark', _landmarks, ('mAP@100',), (1129, 761_757), THUMBNAIL),
    'ilias': Layout(
        'ILIAS core', 'ilias_core.tar is at https://vrg.fel.cvut.cz/ilias_data', _ilias, ('mAP@1000',), (1232, 4715),
        {'kind': 'longer-side', 'interpolation': 'bicubic', 'exif': False},
        downloads=(RemoteFile('https://vrg.fel.cvut.cz/ilias_data/ilias_core.tar'),)),
    'oxford5k': Layout(
        'Oxford5k', f'oxbuild_images-v1.tgz and gt_files_170407.tgz are at {_VGG}/oxbuildings', _buildings, ('mAP',),
        (55, 5063), THUMBNAIL, downloads=(RemoteFile(f'{_VGG}/oxbuildings/oxbuild_images-v1.tgz', 'jpg'),
                                          RemoteFile(f'{_VGG}/oxbuildings/gt_files_170407.tgz', 'gt'))),
    'paris6k': Layout(
        'Paris6k', f'paris_1-v1.tgz, paris_2-v1.tgz and paris_120310.tgz are at {_VGG}/parisbuildings', _buildings,
        ('mAP',), (55, 6392), THUMBNAIL, downloads=(
            RemoteFile(f'{_VGG}/parisbuildings/paris_1-v1.tgz', 'jpg'),
            RemoteFile(f'{_VGG}/parisbuildings/paris_2-v1.tgz', 'jpg'),
            RemoteFile(f'{_VGG}/parisbuildings/paris_120310.tgz', 'gt'))),
    'grocery': Layout(
        'Grocery Store', 'its dataset/ is at https://github.com/marcusklasson/GroceryStoreDataset', _grocery,
        ('Recall@1', 'Recall@5', 'mAP', 'MAP@R', 'k-NN'), (2485, 2640), {}),
    'holidays': HOLIDAYS,
    # `Scalable recognition with a vocabulary tree`, Nistér and Stewénius 2006: how many of the four are among the first
    # four, the query itself one of them, so that the score starts at 1 for any system
    'ukbench': Layout(
        'UKBench', 'ukbench.zip, four images of each object, is at https://archive.org/details/ukbench', _ukbench,
        ('N-S',), (10_200, 10_200), Benchmark.published, 'full', (RemoteFile('https://archive.org/download/ukbench/ukbench.zip'),)),
}
