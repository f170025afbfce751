"""Repeated augmentation's loader against timm's, images a second, with one worker unless told otherwise.

    python benchmarks/loading.py [--images DIR] [--repeats 1 2 3 4 6 8] [--cpu-time]

timm: timm.data.create_loader, every augmentation from a decoding of its own. ours: timm_multigrain's create_loader with
m augmentations of a decoding; fast: the same with fast=True. All have timm's training transform. DIR holds images in
any folders; without it JPEG files of coloured noise are made. 'PIL = m decodes' says whether a batch of ours equals,
bit for bit, as many separate reads with the same seed; the last columns compare it with that of fast, in grey levels.
--cpu-time reads and collates in this process and counts the seconds its one thread spends on the CPU instead of those
on the wall, for a machine that has other work, too.
"""
import functools
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timing
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data import create_loader as timm_create_loader

from timm_multigrain.data import create_loader

CASES = {
    'crop, flip, colour jitter 0.4': {},
    'RandAugment': dict(auto_augment='rand-m9-mstd0.5-inc1'),
    'crop, flip': dict(color_jitter=None),
}


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=7)
    parser.add_argument('--images', type=Path, metavar='DIR')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=48)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--repeats', type=int, nargs='+', default=[1, 2, 3, 4, 6, 8], metavar='M')
    parser.add_argument('--cases', type=int, nargs='+', default=list(range(len(CASES))), metavar='I', help='0, 1, 2')
    args = timing.start(parser, packages=('torchvision', 'pillow'))
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or make_images(Path(folder))
        rows = []
        for index in args.cases:
            name = list(CASES)[index]
            repeats = args.repeats if index == 0 else [m for m in args.repeats if m == 3]
            rows += measure(name, images, repeats, args)
    timing.finish(args, rows)


def make_images(folder: Path, number: int = 96) -> Path:
    """JPEG files of the size and about the bytes of ImageNet's photographs."""
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noise = rng.normal(0, 12, (375, 500, 3))
        Image.fromarray(np.clip(coarse + noise, 0, 255).astype(np.uint8)).save(folder / f'{i}.jpg', quality=90)
    return folder


def measure(name: str, images: Path, repeats: list[int], args) -> list[dict]:
    """A row for each number of repeats."""
    options = dict(
        input_size=args.size, batch_size=args.batch_size, num_workers=0 if args.cpu_time else args.workers,
        device=torch.device(args.device), pin_memory=args.device != 'cpu', is_training=True, **CASES[name])
    loaders = {'timm': timm_create_loader(open_images(images), **options)}
    for m in repeats:
        for kind, fast in (('ours', False), ('fast', True)):
            loaders[kind, m] = create_loader(open_images(images), num_repeats=m, fast=fast, **options)
    if args.cpu_time:
        seconds = cpu_seconds({key: loader.loader for key, loader in loaders.items()}, args.rounds)
    else:
        epochs = {key: functools.partial(run_through, loader) for key, loader in loaders.items()}
        seconds = timing.interleave(epochs, args.rounds, args.device)
    speed = {key: len(loader) * args.batch_size / seconds[key] for key, loader in loaders.items()}
    rows = []
    for m in repeats:
        ours, fast = speed['ours', m], speed['fast', m]
        rows.append({
            'augmentation': name, 'm': m, 'timm images/s': speed['timm'], 'ours': ours, 'fast': fast,
            'ours / timm': ours / speed['timm'], 'fast / timm': fast / speed['timm'],
            **compare(images, m, options)})
    return rows


def open_images(folder: Path) -> ImageDataset:
    """A fresh dataset of a folder; all files have one class where it has no folders."""
    return ImageDataset(str(folder))


def run_through(loader) -> None:
    """An epoch."""
    for _ in loader:
        pass


def cpu_seconds(loaders: dict, rounds: int) -> dict:
    """Median seconds on the CPU of an epoch of each loader, which take turns batch by batch."""
    seconds = {key: [] for key in loaders}
    for _ in range(rounds):
        iterators = {key: iter(loader) for key, loader in loaders.items()}
        spent = dict.fromkeys(loaders, 0.0)
        for _ in range(min(map(len, loaders.values()))):
            for key, iterator in iterators.items():
                begin = time.process_time()
                next(iterator)
                spent[key] += time.process_time() - begin
        for key, value in spent.items():
            seconds[key].append(value)
    return {key: statistics.median(values) for key, values in seconds.items()}


def compare(images: Path, m: int, options: dict) -> dict:
    """Pixels of one batch: ours against separate reads, and fast against ours."""
    options = {**options, 'num_workers': 0}
    loader, fast = (create_loader(open_images(images), num_repeats=m, fast=on, **options) for on in (False, True))
    indices = list(loader.sampler)[:options['batch_size']]
    dataset = loader.dataset.dataset
    separate = seeded(lambda: [dataset[i] for i in indices])
    ours, tensors = (seeded(lambda d=d: d.__getitems__(indices)) for d in (loader.dataset, fast.dataset))
    off = torch.stack([
        (a.int() - b.int()).abs() for (a, _), (b, _) in zip(ours, tensors, strict=True)]).flatten()
    return {
        'PIL = m decodes': 'yes' if all(
            torch.equal(a, b) for (a, _), (b, _) in zip(ours, separate, strict=True)) else 'no',
        'pixels of fast that differ %': 100 * (off > 0).double().mean().item(),
        'mean difference': off.double().mean().item()}


def seeded(function):
    """What a function gives after seeding the generators that transforms draw from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return function()


if __name__ == '__main__':
    main()
