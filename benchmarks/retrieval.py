"""What re-ranking and linear adaptation gain on real photographs, and what they lose where descriptors are weak.

    python benchmarks/retrieval.py --model MODEL --work-dir CACHE --sizes 128 224 320 \
        --data folder:GROCERY:gt.json ukbench:UKB rparis6k:PARIS:gnd.json copies:PHOTOS
    python benchmarks/retrieval.py --model MODEL --work-dir CACHE --sizes 224 --adapt TRAIN TEST
    python benchmarks/retrieval.py --model MODEL ... --work-dir CACHE --csv benchmarks/retrieval.csv --data ...

--data takes KIND:FOLDER[:GROUND-TRUTH]; copies are edited copies (those of `dedup --measure`) of every fourth
photograph of a folder, each original a query. Every query is left out of all refinements. Embeddings stay in CACHE.
--csv writes the figures of each trunk with each pooling in place of the tables.
"""
import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from timm_multigrain import Protocol, evaluate, extract, fit_adaptation, fit_whitening, l2_normalize, open_model
from timm_multigrain.images.copies import make_copies
from timm_multigrain.images.sources import find_images
from timm_multigrain.measure.benchmarks import Benchmark, load_benchmark
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.search.exact import SimilarityChunks
from timm_multigrain.search.local import FeaturesOf, LocalDescriber, VerifiedChunks
from timm_multigrain.search.rerank import RerankedChunks, alpha_query_expansion, database_augmentation
from timm_multigrain.whiten.fit import matching_pairs, with_constant

NUM_PHOTOS = 80
POOLINGS = ('gem', 'mac', 'spoc', 'rmac', 'crow', 'avg', 'trunk')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', required=True, nargs='+', help='several for --csv')
    add('--data', nargs='*', default=[], metavar='KIND:FOLDER[:TRUTH]')
    add('--adapt', nargs=2, metavar=('TRAIN', 'TEST'), help='folders of groups')
    add('--sizes', nargs='+', type=int, default=[224])
    add('--p', type=float, default=3.)
    add('--seeds', nargs='+', type=int, default=[0, 1, 2])
    add('--csv', type=Path, metavar='FILE', help='poolings side by side, GeM with --p')
    add('--random', action='store_true', help='also the network with random weights')
    add('--layers', nargs='*', type=int, default=[], help='also the maps of these stages, as timm numbers them')
    add('--local', action='store_true', help='also verified by details')
    add('--work-dir', type=Path, required=True)
    args = parser.parse_args()
    if args.csv:
        write_csv(args)
        return
    args.model, = args.model
    model = open_model(args.model, p=args.p)
    systems = {'last map': model} | {f'stage {i}': stage_of(args, i) for i in args.layers}
    if args.random:
        torch.manual_seed(0)
        systems['random weights'] = open_model(model.trunk_name, p=args.p, pretrained=False, pool='gem')
    if args.data:
        columns = ['first ranking', *REFINEMENTS, *VERIFIED * args.local, 're-ranked queries']
        print(f'| set | descriptor | size | {" | ".join(columns)} |')
        print('|---|---|---|' + '---|' * len(columns))
    for given in args.data:
        benchmark = load(given, args)
        for name, system in systems.items():
            for size in args.sizes:
                print_refinements(benchmark, name, system, Protocol.for_model(system, size=size), args)
    if args.adapt:
        print_adaptation(model, args)


def load(given: str, args: argparse.Namespace) -> Benchmark:
    """The benchmark that KIND:FOLDER[:TRUTH] names."""
    kind, folder, *truth = given.split(':')
    return copies_of(Path(folder), args.work_dir) if kind == 'copies' else load_benchmark(
        kind, folder, ground_truth=(truth or [None])[0], subset=kind != 'folder')


