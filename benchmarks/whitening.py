"""Fit of PCA whitening against scikit-learn's PCA(whiten=True): time, memory, and how white the result is.

    python benchmarks/whitening.py
    python benchmarks/whitening.py --memory 20000 100000 400000

Embeddings of 2048 channels whose variances fall as those of trained networks do, batch by batch from a generator, as
they come from the files of an extraction; scikit-learn gets them as one float64 matrix, which making is not timed. CPU
seconds are the process's own, which others on the machine lengthen less than the wall clock's. Peak memory is the
resident memory of a process of its own above what it held before the fit, as the kernel counts it.
"""
import argparse
import subprocess
import sys
import time

import numpy as np
import timing
import torch

from timm_multigrain.whiten.pca import StreamingPCA

BATCH = 1024


def batches(n: int, dim: int, seed: int = 0):
    """(BATCH, dim) float32, correlated and with variances over four decades."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, 64, generator=generator)
    scale = torch.logspace(0, -2, dim)
    for start in range(0, n, BATCH):
        rows = min(BATCH, n - start)
        x = torch.randn(rows, dim, generator=generator) + 0.1 * torch.randn(rows, 64, generator=generator) @ mix.T
        yield x * scale + 1


def fit(data) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and whitening projection."""
    pca = None
    for batch in data:
        pca = pca or StreamingPCA(batch.shape[1])
        pca.update(batch)
    values, proj = pca.eigh()
    proj /= values.sqrt()
    return pca.mean, proj


def time_fit(args: argparse.Namespace) -> dict:
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    data = list(batches(args.images, args.dim))
    matrix = torch.cat(data).double().numpy()
    seconds = []
    for _ in range(args.rounds):
        clock = [_clock()]
        mean, proj = fit(data)
        clock.append(_clock())
        with threadpool_limits(args.threads):
            peer = PCA(whiten=True).fit(matrix)
        clock.append(_clock())
        seconds.append(np.diff(clock, axis=0))
    (ours, ours_cpu), (theirs, theirs_cpu) = np.median(seconds, axis=0).tolist()
    white = ((matrix - mean.numpy()) @ proj.numpy(), peer.transform(matrix))
    off = [float(np.abs(np.cov(y.T) - np.eye(args.dim)).max()) for y in white]
    return {'images': args.images, 'dim': args.dim, 'ours s': ours, 'scikit-learn s': theirs, 'ratio': ours / theirs,
            'ours CPU s': ours_cpu, 'scikit-learn CPU s': theirs_cpu, 'CPU ratio': ours_cpu / theirs_cpu,
            'max |cov - I|': f'{off[0]:.1e}', 'of scikit-learn': f'{off[1]:.1e}'}


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def peak(which: str, n: int, dim: int) -> float:
    """MiB that a fit takes in a process of its own."""
    code = f'import whitening; whitening.measure({which!r}, {n}, {dim})'
    return float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True,
                                cwd=sys.path[0]).stdout.split()[-1])


def measure(which: str, n: int, dim: int) -> None:
    """Print the MiB by which a fit raises the resident memory of this process."""
    torch.set_num_threads(1)
    warm = list(batches(640, 32))  # libraries are loaded
    matrix = None
    if which == 'ours':
        fit(warm)
    else:
        from sklearn.decomposition import PCA
        PCA(whiten=True).fit(torch.cat(warm).numpy())
        matrix = torch.cat(list(batches(n, dim))).double().numpy()
    before = _status('VmRSS')
    if which == 'ours':
        fit(batches(n, dim))
    else:
        PCA(whiten=True).fit(matrix)
    print((_status('VmHWM') - before) / 1024)


def _status(name: str) -> int:
    """KiB of resident memory now (VmRSS) or at most (VmHWM), as Linux counts them."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=3)
    parser.add_argument('--images', type=int, default=20_000)
    parser.add_argument('--dim', type=int, default=2048)
    parser.add_argument('--memory', type=int, nargs='*', default=[20_000, 40_000], metavar='N',
                        help='numbers of images whose peak memory is measured')
    args = timing.start(parser, packages=('scikit-learn', 'numpy'))
    row = time_fit(args) if args.rounds else {}
    for n in args.memory:
        row[f'MiB at {n}'] = round(peak('ours', n, args.dim))
    if args.memory:
        row[f'scikit-learn MiB at {args.memory[0]}'] = round(peak('scikit-learn', args.memory[0], args.dim))
    timing.finish(args, [row])


if __name__ == '__main__':
    main()
