"""A trained trunk, fine-tuned by the recipe 'finetune': classes, products, edited copies, and what is forgotten.

    python benchmarks/real_trunk.py --trunk WEIGHTS --data GROCERY --scripts PATH --work-dir OUT \
        [--classes DIR] [--paris DIR] [--ukbench DIR] [--rows NAME ...] [--seeds 0 1 2] [--steps 300] [--size 128] \
        [--device cuda] [--workers 4]

WEIGHTS are timm's of --model; GROCERY holds {train,val,test}/KIND/PRODUCT/, PATH is a checkout of timm with train.py.
DIR of --classes holds {train,val}/CLASS/.
Trainings and figures that are in OUT are not made again, so that a run that was cut off goes on. Prints the commands, a
table and the bars.
"""
import argparse
import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import yaml

from timm_multigrain import Protocol, evaluate, open_images, open_model, register_multigrain
from timm_multigrain.demo.run import KINDS, EditedCopies, copy_ap
from timm_multigrain.embed.embedder import embed_images, in_order
from timm_multigrain.files import write_text
from timm_multigrain.images.copies import COPY_TRANSFORMS
from timm_multigrain.images.sources import ImageSource, Subset
from timm_multigrain.measure.benchmarks import load_benchmark
from timm_multigrain.measure.results import BenchmarkResult
from timm_multigrain.train.evaluation import retrieval_figures

