"""A trained trunk at several test sizes and exponents p, and whitened: what the paper claims beside what is seen.

    python benchmarks/real_sizes.py --trunk WEIGHTS --photos DIR --fit DIR --work-dir OUT \
        [--paris DIR] [--ukbench DIR] [--groups DIR] [--model tf_efficientnet_lite0]

WEIGHTS are timm's, of 1000 classes. --photos: files whose names begin with the WordNet number of their class, such as
n01440764_tench.jpg. --fit: images for the whitening, at least two more than the embedding has channels. --groups: a
folder of each object. Embeddings are kept in OUT, so that a run that was cut off goes on.
"""
import argparse
from pathlib import Path

import timm
from real_trunk import paris_subset, ukbench_score
from timm.data import ImageNetInfo

from timm_multigrain import Protocol, evaluate, open_images, register_multigrain, tune_p, whiten_model
from timm_multigrain.measure.benchmarks import load_benchmark
from timm_multigrain.models import MultiGrain

GRID = 1., 1.5, 2., 2.5, 3., 4.
SIZES = ('crop', 224), ('longer-side', 224), ('longer-side', 320), ('longer-side', 500)
WHITENINGS = {'none': None, 'PCA': {}, 'PCA, OAS': {'shrinkage': 'oas'}, 'PCA, 256 dimensions': {'dim': 256}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trunk', type=Path, required=True)
    parser.add_argument('--model', default='tf_efficientnet_lite0')
    parser.add_argument('--photos', type=Path, required=True)
    parser.add_argument('--fit', type=Path, required=True)
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--paris', type=Path, help='with gnd_rparis6k_subset.json')
    parser.add_argument('--ukbench', type=Path)
    parser.add_argument('--groups', type=Path)
    args = parser.parse_args()
    register_multigrain(args.model)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    classify(args)
    retrieve(args)


def create(args: argparse.Namespace, p: float) -> MultiGrain:
    return timm.create_model(f'multigrain_{args.model}', checkpoint_path=str(args.trunk), gem_p=p).eval()


def classify(args: argparse.Namespace) -> None:
    """Top-1 at each size and p."""
    photos, wnids = open_images(args.photos), ImageNetInfo().label_names()
    photos.labels = [wnids.index(Path(name).name.split('_')[0]) for name in photos.names]
    model = create(args, 1.)
    print(f'top-1 %, {len(photos)} photographs\n')
    print('| |', ' | '.join(f'p = {p:g}' for p in GRID), '|')
    print('|---' * (len(GRID) + 1) + '|')
    for kind, size in SIZES:
        result = tune_p(model, photos, Protocol.for_model(model, kind, size=size), grid=GRID, finetune=False)
        print(f'| {kind} {size} |', ' | '.join(f'{100 * value:.1f}' for value in result.values), '|', flush=True)
    print(f'\nnoise of a difference to p = 1 at {size}:', ', '.join(f'{100 * value:.1f}' for value in result.noise))


def retrieve(args: argparse.Namespace) -> None:
    """mAP before and after whitening, at p = 1 and 3."""
    images, (kind, size) = open_images(args.fit), SIZES[2]
    print(f'\n{kind} {size}, whitening fitted on {len(images)} images\n')
    print('| p | whitening | UKBench of 4 | Paris Medium | Paris Hard | groups mAP | first class as before |')
    print('|---' * 7 + '|')
    for p in (1., 3.):
        for name, options in WHITENINGS.items():
            model, agreement = create(args, p), None
            protocol = Protocol.for_model(model, kind, size=size)
            if options is not None:
                agreement = whiten_model(
                    model, images, protocol, work_dir=args.work_dir / f'{kind}-{size}-p{p:g}', **options).agreement
            cells = [f'{ukbench_score(model, args.ukbench, protocol):.2f}' if args.ukbench else '–']
            paris = paris_subset(model, args.paris, size) if args.paris else None
            cells += [f'{paris.value("mAP", level):.1f}' if paris else '–' for level in ('Medium', 'Hard')]
            groups = args.groups and evaluate(model, load_benchmark('folder', args.groups), protocols=protocol)
            cells.append(f'{groups.value("mAP"):.1f}' if groups else '–')
            cells.append('–' if agreement is None else f'{100 * agreement:.1f} %')
            print(f'| {p:g} | {name} |', ' | '.join(cells), '|', flush=True)


if __name__ == '__main__':
    main()
