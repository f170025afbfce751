"""Index real folders, search them, and search synthetic collections of up to a million images: exact, HNSW, IVF-PQ.

    python benchmarks/collection.py --model MODEL --data DIR... --work WORK [--sizes 10000 100000 1000000] [--plot PNG]

The real folders are indexed once from nothing and once more without a change. The synthetic descriptors are mixtures of
two real ones and noise, so that they crowd as real ones do; queries are more of the kind. Each structure is built, then
searched by a process of its own, one query at a time, and its recall@10 is that against exact search. What is measured
is kept in WORK, so that an interrupted run goes on where it stopped.
"""
import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import timing
import torch

from timm_multigrain.files import write_text
from timm_multigrain.index import Index, build_index
from timm_multigrain.index.ann import KINDS, update_structure
from timm_multigrain.index.records import RECORD
from timm_multigrain.index.store import Store, Writer
from timm_multigrain.measure.metrics import mean_average_precision

QUERIES, CHUNK, WARM = 200, 50_000, 20


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument('--model')
    parser.add_argument('--data', nargs='+', default=[])
    parser.add_argument('--ground-truth', type=Path, help='gt.json: path in a folder of the data -> group')
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--sizes', type=int, nargs='*', default=[10_000, 100_000, 1_000_000])
    parser.add_argument('--kinds', nargs='+', default=KINDS, choices=KINDS)
    parser.add_argument('--plot', type=Path)
    parser.add_argument('--measure', type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(threads=2)
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.measure, time.process_time if args.cpu_time else time.perf_counter)))
        return
    args = timing.start(parser, packages=('faiss-cpu',))
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / 'results.json'
    results = json.loads(kept.read_text()) if kept.exists() else {}
    steps = [('real', lambda: real(args))]
    steps += [(f'{kind} {size}', lambda size=size, kind=kind: synthetic(args, size, kind))
              for size in args.sizes for kind in args.kinds]
    for name, step in steps:
        if name not in results:
            results[name] = step()
            write_text(kept, json.dumps(results, indent=1))
    rows = [row for name, row in results.items() if name != 'real']
    timing.print_table([{'measure': k, 'value': v} for k, v in results['real'].items()])
    timing.finish(args, rows)
    if args.plot:
        plot(rows, args.plot)


def real(args) -> dict:
    """Images a second and bytes an image of the index, time of an update without changes, latency of searches."""
    folder = args.work / 'real'
    shutil.rmtree(folder, ignore_errors=True)
    before = processor_seconds()
    first = build_index(args.data, folder, args.model, progress=False)
    used = processor_seconds() - before
    again = build_index(args.data, folder, progress=False)
    index = Index.open(folder)
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


def synthetic(args, size: int, kind: str) -> dict:
    """One row: build the structure and search with it."""
    folder = args.work / f'synthetic-{size}'
    if not (folder / 'queries.npy').exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_synthetic(Index.open(args.work / 'real'), folder, size)
    print(f'{size:,} images, {kind}', flush=True)
    clock = time.process_time if args.cpu_time else time.perf_counter
    start = clock()
    with closing(Writer(Store(folder))) as writer:
        described = update_structure(writer, kind, progress=False)
    seconds = clock() - start
    output = subprocess.run(
        [sys.executable, __file__, '--work', str(args.work), '--measure', str(folder), '--threads', str(args.threads),
         *['--cpu-time'] * args.cpu_time], check=True, capture_output=True, text=True).stdout
    file_bytes = described['size'] if described else 0
    return {'images': size, 'kind': kind, 'build s': seconds if described else None,
            'file bytes an image': file_bytes / size if described else None, **json.loads(output),
            'stated recall': described['recall_at_10'] if described else None,
            'settings': str(described['settings']) if described else ''}


def write_synthetic(real: Index, folder: Path, size: int, seed: int = 0) -> None:
    """An index of mixtures of real descriptors, and queries.npy in it."""
    rng, vectors = np.random.default_rng(seed), np.asarray(real.vectors).astype(np.float32)
    folder.mkdir(parents=True)
    Writer.create(folder, real.store.config)
    writer = Writer(Store(folder))
    writer.add_root(b'/synthetic')
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        rows = np.zeros(count, dtype=RECORD)
        rows['width'], rows['height'], rows['bytes'], rows['classes'] = 640, 480, 100_000, -1
        rows['sha256'] = rng.integers(0, 256, (count, 32), dtype=np.uint8)
        writer.add([b'%08d.jpg' % i for i in range(start, start + count)], rows, mixtures(rng, vectors, count))
        writer.commit()
    writer.close()
    np.save(folder / 'queries.npy', mixtures(rng, vectors, QUERIES))


def mixtures(rng: np.random.Generator, vectors: np.ndarray, count: int) -> np.ndarray:
    share = rng.random((count, 1), dtype=np.float32)
    first, second = vectors[rng.integers(len(vectors), size=(2, count))]
    mixed = share * first + (1 - share) * second
    mixed += 0.02 * rng.standard_normal(mixed.shape, dtype=np.float32)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def measure(folder: Path, clock: Callable[[], float]) -> dict:
    """Latency, memory and recall of the index as it is, in a process that does nothing else."""
    start = clock()
    index = Index.open(folder)
    queries = np.load(folder / 'queries.npy')
    before = memory()
    index.search(queries[:1])
    first = clock() - start
    approximate = index.structure is not None
    queries = queries if approximate else queries[:max(WARM, min(QUERIES, 20_000_000 // len(index)))]
    index.search(queries[:WARM])
    seconds, found = [], []
    for query in queries:
        start = clock()
        found.append(index.search(query[None], 10)[1][0])
        seconds.append(clock() - start)
    own, mapped = memory()
    recall = 1.
    if approximate:
        truth = index.search(queries, 10, exact=True)[1]
        recall = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]))
    return {'ms a query': 1000 * float(np.median(seconds)), 'first query s': first, 'recall@10': recall,
            'own memory MiB': own - before[0], 'mapped MiB': mapped - before[1]}


def memory() -> tuple[float, float]:
    """Resident MiB of this process: its own, and of files that are mapped, which the system takes back when it must."""
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ('RssAnon', 'RssFile'))


def plot(rows: list[dict], path: Path) -> None:
    """Latency and memory over the size of the collection."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for axes, key, title in zip(figure.subplots(1, 2), ('ms a query', 'own memory MiB'),
                                ('Search, ms a query', 'Memory of the process, MiB'), strict=True):
        for kind, marker in zip(KINDS, 'os^', strict=True):
            points = sorted((row['images'], row[key]) for row in rows if row['kind'] == kind)
            axes.loglog(*zip(*points, strict=True), marker=marker, label=kind)
        axes.set(xlabel='images', title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