BATCH = 48
ROWS = {  # name: data set, flags
    'kinds': ('kinds', ['--mg-repeats', '1', '--mg-classif-weight', '1']),
    'kinds, copies': ('kinds', ['--mg-classif-weight', '1']),
    'joint, copies': ('kinds', []),
    'joint, copies, batch': ('kinds', ['--mg-sampling', 'batch']),
    'joint, products': ('folders', ['--mg-instances', 'folder']),
    'joint, kinds as instances': ('kinds', ['--mg-instances', 'class']),
    'products': ('products', ['--mg-repeats', '1', '--mg-classif-weight', '1']),
    'joint, products as classes and instances': ('products', ['--mg-instances', 'class']),
    'classes': ('classes', ['--mg-repeats', '1', '--mg-classif-weight', '1']),
    'classes, joint, copies': ('classes', []),
}
PRECISE = 'ukbench', 'beta'
SEVERAL_SEEDS = 'kinds', 'joint, copies', 'joint, products', 'classes', 'classes, joint, copies'
COLUMNS = {
    'top1': 'top-1', 'recall1': 'R@1', 'map': 'mAP', 'copies': 'copies', **{kind: kind for kind in COPY_TRANSFORMS},
    'ukbench': 'UKBench', 'paris': 'Paris Hard', 'beta': 'beta'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trunk', type=Path, required=True)
    parser.add_argument('--model', default='tf_efficientnet_lite0')
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--scripts', type=Path, required=True)
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--classes', type=Path)
    parser.add_argument('--paris', type=Path, help='with gnd_rparis6k_subset.json')
    parser.add_argument('--ukbench', type=Path)
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--workers', type=int, default=1, help='of the training')
    parser.add_argument('--extra', nargs=argparse.REMAINDER, default=[], help='flags of train.py, for all rows')
    args = parser.parse_args()
    register_multigrain(args.model)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    sets = prepare(args)
    rows = {name: row for name, row in ROWS.items() if name in args.rows and row[0] in sets}
    table = {'not fine-tuned': [_figures(args, sets['kinds'], 'start', None)]}
    for seed in args.seeds:
        for name, (data, flags) in rows.items():
            if seed == args.seeds[0] or name in SEVERAL_SEEDS:
                experiment = f'{name}, seed {seed}'.replace(', ', '-').replace(' ', '_')
                checkpoint = train(args, sets[data], experiment, flags, seed)
                table.setdefault(name, []).append(_figures(args, sets[data], experiment, checkpoint))
    _print(table)


def prepare(args: argparse.Namespace) -> dict[str, Path]:
    """Folders with train/, test/ and a small validation/ for each choice of classes, made of links."""
    names = 'kinds', 'folders', 'products', *(['classes'] if args.classes else [])
    sets = {name: args.work_dir / name for name in names}
    for split in ('train', 'test'):
        folder = args.data.resolve() / split
        for product in sorted(folder.glob('*/*/')):
            for number, path in enumerate(sorted(product.glob('*.jpg'))):
                kind, product_name, name = path.relative_to(folder).parts
                for place in (split, *(['validation'] * (split == 'test' and number < 3))):
                    _link(path, sets['folders'] / place / kind / product_name / name)
                    _link(path, sets['kinds'] / place / kind / f'{product_name}__{name}')
                    _link(path, sets['products'] / place / product_name / name)
    if args.classes:
        for split, places in (('train', ['train']), ('val', ['test', 'validation'])):
            for path in sorted((args.classes.resolve() / split).glob('*/*.*')):
                for place in places:
                    _link(path, sets['classes'] / place / path.parent.name / path.name)
    return sets


def _link(path: Path, link: Path) -> None:
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def train(args: argparse.Namespace, data: Path, experiment: str, flags: list[str], seed: int) -> Path:
    """The last checkpoint of a training with the recipe; one that is there is not made again."""
    folder = args.work_dir / 'trained' / experiment
    if (folder / 'finished').exists():
        return folder / 'last.pth.tar'
    recipe = yaml.safe_load(subprocess.run(
        [sys.executable, '-m', 'timm_multigrain', 'recipe', 'finetune'], check=True, capture_output=True).stdout)
    images = sum(1 for _ in (data / 'train').rglob('*.jpg'))
    # a little more than the steps, as an epoch is rounded down to whole batches
    length = (args.steps / recipe['epochs'] + 0.5) * BATCH / images
    settings = recipe | {'model_kwargs': {}, 'batch_size': BATCH}
    (args.work_dir / 'recipe.yaml').write_text(yaml.safe_dump(settings))
    command = [
        'train.py', '-c', args.work_dir / 'recipe.yaml', '--data-dir', data, '--model', f'multigrain_{args.model}',
        '--initial-checkpoint', args.trunk, '--num-classes', len(list((data / 'train').iterdir())),
        '--img-size', args.size, '--mg-epoch-len-factor', f'{length:.4f}', '--seed', seed, '--device', args.device,
        '-j', args.workers, '--channels-last', '--checkpoint-hist', 1, '--output', folder.parent,
        '--experiment', experiment, *flags, *args.extra]
    command = list(map(str, command))
    print('python -m timm_multigrain', shlex.join(command), flush=True)
    if folder.exists():  # cut off
        last = folder / 'last.pth.tar'
        command += ['--resume', str(last)] * last.exists()
    command[0] = str(args.scripts / 'train.py')
    subprocess.run([sys.executable, '-m', 'timm_multigrain', *command], check=True)
    (folder / 'finished').touch()
    return folder / 'last.pth.tar'


def _figures(args: argparse.Namespace, data: Path, experiment: str, checkpoint: Path | None) -> dict[str, float]:
    path = args.work_dir / f'{experiment}.json'
    if not path.exists():
        write_text(path, json.dumps(measure(args, data, checkpoint), indent=1))
    return json.loads(path.read_text())


def measure(args: argparse.Namespace, data: Path, checkpoint: Path | None) -> dict[str, float]:
    """Figures of a checkpoint, or of the trunk as it was; per cent, but for UKBench (of 4) and beta."""
    if checkpoint is None:
        model = timm.create_model(f'multigrain_{args.model}', checkpoint_path=str(args.trunk)).eval()
    else:
        model = open_model(checkpoint)
    model.to(args.device)
    protocol = Protocol.for_model(model, 'crop', size=args.size, crop_pct=0.875, interpolation='bilinear')
    figures = {}
    images = open_images(data / 'test')
    vectors, logits = _embed(model, images, protocol)
    if checkpoint is not None:
        names = json.loads((checkpoint.parent / 'class_names.json').read_text())
        right = [Path(name).parts[0] == names[i] for name, i in zip(images.names, logits.argmax(1), strict=True)]
        figures['top1'] = 100 * float(np.mean(right))
        with (checkpoint.parent / 'summary.csv').open(newline='') as file:
            *_, last = csv.DictReader(file)
        figures |= {'beta': float(last['train_beta'])} if 'train_beta' in last else {}
    instances = np.array([_instance(name) for name in images.names])
    found = retrieval_figures(vectors, instances, vectors[:1], np.zeros(1, int))
    figures |= {name: found[name] for name in ('recall1', 'map')}
    vectors, _ = _embed(model, EditedCopies(Subset(images, range(0, len(images), 12))), protocol)
    similarity, kinds = vectors[::len(KINDS)] @ vectors.T, range(1, len(KINDS))
    figures['copies'] = copy_ap(similarity, kinds).mean()
    figures |= {KINDS[kind]: copy_ap(similarity, [kind]).mean() for kind in kinds}
    if args.ukbench:
        figures['ukbench'] = ukbench_score(model, args.ukbench, protocol)
    if args.paris:
        figures['paris'] = paris_subset(model, args.paris, 224).value('mAP', 'Hard')
    return figures


def ukbench_score(model: torch.nn.Module, folder: Path, protocol: Protocol) -> float:
    """Images of the same object among the first four, per image; the folder may hold some of UKBench's groups."""
    images = open_images(folder)
    vectors, _ = _embed(model, images, protocol)
    groups = np.array([int(re.sub(r'\D', '', Path(name).stem)) // 4 for name in images.names])
    first = (vectors @ vectors.T).topk(4).indices.numpy()
    return float((groups[first] == groups[:, None]).sum(1).mean())


def paris_subset(model: torch.nn.Module, folder: Path, size: int) -> BenchmarkResult:
    """Revisited Paris' measures on the images that are there."""
    benchmark = load_benchmark('rparis6k', folder, subset=True, ground_truth=folder / 'gnd_rparis6k_subset.json')
    return evaluate(model, benchmark, protocols=Protocol.for_model(model, size=size, **benchmark.published))


def _embed(model: torch.nn.Module, images: ImageSource, protocol: Protocol) -> tuple[torch.Tensor, torch.Tensor]:
    found = in_order(list(embed_images(model, images, protocol, logits=True)))
    return found.vectors, found.logits


def _instance(name: str) -> str:
    """kind/product/image, kind/product__image, product/image or class/image to the product or class."""
    path = Path(name)
    return path.name.split('__')[0] if '__' in path.name else path.parent.name


def _print(table: dict[str, list[dict[str, float]]]) -> None:
    columns = [c for c in COLUMNS if any(c in row for rows in table.values() for row in rows)]
    print('| | seeds |', ' | '.join(COLUMNS[c] for c in columns), '|')
    print('|---' * (len(columns) + 2) + '|')
    for name, rows in table.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows if column in row]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.{2 if column in PRECISE else 1}f}{spread}' if values else '–')
        print(f'| {name} | {len(rows)} |', ' | '.join(cells), '|')
    print()
    for text, found, least in _bars({name: {c: statistics.mean(r[c] for r in rows) for c in rows[0]}
                                     for name, rows in table.items()}):
        print(f'{"met" if found >= least else "MISSED"}: {text}: {found:+.1f}, at least {least:+.1f}')


def _bars(mean: dict[str, dict[str, float]]) -> list[tuple[str, float, float]]:
    bars = []
    for alone, joint in (('kinds', 'joint, copies'), ('classes', 'classes, joint, copies')):
        if alone in mean and joint in mean:
            for column, least in (('top1', -0.5), ('copies', 2.5)):
                bars.append((f'{joint}, {COLUMNS[column]} over classification only', mean[joint][column]
                             - mean[alone][column], least))
    if 'kinds' in mean and 'joint, products' in mean:
        bars.append(('joint, products, mAP over classification only',
                     mean['joint, products']['map'] - mean['kinds']['map'], 3.0))
    start = mean['not fine-tuned'].get('paris')
    if start is not None:
        bars += [(f'{name}, Paris Hard over not fine-tuned', row['paris'] - start, -3.0)
                 for name, row in mean.items() if 'joint' in name]
    return bars


if __name__ == '__main__':
    main()