def write_csv(args: argparse.Namespace) -> None:
    """Figures of each trunk with each pooling, at the first size, longer side; no whitening, no re-ranking."""
    models = {model.trunk_name: model for model in map(open_model, args.model)}
    rows = []
    for given in args.data:
        result = evaluate(
            models, load(given, args), protocols=lambda model: Protocol.for_model(model, size=args.sizes[0]),
            poolings=POOLINGS, exponents=[args.p], work_dir=args.work_dir, workers=0)
        for number, system in enumerate(result.systems):
            trunk, pooling = list(models)[number // len(POOLINGS)], POOLINGS[number % len(POOLINGS)]
            rows += [(trunk, metric.dataset, pooling, args.p if pooling == 'gem' else '', metric.size, metric.metric,
                      metric.split or '', f'{metric.value:.2f}') for metric in system.metrics
                     if 'mP@' not in metric.metric]
        print(result, flush=True)
    with open(args.csv, 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['trunk', 'benchmark', 'pooling', 'p', 'size', 'metric', 'split', 'value'])
        writer.writerows(rows)


def stage_of(args: argparse.Namespace, index: int) -> torch.nn.Module:
    """The model with an earlier map in place of the last one."""
    model = open_model(args.model, p=args.p)
    model.reset_classifier(0)
    model.head.embed_dim = model.trunk.feature_info[index]['num_chs']

    def early(x: torch.Tensor) -> torch.Tensor:
        return model.trunk.forward_intermediates(x, indices=[index], intermediates_only=True)[0].abs()

    model.forward_features = early
    return model


def copies_of(folder: Path, work_dir: Path) -> Benchmark:
    """Edited copies of photographs, in a folder of their own; the originals are the queries."""
    images, out = find_images(folder), work_dir / 'copies'
    for i in range(0, len(images), 4)[:NUM_PHOTOS]:
        where = out / Path(images.names[i]).stem
        if not where.is_dir():
            where.mkdir(parents=True)
            image = images.load(i).convert('RGB')
            for name, copy in {'original': image, **make_copies(image)}.items():
                copy.save(where / f'{name}.png')
    found = load_benchmark('folder', out)
    rows = [row for row, name in enumerate(found.database.names) if name.endswith('original.png')]
    wanted, ignore = ([lists[row] for row in rows] for lists in (found.wanted, found.ignore))
    return replace(found, title='edited copies', query_rows=np.array(rows), wanted=wanted, ignore=ignore)


def describe(model: torch.nn.Module, source, protocol: Protocol, name: str, args: argparse.Namespace) -> torch.Tensor:
    """Pooled embeddings, kept in a folder."""
    folder = args.work_dir / f'{name}-{protocol.size}-{source.fingerprint()[:12]}'.replace(' ', '-')
    return extract(model, source, protocol, folder, descriptor=False, workers=0).vectors


def superglobal(queries: torch.Tensor, database: torch.Tensor, k: int = 10, beta: float = 0.15) -> torch.Tensor:
    """Re-ranking of the top 400 by `Global features are all you need`, Shao et al. 2023, equations 4 to 7."""
    scores = queries @ database.T
    for row, query in zip(scores, queries, strict=True):
        top = row.topk(min(400, len(database))).indices
        first = database[top]
        values, near = (first @ first.T).topk(min(k, len(top)))
        weights = torch.cat([torch.ones(len(top), 1), beta * values[:, 1:]], 1)
        refined = (weights[:, None] @ first[near])[:, 0] / weights.sum(1, keepdim=True)
        own = refined @ query
        expanded = torch.cat([query[None], first[own.topk(min(k, len(top))).indices]]).amax(0)
        row -= 100
        row[top] = (own + first @ expanded) / 2
    return scores


def refined(k: int, qe: bool = True, dba: bool = True):
    """Expansion and augmentation as published, alpha = 3."""
    def scores(queries: torch.Tensor, database: torch.Tensor) -> torch.Tensor:
        if dba:
            database = database_augmentation(database, k)
        return (alpha_query_expansion(queries, database, k) if qe else queries) @ database.T

    return scores


REFINEMENTS = {
    'QE k=3': refined(3, dba=False), 'DBA k=3': refined(3, qe=False), 'both k=3': refined(3), 'both k=9': refined(9),
    'SuperGlobal': superglobal, 'rerank 3': 3, 'rerank 9': 9, 'rerank auto': 'auto'}
VERIFIED = ['local', 'local after rerank auto']


def print_refinements(benchmark, name: str, model: torch.nn.Module, protocol: Protocol, args) -> None:
    """A row of the table: mAP of the first ranking, and what each refinement adds."""
    database = l2_normalize(describe(model, benchmark.database, protocol, f'{name}-{benchmark.title}', args))
    if benchmark.query_rows is None:
        queries, rows = l2_normalize(describe(model, benchmark.queries, protocol, f'{name}-queries', args)), None
    else:
        rows = torch.as_tensor(benchmark.query_rows)
        queries = database[rows]

    def measured(scores: torch.Tensor) -> float:
        return 100 * mean_average_precision(scores, benchmark.relevant, benchmark.ignore).map

    def without_query(refine) -> torch.Tensor:
        if rows is None:
            return refine(queries, database)
        scores = torch.full((len(queries), len(database)), -1000.)
        for i, row in enumerate(rows.tolist()):
            others = torch.arange(len(database)) != row
            scores[i, others] = refine(queries[i:i + 1], database[others])[0]
        return scores

    first, gains, done = measured(queries @ database.T), [], 0
    for refine in REFINEMENTS.values():
        if callable(refine):
            gains.append(measured(without_query(refine)) - first)
        else:
            chunks = RerankedChunks(queries, database, rows, refine)
            gains.append(measured(torch.cat(list(chunks), 1)) - first)
            done = sum(agreement >= 0.5 for agreement in chunks.agreements)
    if args.local:
        describer = LocalDescriber(model, protocol, workers=0).fit(benchmark.database)
        details = FeaturesOf(describer, benchmark.database)
        asked = details(rows.tolist()) if benchmark.queries is None else list(describer.describe(benchmark.queries))
        for scores in (SimilarityChunks(queries, database), RerankedChunks(queries, database, rows)):
            gains.append(measured(torch.cat(list(VerifiedChunks(scores, asked, details)), 1)) - first)
    print(f'| {benchmark.title} | {name} | {protocol.size} | {first:.1f} | '
          f'{" | ".join(f"{gain:+.1f}" for gain in gains)} | {done} of {len(queries)} |', flush=True)


def print_adaptation(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """mAP on the test images of what was fitted on the training images."""
    train, test = (load_benchmark('folder', folder) for folder in args.adapt)
    print('| size | GeM | PCA whitening | to 512 | learned whitening | to 512 | adapt |\n|---|---|---|---|---|---|---|')
    for size in args.sizes:
        protocol = Protocol.for_model(model, size=size)
        groups = train.groups
        fitted_on = describe(model, train.database, protocol, 'train', args)
        tested = describe(model, test.database, protocol, 'test', args)

        def measured(fit=None, tested=tested) -> float:
            vectors = tested if fit is None else (with_constant(tested) - fit.mean) @ fit.proj
            vectors = l2_normalize(vectors.float())
            scores = vectors[test.query_rows] @ vectors.T
            return 100 * mean_average_precision(scores, test.relevant, test.ignore).map

        def spread(fits) -> str:
            values = [measured(fit) for fit in fits]
            return f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}'

        columns = [f'{measured():.1f}', *(f'{measured(fit_whitening(fitted_on, dim)):.1f}' for dim in (None, 512))]
        columns += [spread([fit_whitening(fitted_on, dim, pairs=matching_pairs(groups, seed)) for seed in args.seeds])
                    for dim in (None, 512)]
        columns.append(spread([fit_adaptation(fitted_on, groups, seed=seed) for seed in args.seeds]))
        print(f'| {size} | {" | ".join(columns)} |', flush=True)


if __name__ == '__main__':
    main()
