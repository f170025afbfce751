"""Index real folders; update, search and compare synthetic collections of up to a million images, beside FAISS alone.

    python benchmarks/collection.py --work WORK [--sizes 10000 100000 1000000] [--cpu-time]
    python benchmarks/collection.py --work WORK --model MODEL --data DIR... [--ground-truth gt.json] --sizes

Synthetic descriptors have 512 dimensions and lie in clusters; one in a hundred is a copy of another. The index's own
writer writes them, and empty files stand for the pictures. Each structure is built, then searched by a process of its
own, one query at a time; so are FAISS' flat index and HNSW over the same descriptors. Then copies are looked for, what
a look at two pictures would say being known; FAISS' inverted file of as many cells searches for the same pairs. Then
a copy of the index is updated, without a change and with 1,000 new pictures. What is measured is kept in WORK, so that
an interrupted run goes on where it stopped. A million images take up to 9 GB there, which nobody deletes.
"""
import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import timing
import torch
from PIL import Image

from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import write_text
from timm_multigrain.index import Index, build_index
from timm_multigrain.index.ann import KINDS, TARGET_RECALL, import_faiss, update_structure
from timm_multigrain.index.dedup import FALSE_POSITIVES, CopySearch, identical_rows
from timm_multigrain.index.pairs import star_groups
from timm_multigrain.index.records import RECORD
from timm_multigrain.index.store import Store, Writer
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.models.open import open_model

QUERIES, CHUNK, WARM, DIM, CLUSTER, COPY_SHARE = 200, 50_000, 20, 512, 200, 0.01
FAISS = ('faiss flat', 'faiss hnsw')


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument('--model')
    parser.add_argument('--data', nargs='+', default=[])
    parser.add_argument('--ground-truth', type=Path, help='gt.json: path in a folder of the data -> group')
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--sizes', type=int, nargs='*', default=[10_000, 100_000, 1_000_000])
    parser.add_argument('--kinds', nargs='*', default=[*KINDS, *FAISS], choices=[*KINDS, *FAISS])
    parser.add_argument('--parts', nargs='*', default=list(PARTS), choices=PARTS)
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    parser.set_defaults(threads=2)
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(args.threads)
        import_faiss().omp_set_num_threads(args.threads)
        clock = processor_seconds if args.cpu_time else time.perf_counter
        measures = {'search': measure, **{kind: partial(measure_faiss, kind) for kind in FAISS}, **PARTS}
        print(json.dumps(measures[args.measure](args.work, clock)))
        return
    args = timing.start(parser, packages=('faiss-cpu',))
    import_faiss().omp_set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / 'results.json'
    results = json.loads(kept.read_text()) if kept.exists() else {}
    steps = [('real', lambda: real(args))] if args.data else []
    for size in args.sizes:
        steps += [(f'{kind} {size}', partial(search, args, size, kind)) for kind in args.kinds]
        steps += [(f'{part} {size}', partial(apart, args, size, part)) for part in args.parts]
    for name, step in steps:
        if name not in results:
            print(name, flush=True)
            results[name] = step()
            write_text(kept, json.dumps(results, indent=1))
    tables = {name: value for name, value in results.items() if name.rsplit(' ', 1)[0] in ('real', *PARTS)}
    for name, table in tables.items():
        timing.print_table([{name: k, 'value': v} for k, v in table.items()])
    rows = [row for name, row in results.items() if name not in tables]
    timing.finish(args, rows)


