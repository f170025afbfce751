"""Measures of retrieval against sorting the whole database for every query: time, memory, equality.

    python benchmarks/evaluation.py [--cases 70x5000 70x1000000 ukb] [--json FILE]
    python benchmarks/evaluation.py --cases products-ours products-faiss --rounds 1 --cpu-time

The peer is written here the plain way: argsort of each row, then the positions of the labelled images in it. For the
revisited measures a query has 40 easy, 60 hard and 30 junk images that score higher than the rest, all scores distinct
float32; for the UKBench score there are 10,200 x 10,200 float32 scores, the four of a group higher. Memory is numpy's
peak (tracemalloc) beyond the scores.

products: as many images as the test set of Stanford Online Products has, of 11,316 products, 512 dimensions, each image
a query among the others: Recall@1, 10, 100, 1000 and MAP@R, by counting ('ours'), and from the 1001 nearest of FAISS'
flat index. Memory is the most that the process holds, beyond what it held before (Linux).
"""
import tracemalloc
from pathlib import Path

import numpy as np
import timing

from timm_multigrain.measure.metrics import RevisitedQuery, mean_average_precision, revisited_scores, ukb_score
from timm_multigrain.search.exact import SimilarityChunks

KAPPAS = (1, 5, 10)
PROTOCOLS = {'Easy': (('easy',), ('hard', 'junk')), 'Medium': (('easy', 'hard'), ('junk',)),
             'Hard': (('hard',), ('easy', 'junk'))}
NUM_LABELLED = 130


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=3)
    parser.add_argument('--cases', nargs='*', default=['70x5000', '70x1000000', 'ukb'], metavar='QxN')
    args = timing.start(parser, packages=('numpy',))
    rows = [ukb_row(args) if case == 'ukb' else products_row(case, args) if case.startswith('products') else
            revisited_row(*map(int, case.split('x')), args) for case in args.cases]
    timing.finish(args, rows)


def revisited_row(num_queries: int, num_items: int, args) -> dict:
    scores, queries = make_revisited(num_queries, num_items)
    seconds = timing.interleave({'ours': lambda: revisited_scores(scores, queries),
                                 'full sort': lambda: plain_revisited(scores, queries)}, args.rounds)
    ours, plain = revisited_scores(scores, queries), plain_revisited(scores, queries)
    difference = max(
        max(np.abs(ours[name].ap - plain[name][0]).max(),
            *(abs(ours[name].mp_at(k) - row.mean()) for k, row in zip(KAPPAS, plain[name][1:], strict=True)))
        for name in PROTOCOLS)
    return row(f'revisited, {num_queries} x {num_items}', seconds, difference,
               peak(lambda: revisited_scores(scores, queries)))


def ukb_row(args, num_images: int = 10_200) -> dict:
    rng = np.random.default_rng(0)
    scores, groups = rng.standard_normal((num_images, num_images), dtype=np.float32), np.arange(num_images) // 4
    for member in range(4):
        scores[np.arange(num_images), 4 * groups + member] += 3
    seconds = timing.interleave({'ours': lambda: ukb_score(scores, groups),
                                 'full sort': lambda: plain_ukb(scores, groups)}, args.rounds)
    difference = abs(ukb_score(scores, groups) - plain_ukb(scores, groups).mean())
    return row(f'UKBench, {num_images}', seconds, float(difference), peak(lambda: ukb_score(scores, groups)))


def products_row(case: str, args, num_queries: int = 60_502, dim: int = 512) -> dict:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(11_316).repeat(2), rng.integers(0, 11_316, num_queries - 2 * 11_316)])
    vectors = rng.standard_normal((11_316, dim), dtype=np.float32)[labels]
    vectors += 3 * rng.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    measure = {'products-ours': count_products, 'products-faiss': faiss_products}[case]
    Path('/proc/self/clear_refs').write_text('5')  # the most that is held begins anew
    before, start = held('VmRSS'), timing.clock()
    figures = measure(vectors, labels)
    return {'case': case, 's': timing.clock() - start, 'MiB beyond the vectors': (held('VmHWM') - before) / timing.MIB,
            **{name: f'{100 * value:.3f}' for name, value in figures.items()}}


