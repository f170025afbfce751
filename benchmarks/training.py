"""timm's train.py with MultiGrain's objective against classification only: same seed, same steps, timm's validate.py.

    python benchmarks/training.py --scripts PATH --data-dir DIR --output OUT [--epochs 32] [--seed 0] [--plot FILE.png]

PATH is a checkout of timm with train.py and validate.py, DIR holds train/<class>/ and val/<class>/. Trains what is not
in OUT yet, validates the last checkpoints with validate.py, looks for edited copies of the validation images with them,
prints a table and draws the curves of summary.csv.
"""
import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint

import timm_multigrain  # noqa: F401 - registers the models
from timm_multigrain.demo.measuring import measure
from timm_multigrain.demo.training import open_pictures
from timm_multigrain.embed.protocol import Protocol

ARMS = {
    'classes': ['--mg-repeats', '1', '--mg-classif-weight', '1'],
    'classes-ra': ['--mg-classif-weight', '1'],
    'joint': [],
}
LABELS = {
    'classes': 'classification only', 'classes-ra': 'classification only, 3 copies', 'joint': 'joint, 3 copies'}
MODEL = 'multigrain_resnet18'
SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scripts', type=Path, required=True)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--epochs', type=int, default=32)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--plot', type=Path)
    args = parser.parse_args()
    pictures = open_pictures(args.data_dir)
    rows = {}
    for name, flags in ARMS.items():
        summary = args.output / name / 'summary.csv'
        if not summary.exists() or len(_read(summary)) < args.epochs:
            _run(_train_command(args, name, len(pictures.class_names)) + flags)
        rows[name] = _read(summary)
    print('| objective | top-1 % | top-5 % | copy mAP % | crop | rotate | mirror | beta |')
    print('|---|---|---|---|---|---|---|---|')
    for name in ARMS:
        print('|', ' | '.join([LABELS[name], *_measure(args, name, pictures)]), '|', flush=True)
    if args.plot:
        _draw(rows, args.plot)


def _train_command(args, name: str, num_classes: int) -> list[str]:
    settings = f'''--model {MODEL} --num-classes {num_classes} --img-size {SIZE} -b 48 --epochs {args.epochs}
        --opt adamw --lr 1e-3 --weight-decay 0.05 --warmup-epochs 1 --smoothing 0 --scale 0.3 1 --color-jitter 0.3
        --amp --amp-dtype bfloat16 --channels-last --device cpu -j 2 --checkpoint-hist 1 --seed {args.seed}'''
    return [str(args.scripts / 'train.py'), '--data-dir', args.data_dir, *settings.split(),
            '--output', str(args.output), '--experiment', name]


def _run(command: list[str]) -> None:
    print('python -m timm_multigrain', shlex.join(command), flush=True)
    subprocess.run([sys.executable, '-m', 'timm_multigrain', *command], check=True)


def _measure(args, name: str, pictures) -> list[str]:
    num_classes = len(pictures.class_names)
    checkpoint = args.output / name / 'last.pth.tar'
    results = args.output / name / 'validate.json'
    if not results.exists():
        _run([str(args.scripts / 'validate.py'), args.data_dir, '--model', MODEL, '--num-classes', str(num_classes),
              '--img-size', str(SIZE), '--device', 'cpu', '-j', '1', '--checkpoint', str(checkpoint),
              '--results-file', str(results), '--results-format', 'json'])
    found = json.loads(results.read_text())
    found = found[0] if isinstance(found, list) else found
    model = timm.create_model(MODEL, num_classes=num_classes).eval()
    load_checkpoint(model, str(checkpoint))
    scores = measure(model, pictures.val, Protocol.for_model(
        model, 'crop', size=SIZE, crop_pct=0.875, interpolation='bilinear'))
    kinds = [f'{scores.copy_map_of[kind]:.1f}' for kind in ('crop', 'rotate', 'mirror')]
    torch.serialization.add_safe_globals([argparse.Namespace])
    state = torch.load(checkpoint, weights_only=True).get('task_state')
    beta = f'{state["instance_loss"]["beta"].item():.3f}' if state else '–'
    return [f'{found["top1"]:.1f}', f'{found["top5"]:.1f}', f'{scores.copy_ap.mean():.1f}', *kinds, beta]


def _read(summary: Path) -> list[dict]:
    with summary.open(newline='') as file:
        return list(csv.DictReader(file))


def _draw(rows: dict[str, list[dict]], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout='constrained')
    colors = dict(zip(ARMS, ('tab:gray', 'tab:orange', 'tab:blue'), strict=True))
    for name, table in rows.items():
        epochs = [int(r['epoch']) + 1 for r in table]
        left.plot(epochs, [float(r['eval_top1']) for r in table], color=colors[name], label=LABELS[name])
        column = 'train_classification_loss' if 'train_classification_loss' in table[0] else 'train_loss'
        middle.plot(epochs, [float(r[column]) for r in table], color=colors[name], label=LABELS[name])
    table = rows['joint']
    epochs = [int(r['epoch']) + 1 for r in table]
    for column, label, style in (('positive_distance', 'copies of an image', '-'), ('beta', 'beta', ':'),
                                 ('negative_distance', 'sampled negatives', '--')):
        right.plot(epochs, [float(r[f'train_{column}']) for r in table], style, color=colors['joint'], label=label)
    for axis, title in ((left, 'top-1 of the validation images, %'), (middle, 'cross-entropy in training'),
                        (right, 'joint: distances in training')):
        axis.set(title=title, xlabel='epoch')
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    main()