def real(args) -> dict:
    """Images a second and bytes an image of the index, time of an update without changes, latency of searches."""
    folder = args.work / 'real'
    shutil.rmtree(folder, ignore_errors=True)
    before = processor_seconds()
    first = build_index(args.data, folder, args.model, progress=False)
    used = processor_seconds() - before
    again = build_index(args.data, folder, progress=False)
    index = Index(folder)
    queries = np.asarray(index.vectors)[:: max(1, len(index) // QUERIES)].copy()
    files = {path.name.split('.')[0]: path.stat().st_size for path in folder.iterdir()}
    picture = index.paths[len(index) // 2]
    index.search_images([picture])
    seconds = timing.interleave({
        'descriptor': lambda: index.search(queries[:1]), 'picture': lambda: index.search_images([picture])}, 9)
    result = {
        'images': first.images, 'files skipped': len(first.skipped), 'seconds': first.seconds,
        'images a second': first.new / first.seconds, 'processor ms an image': 1000 * used / first.new,
        'update without changes, s': again.seconds,
        'bytes an image': sum(files.values()) / first.images, 'of them the descriptor': files['vectors'] / first.images,
        'search with a descriptor, ms': 1000 * seconds['descriptor'],
        'search with a picture, ms': 1000 * seconds['picture']}
    if args.ground_truth:
        result |= search_map(index, args.ground_truth)
    return result


def processor_seconds() -> float:
    """Of this process and the ones it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def search_map(index: Index, ground_truth: Path) -> dict:
    """mAP in % of each set of the ground truth among its own images, every image a query, itself ignored."""
    groups = json.loads(ground_truth.read_text())
    row_of = {path: row for row, path in enumerate(index.paths)}
    result = {}
    for name in sorted({path.split('/')[0] for path in groups}):
        images = [(row_of[str((ground_truth.parent / path).resolve())], group)
                  for path, group in groups.items() if path.split('/')[0] == name and group != -2]
        rows, labels = np.array([row for row, _ in images]), np.array([group for _, group in images])
        vectors = index.vectors[rows]
        relevant = [np.flatnonzero((labels == label) & (np.arange(len(rows)) != i)) for i, label in enumerate(labels)]
        queries = [i for i, label in enumerate(labels) if label >= 0 and len(relevant[i])]
        scores = mean_average_precision(
            vectors[queries] @ vectors.T, [relevant[i] for i in queries], [[i] for i in queries])
        result[f'mAP of {name}, % ({len(queries)} queries, {len(rows)} images)'] = 100 * scores.map
    return result


def search(args, size: int, kind: str) -> dict:
    """One row: build the structure and search with it."""
    described, seconds = None, None
    if kind in KINDS:
        folder, clock = prepared(args, size), processor_seconds if args.cpu_time else time.perf_counter
        start = clock()
        with closing(Writer(Store(folder))) as writer:
            described = update_structure(writer, kind, progress=False)
        seconds = clock() - start
    found = apart(args, size, kind if kind in FAISS else 'search')
    row = {'images': size, 'kind': kind, 'build s': seconds if described else None, **found}
    if described:
        row |= {'file bytes an image': described['size'] / size, 'stated recall': described['recall_at_10'],
                'settings': str(described['settings'])}
    return row


def apart(args, size: int, what: str) -> dict:
    """What a process that does nothing else measures."""
    command = [sys.executable, __file__, '--work', str(prepared(args, size)), '--measure', what, '--threads',
               str(args.threads), *['--cpu-time'] * args.cpu_time]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def prepared(args, size: int) -> Path:
    """The index of a synthetic collection: pictures, files that stand for pictures, and queries.npy in it."""
    folder = args.work / f'synthetic-{size}'
    if (folder / 'queries.npy').exists():
        return folder
    pictures, rng = args.work / f'pictures-{size}', np.random.default_rng(0)
    for path in (folder, pictures):
        shutil.rmtree(path, ignore_errors=True)
    draw_pictures(pictures / 'first', 16)
    model = open_model('multigrain_resnet18', pretrained=False, num_classes=0)
    build_index([pictures], folder, model, Protocol(64), progress=False)
    shutil.rmtree(pictures / 'first')
    centres = spectrum(rng, max(1, size // CLUSTER))
    with closing(Writer(Store(folder))) as writer:
        writer.remove(range(16))
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            names = [b'%05d/%08d.jpg' % (i // 1000, i) for i in range(start, start + count)]
            rows, vectors = np.zeros(count, dtype=RECORD), members(rng, centres, count)
            copies = int(COPY_SHARE * count)
            vectors[-copies:] = unit(vectors[:copies] + 0.3 * unit(spectrum(rng, copies)))
            rows['width'], rows['height'], rows['bytes'], rows['classes'] = 640, 480, 100_000, -1
            rows['mtime_ns'], rows['sha256'] = 10 ** 18, rng.integers(0, 256, (count, 32), dtype=np.uint8)
            writer.add(names, rows, vectors)
            writer.commit()
            for name in names:
                path = pictures / os.fsdecode(name)
                if path.name.endswith('000.jpg'):
                    path.parent.mkdir(exist_ok=True)
                os.mknod(path)
                os.truncate(path, 100_000)
                os.utime(path, ns=(10 ** 18, 10 ** 18))
    np.save(folder / 'queries.npy', members(rng, centres, QUERIES))
    return folder


def draw_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).resize((64, 64)).save(folder / f'{i}.jpg')


def spectrum(rng: np.random.Generator, count: int) -> np.ndarray:
    """Gaussian rows whose variances fall as those of trained networks do, (count, 512) float32."""
    return rng.standard_normal((count, DIM), dtype=np.float32) / np.arange(1, DIM + 1, dtype=np.float32) ** 0.5


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def members(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    return unit(centres[rng.integers(len(centres), size=count)] + 0.8 * spectrum(rng, count))


def copies_of(rows: np.ndarray, size: int) -> np.ndarray:
    """The image that each one is a copy of, itself if it is none."""
    chunk = np.minimum(CHUNK, size - rows // CHUNK * CHUNK)
    place, copies = rows % CHUNK, (COPY_SHARE * chunk).astype(int)
    return np.where(place >= chunk - copies, rows - chunk + copies, rows)


def measure(folder: Path, clock) -> dict:
    """Latency, memory and recall of the index as it is."""
    before, start = memory(), clock()
    index = Index(folder)
    opened = clock() - start
    queries = np.load(folder / 'queries.npy')
    start = clock()
    index.search(queries[:1])
    first = clock() - start
    approximate = index.structure is not None
    queries = queries if approximate else queries[:max(WARM, min(QUERIES, 20_000_000 // len(index)))]
    found, milliseconds = one_by_one(lambda query: index.search(query, 10)[1], queries, clock)
    own = memory() - before
    truth = index.search(queries, 10, exact=True)[1] if approximate else found
    return {'open s': opened, 'first query s': first, 'ms a query': milliseconds, 'recall@10': recall(found, truth),
            'own memory MiB': own}


def measure_faiss(kind: str, folder: Path, clock) -> dict:
    """The same of FAISS alone, whose index is in memory."""
    faiss, before, queries = import_faiss(), memory(), np.load(folder / 'queries.npy')
    vectors = np.memmap(next(folder.glob('vectors.*.bin')), np.float32, 'r').reshape(-1, DIM)
    start = clock()
    index = faiss.IndexFlatIP(DIM)
    if kind == 'faiss hnsw':
        index = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
    for first in range(0, len(vectors), CHUNK):
        index.add(vectors[first:first + CHUNK])
    built, result = clock() - start, {}
    truth = folder / 'truth.npy'
    if kind == 'faiss flat':
        np.save(truth, index.search(queries, 10)[1])
        queries, efs = queries[:max(WARM, 20_000_000 // len(vectors))], [None]
    else:
        efs = [16, 32, 64, 128, 256, 512]
    for ef in efs:
        if ef:
            index.hnsw.efSearch, result['settings'] = ef, str({'links': 32, 'ef': ef})
        found, milliseconds = one_by_one(lambda query: index.search(query, 10)[1], queries, clock)
        share = recall(found, np.load(truth)[:len(queries)])
        if share >= TARGET_RECALL:
            break
    return {'build s': built, 'ms a query': milliseconds, 'recall@10': share, 'own memory MiB': memory() - before,
            **result}


def one_by_one(function, queries: np.ndarray, clock) -> tuple[list, float]:
    """What was found for each, and the median milliseconds."""
    seconds, found = [], []
    for query in [*queries[:WARM], *queries]:
        start = clock()
        found.append(function(query[None])[0])
        seconds.append(clock() - start)
    return found[-len(queries):], 1000 * float(np.median(seconds[-len(queries):]))


def recall(found, truth) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]))


def measure_copies(folder: Path, clock) -> dict:
    """Everything that dedup does before and after looking at pictures, and FAISS searching for the same pairs."""
    faiss, looked = import_faiss(), itertools.count()

    class Search(CopySearch):
        def _alike(self, i: int, j: int) -> bool:
            next(looked)
            return bool(source[i] == source[j])

        def _small(self) -> np.ndarray:  # there are no pictures to read
            return np.zeros((len(self.index), 1), dtype=np.float16)

    index = Index(folder)
    source, result, before = copies_of(np.arange(len(index)), len(index)), {}, memory()

    def timed(name: str, function):
        start = clock()
        value = function()
        result[name] = clock() - start
        print(name, result[name], file=sys.stderr)
        return value

    timed('identical files, s', lambda: identical_rows(index))
    search = timed('thresholds, s', lambda: Search(index, None, FALSE_POSITIVES, look=True))
    pairs = timed('pairs, s', search.pairs)
    groups = timed('groups, s', lambda: star_groups(pairs, np.arange(len(index))))
    copies = np.flatnonzero(source != np.arange(len(index)))
    good = source[pairs.first] == source[pairs.second]
    limits = search.thresholds
    result |= {
        'own memory at the end, MiB': memory() - before, 'pairs of pictures to look at': next(looked),
        'certain and possible from': f'{limits.certain:.3f}, {limits.possible:.3f}', 'groups': len(groups),
        'copies found, %': 100 * len(np.intersect1d(pairs.rows(), copies)) / len(copies),
        'of all pairs that are of copies, %': 100 * float(good.mean())}
    cells, sample = int(2 * len(index) ** 0.5), slice(0, len(index), max(1, len(index) // 5000))
    inverted = faiss.index_factory(search.vectors.shape[1], f'IVF{cells},Flat', faiss.METRIC_INNER_PRODUCT)
    inverted.cp.max_points_per_centroid, inverted.cp.niter, inverted.nprobe = 32, 6, 17

    def build():
        inverted.train(np.array(search.vectors[::max(1, len(index) // (32 * cells))]))
        for start in range(0, len(index), CHUNK):
            inverted.add(np.array(search.vectors[start:start + CHUNK]))

    timed('FAISS: inverted file, s', build)
    queries = np.array(search.vectors[sample])
    timed('FAISS: pairs, s', lambda: inverted.range_search(queries, limits.possible))
    result['FAISS: pairs, s'] *= len(index) / len(queries)
    return result


def measure_update(folder: Path, clock) -> dict:
    """An update without a change, and one with 1,000 new pictures, beside an index of these alone."""
    pictures, result = folder.with_name(folder.name.replace('synthetic', 'pictures')), {}
    new, updated, alone = pictures / 'new', folder.with_name('updated'), folder.with_name('alone')
    for path in (new, updated, alone):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder, updated)
    kind = (Store(updated).faiss or {'kind': 'exact'})['kind']

    def update(name: str, dirs: Path, out: Path, *model):
        start = clock()
        report = build_index([dirs], out, *model, kind=kind, workers=0, progress=False)
        result[name] = clock() - start
        print(report, file=sys.stderr)

    update('update without a change, s', pictures, updated)
    draw_pictures(new, 1000)
    update('update with 1,000 new pictures, s', pictures, updated)
    update('an index of the 1,000 alone, s', new, alone, str(folder / 'model'), Protocol(64))
    for path in (new, updated, alone):
        shutil.rmtree(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**result, 'most memory of the process, MiB': peak}


PARTS = {'copies': measure_copies, 'update': measure_update}


def memory() -> float:
    """MiB that this process holds, without files that are mapped, which the system takes back when it must."""
    return int(Path('/proc/self/status').read_text().partition('RssAnon:')[2].split()[0]) / 1024


if __name__ == '__main__':
    main()
