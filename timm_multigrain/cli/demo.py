"""Train a small MultiGrain and see it classify pictures and find edited copies of them.

Without --data-dir it draws its own picture collection, on the CPU, in a few minutes, with nothing downloaded. With
--data-dir it takes any image folder with train/<class>/ and val/<class>/. It trains the same model from the same seeds
for classes only and jointly, prints a table, saves the last joint model and writes a page to look at.
"""
import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--data-dir', metavar='DIR', help='image folder with train/ and val/ (default: draw a collection)')
    add('-o', '--output', default='multigrain-demo', metavar='DIR', help='folder of page, model, results (%(default)s)')
    add('--model', default='multigrain_test_resnet', help='multigrain_<timm model> (%(default)s, a small one)')
    add('--img-size', type=int, default=64, metavar='N', help='side of the training crop (%(default)s)')
    add('--epochs', type=int, default=12, metavar='N', help='epochs of each training (%(default)s)')
    add('--batch-size', type=int, default=48, metavar='N', help='samples per step, copies counted (%(default)s)')
    add('--num-repeats', type=int, default=2, metavar='N', help='copies of a picture in a batch (%(default)s)')
    add('--classif-weight', type=float, default=0.5, metavar='W', help='lambda of the joint model (%(default)s)')
    add('--sampling', default='row', choices=('row', 'batch', 'uniform'), help='negatives (%(default)s)')
    add('--lr', type=float, default=3e-3, help='peak learning rate (%(default)s)')
    add('--seed', type=int, default=0, help='first seed of weights, order, augmentation (%(default)s)')
    add('--seeds', type=int, default=3, metavar='N', help='trainings of each kind, from --seed on (%(default)s)')
    add('--workers', type=int, default=2, metavar='N', help='processes that read pictures (%(default)s)')


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.demo.run import run_demo
    from timm_multigrain.demo.training import TrainSettings

    settings = TrainSettings(**{field.name: getattr(args, field.name) for field in fields(TrainSettings)})
    command = shlex.join(['timm-multigrain', *sys.argv[1:]])
    print(run_demo(args.output, settings, args.data_dir, command))
    output = Path(args.output).resolve()
    print(f'\nPage:  {output / "index.html"}\nModel: {output / "model"}')
