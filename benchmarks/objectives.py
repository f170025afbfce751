"""Classification only against joint training with uniform, row and batch negatives, over several seeds.

    python benchmarks/objectives.py --data-dir DIR [--seeds 0 1 2] [--img-size 64] [--epochs 16] [--results FILE]

Trains multigrain_resnet18 from scratch, as the demo its model, for every objective and seed ('batch' for the first seed
only) and prints mean and spread of top-1 and of the mAP of finding edited copies. Every finished training is kept in
the results file, so an interrupted run goes on where it stopped.
"""
import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import timm
import torch

from timm_multigrain.demo.run import measure
from timm_multigrain.demo.training import TrainSettings, open_pictures, protocol_of, train_model
from timm_multigrain.files import write_text
from timm_multigrain.loss import DistanceWeightedSampler

OBJECTIVES = {
    'classification only': dict(classif_weight=1.0),
    'joint, uniform': dict(sampling='uniform'),
    'joint, row': dict(sampling='row'),
    'joint, batch': dict(sampling='batch'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--img-size', type=int, default=TrainSettings.img_size)
    parser.add_argument('--epochs', type=int, default=16)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--classif-weight', type=float, default=TrainSettings.classif_weight)
    parser.add_argument('--results', type=Path, default=Path('objectives.json'))
    args = parser.parse_args()
    pictures = open_pictures(args.data_dir)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for seed in args.seeds:
        for name, options in OBJECTIVES.items():
            if name == 'joint, batch' and seed != args.seeds[0]:
                continue
            settings = TrainSettings(**{
                'model': 'multigrain_resnet18', 'num_repeats': 3, 'img_size': args.img_size, 'epochs': args.epochs,
                'lr': args.lr, 'seed': seed, 'classif_weight': args.classif_weight, **options})
            key = json.dumps({'objective': name, **dataclasses.asdict(settings)}, sort_keys=True)
            if key not in results:
                results[key] = _measure(f'{name}, seed {seed}', pictures, settings)
                write_text(args.results, json.dumps(results, indent=1))
    _print(results, args)


class CountingSampler(DistanceWeightedSampler):
    """Also counts the anchors whose negatives are drawn uniformly, as none has any weight."""
    uniform = anchors = 0

    def forward(self, embedding, target, **kwargs):
        probabilities, is_uniform = self.probabilities(embedding, target)
        self.uniform += int(is_uniform.sum())
        self.anchors += int((probabilities.sum(1) > 0).sum())
        return super().forward(embedding, target, **kwargs)


def _measure(name, pictures, settings) -> dict:
    start = time.perf_counter()
    sampler = None
    if settings.classif_weight < 1 and settings.sampling != 'uniform':
        sampler = CountingSampler(
            settings.sampling, max_positives=settings.num_repeats - 1, generator=settings.seed)
    model, history = train_model(name, pictures, settings, sampler)
    seconds = time.perf_counter() - start
    scores = measure(model, pictures.val, protocol_of(model, settings), settings.workers)
    last = {key: statistics.mean(values[-50:]) for key, values in history.items()}
    result = dict(top1=scores.top1, copy_map=scores.copy_ap.mean(), copy_map_of=scores.copy_map_of, last_50_steps=last,
                  uniform_share=sampler and sampler.uniform / sampler.anchors, seconds=seconds)
    print(f'{name}: top-1 {scores.top1:.1f}, copy mAP {scores.copy_ap.mean():.1f}, {seconds:.0f} s', flush=True)
    return result


def _print(results: dict, args) -> None:
    print(f'\n{args.img_size} px, {args.epochs} epochs, lr {args.lr}, lambda {args.classif_weight}; '
          f'torch {torch.__version__}, timm {timm.__version__}\n')
    print('| objective | seeds | top-1 % | copy mAP % | crop | rotate | mirror | strong | beta | uniform rows % |')
    print('|---|---|---|---|---|---|---|---|---|---|')
    wanted = {'img_size': args.img_size, 'epochs': args.epochs, 'lr': args.lr}
    for name in OBJECTIVES:
        rows = [r for k, r in results.items() if (s := json.loads(k))['objective'] == name
                and s['seed'] in args.seeds and all(s[n] == v for n, v in wanted.items())]
        if rows:
            kinds = [_mean([r['copy_map_of'][kind] for r in rows]) for kind in ('crop', 'rotate', 'mirror', 'strong')]
            beta = _mean([r['last_50_steps']['beta'] for r in rows if 'beta' in r['last_50_steps']], 2)
            uniform = _mean([100 * r['uniform_share'] for r in rows if r['uniform_share'] is not None])
            top1, copy_map = (_mean([r[n] for r in rows]) for n in ('top1', 'copy_map'))
            print('|', ' | '.join([name, str(len(rows)), top1, copy_map, *kinds, beta, uniform]), '|')


def _mean(values: list[float], digits: int = 1) -> str:
    if not values:
        return '–'
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


if __name__ == '__main__':
    main()