def count_products(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    members = np.split(np.argsort(labels, kind='stable'), np.cumsum(np.bincount(labels))[:-1])
    relevant = [members[label][members[label] != query] for query, label in enumerate(labels)]
    found = mean_average_precision(SimilarityChunks(vectors, vectors), relevant, np.arange(len(vectors))[:, None])
    return {**{f'Recall@{k}': found.recall_at(k) for k in (1, 10, 100, 1000)}, 'MAP@R': found.map_at_r}


def faiss_products(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import faiss

    faiss.omp_set_num_threads(1)
    counts, index, sums = np.bincount(labels) - 1, faiss.IndexFlatIP(vectors.shape[1]), {}
    index.add(vectors)
    for start in range(0, len(vectors), 1024):
        own = labels[start:start + 1024]
        _, nearest = index.search(vectors[start:start + 1024], 1001)
        for query, (label, items) in enumerate(zip(own, nearest, strict=True), start):
            hits, number = labels[items[items != query]][:1000] == label, counts[label]
            precisions = hits[:number].cumsum() / np.arange(1, number + 1)
            figures = {f'Recall@{k}': hits[:k].any() for k in (1, 10, 100, 1000)}
            for name, value in {**figures, 'MAP@R': (precisions * hits[:number]).sum() / number}.items():
                sums[name] = sums.get(name, 0) + value / len(vectors)
    return sums


def held(name: str) -> int:
    """Bytes of memory that the process holds (VmRSS), or held at most (VmHWM)."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition(f'{name}:')[2].split()[0])


def row(case: str, seconds: dict[str, float], difference: float, memory: int) -> dict:
    return {'case': case, 'full sort ms': 1000 * seconds['full sort'], 'ours ms': 1000 * seconds['ours'],
            'ratio': seconds['ours'] / seconds['full sort'], 'largest difference': f'{difference:.1e}',
            'MiB beyond the scores': memory / timing.MIB}


def make_revisited(num_queries: int, num_items: int) -> tuple[np.ndarray, list[RevisitedQuery]]:
    """Distinct scores; the labelled images are among the first 5000, as distractors come after them."""
    rng = np.random.default_rng(0)
    values = np.unique(rng.standard_normal(num_items + num_items // 2 + 100, dtype=np.float32))
    values = np.sort(rng.permutation(values)[:num_items])
    scores, queries = np.empty((num_queries, num_items), dtype=np.float32), []
    for query in range(num_queries):
        labelled = rng.permutation(min(num_items, 5000))[:NUM_LABELLED]
        queries.append(RevisitedQuery(labelled[:40], labelled[40:100], labelled[100:]))
        wanted = rng.standard_normal(num_items, dtype=np.float32)
        wanted[labelled] += 2
        scores[query, np.argsort(wanted)] = values
    return scores, queries


def plain_revisited(scores: np.ndarray, queries: list[RevisitedQuery]) -> dict[str, np.ndarray]:
    """Average precision and precisions at k, (1 + K, Q) for each protocol, from full rankings."""
    rankings = np.argsort(-scores, axis=1)
    results = {}
    for name, (looked_for, left_out) in PROTOCOLS.items():
        columns = []
        for ranking, query in zip(rankings, queries, strict=True):
            kept = ranking[~np.isin(ranking, np.concatenate([getattr(query, part) for part in left_out]))]
            wanted = np.concatenate([getattr(query, part) for part in looked_for])
            ranks = np.flatnonzero(np.isin(kept, wanted))
            found = np.arange(len(ranks))
            before = np.where(ranks == 0, 1, found / np.maximum(ranks, 1))
            ap = ((before + (found + 1) / (ranks + 1)) / 2).sum() / len(wanted)
            depths = [min(k, ranks[-1] + 1) for k in KAPPAS]
            columns.append([ap, *((ranks < depth).sum() / depth for depth in depths)])
        results[name] = np.array(columns).T
    return results


def plain_ukb(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    first = np.argsort(-scores, axis=1)[:, :4]
    return (groups[first] == groups[:, None]).sum(1)


def peak(function) -> int:
    tracemalloc.start()
    function()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


if __name__ == '__main__':
    main()
