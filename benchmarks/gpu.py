"""Everything that needs a GPU to be measured, in one command of at most six minutes and one table.

    python benchmarks/gpu.py [--json FILE] [--minutes 6] [--sections tests training ...]
    python benchmarks/gpu.py --device cpu --dry-run        # every section at tiny sizes: no number is printed

tests       the tests marked `gpu`
training    a step of the joint task on ResNet-50 against timm's with cross-entropy, B = 128, channels last, bfloat16
            and float16 with GradScaler: time, peak memory, and how often the host waits for the GPU
sampling    negatives and margin loss at B = 512 and 4096, against a host loop as the original's at 512
nccl        the training step under DDP with gathered negatives, one process on NCCL, against timm's under DDP
loading     repeated augmentation, m = 3, with the prefetcher, against timm's loader: the same transforms
extraction  image files to descriptors at 224 and 500 pixels, against timm's own loader and ResNet-50
compiled    the training steps again, under torch.compile

Each section runs in a process of its own and has a share of the time; a case that fails, or has no time left, says so
in its row. Where the host waits is counted by torch.cuda.set_sync_debug_mode. The images are JPEG files of noise.
"""
import argparse
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import timing
import timm
import torch
import torch.distributed as dist
from timm.data import ImageDataset, create_loader

import timm_multigrain
from timm_multigrain.embed.embedder import embed_images
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import write_text
from timm_multigrain.images.sources import find_images

ROOT = Path(__file__).resolve().parents[1]
DRY = 'dry run'
Case = tuple[str, Callable[[], list[dict]]]


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=5)
    parser.add_argument('--minutes', type=float, default=6., help='for everything')
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS), metavar='NAME')
    parser.add_argument('--dry-run', action='store_true', help='tiny sizes, to see that every section runs')
    parser.add_argument('--rows', type=Path, help=argparse.SUPPRESS)  # of one section, which is run here
    args = timing.start(parser)
    if torch.device(args.device).type == 'cuda':
        torch.cuda.set_device(torch.device(args.device).index or 0)
    if args.rows:
        run_cases(args.sections[0], args)
    elif not args.dry_run and torch.device(args.device).type != 'cuda':
        print('No GPU was found: nothing is measured. --device cpu --dry-run shows that every section runs.')
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally` below
        run_sections(args)


def run_sections(args) -> None:
    """Each in its process; the JSON file is written after every one of them."""
    if torch.device(args.device).type == 'cuda':
        args.environment |= gpu_environment(args.device)
        print(', '.join(f'{key} {value}' for key, value in list(args.environment.items())[-4:]))
    if args.dry_run:
        print('DRY RUN: it shows that the code runs, and nothing about speed or memory.')
    end = time.monotonic() + 60 * args.minutes
    rows = []
    for number, name in enumerate(args.sections):
        left, begin = end - time.monotonic(), time.monotonic()
        last = number == len(args.sections) - 1
        rows += run_section(name, left if last else min(left, SECTIONS[name][1]), args)
        print(f'{name}: {time.monotonic() - begin:.0f} s', flush=True)
        if args.json:
            content = {'dry_run': args.dry_run, 'environment': args.environment, 'minutes': args.minutes, 'rows': rows}
            write_text(args.json, json.dumps(content, indent=1) + '\n')
    timing.print_table(rows)


def run_section(name: str, seconds: float, args) -> list[dict]:
    """Rows of a section, run by a process that has so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, 'rows.json'), Path(folder, 'log')
        command = [sys.executable, __file__, '--sections', name, '--rows', path, '--device', args.device,
                   '--rounds', str(args.rounds), '--threads', str(args.threads), *['--dry-run'] * args.dry_run]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        reason = None
        with log.open('w') as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': paths}, stdout=file, stderr=file,
                start_new_session=True)
            try:
                if process.wait(max(seconds, 1)):
                    lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
                    reason = f'ended with status {process.returncode}: {lines[-1] if lines else ""}'[:160]
            except subprocess.TimeoutExpired:
                reason = f'not finished: the {max(seconds, 1):.0f} s of this section were over'
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its workers, too
                process.wait()
        rows = json.loads(path.read_text()) if path.exists() else [{'section': name, 'case': 'all'}]
    return [{**row, 'note': reason or 'ended without a result'} if 'measure' not in row and 'note' not in row else row
            for row in rows]


def run_cases(section: str, args) -> None:
    """Runs the cases of a section; the file of rows has those of finished cases, and what is still to come."""
    cases = list(SECTIONS[section][0](args))
    waiting = [{'section': section, 'case': case} for case, _ in cases]
    rows = []
    write_text(args.rows, json.dumps(waiting))
    for number, (case, measure) in enumerate(cases):
        try:
            found = measure()
        except Exception as e:
            found = [{'note': f'{type(e).__name__}: {" ".join(str(e).split())}'[:160]}]
        gc.collect()
        if args.device != 'cpu':
            torch.cuda.empty_cache()
        rows += [{'section': section, 'case': case, **(hide(row) if args.dry_run else row)} for row in found]
        write_text(args.rows, json.dumps(rows + waiting[number + 1:]))


def compare(measure: str, ours: float, peer: float | None = None, at_most: float | None = None,
            at_least: float | None = None) -> dict:
    """A row; goals are for the ratio where there is a peer, else for the number."""
    value = ours if peer is None else ours / peer
    row = {'measure': measure, 'ours': ours, 'peer': peer, 'ours / peer': None if peer is None else value}
    if at_most is not None:
        row |= {'goal': f'<= {at_most:g}', 'met': 'yes' if value <= at_most else 'no'}
    elif at_least is not None:
        row |= {'goal': f'>= {at_least:g}', 'met': 'yes' if value >= at_least else 'no'}
    return row


def hide(row: dict) -> dict:
    """The row of a dry run, whose numbers nobody is to take for results."""
    return {key: DRY if isinstance(value, (int, float)) or key == 'met' else value for key, value in row.items()}


def count_waits(function: Callable[[], object], device: str) -> int:
    """How often the host waits for the GPU in a call; 0 on a CPU."""
    if torch.device(device).type != 'cuda':
        function()
        return 0
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing CUDA operation' in str(warning.message) for warning in caught)


def check_counter(device: str) -> None:
    """Raises RuntimeError where a wait that is there is not counted, so that no 0 is one of a deaf counter."""
    x = torch.ones(2, device=device)
    if torch.device(device).type == 'cuda' and count_waits(x.sum().item, device) != 1:
        raise RuntimeError('torch.cuda.set_sync_debug_mode does not tell where the host waits')


def tests(args) -> Iterator[Case]:
    def run() -> list[dict]:
        files = [p for p in sorted((ROOT / 'tests').glob('test_*.py')) if 'mark.gpu' in p.read_text()]
        marked = ['-m', 'not gpu', files[0].with_name('test_gpu.py')] if args.dry_run else ['-m', 'gpu', *files]
        done = subprocess.run(
            [sys.executable, '-m', 'pytest', '-o', 'addopts=', '-q', '-p', 'no:cacheprovider', *marked],
            cwd=ROOT, capture_output=True, text=True)
        last = (done.stdout.splitlines() or [''])[-1]
        count = {word: int(number) for number, word in re.findall(r'(\d+) (passed|failed|error|skipped)', last)}
        if not count.get('passed'):
            return [{'note': f'status {done.returncode}: {last or done.stderr[-100:]}'}]
        row = compare('passed, of all', count['passed'], sum(count.values()), at_least=1)
        return [row | {'note': ', '.join(re.findall(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.M)) or None}]

    yield 'pytest -m gpu', run


def training(args, backend: str | None = None) -> Iterator[Case]:
    for amp, name in (('bfloat16', 'bfloat16'), ('float16', 'float16, GradScaler')):
        yield name, lambda amp=amp: measure_steps(args, amp, backend=backend)


def compiled(args) -> Iterator[Case]:
    return training(args, 'aot_eager' if args.dry_run else 'inductor')


def nccl(args) -> Iterator[Case]:
    def run() -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            backend = 'nccl' if args.device != 'cpu' else 'gloo'
            dist.init_process_group(backend, init_method=f'file://{folder}/store', rank=0, world_size=1)
            try:
                return measure_steps(args, 'bfloat16', distributed=True)
            finally:
                dist.destroy_process_group()

    yield 'one process, DDP, gathered negatives', run


def measure_steps(args, amp: str, **options) -> list[dict]:
    import training_step
    check_counter(args.device)
    torch._dynamo.reset()
    torch.backends.cudnn.benchmark = True  # as timm's train.py
    sizes = ('test_resnet', 6, 32) if args.dry_run else ('resnet50', 128, 224)
    steps = training_step.make_steps(*sizes, args.device, amp, channels_last=True, **options)
    seconds = timing.interleave(steps, args.rounds, args.device)
    peak = {name: timing.peak_memory(step, args.device) / timing.MIB for name, step in steps.items()}
    waits = {name: count_waits(step, args.device) for name, step in steps.items()}
    ours, peer = training_step.OURS, training_step.PEER
    return [
        compare('ms a step', 1e3 * seconds[ours], 1e3 * seconds[peer], at_most=1.03),
        compare('peak MiB of a step', peak[ours], peak[peer], at_most=1.03),
        compare('host waits a step', waits[ours], at_most=0) | {'peer': waits[peer]}]


def sampling(args) -> Iterator[Case]:
    def run(number: int, name: str) -> list[dict]:
        import sampling as module
        check_counter(args.device)
        x, target = module.make_batch(number, args.device)
        steps = {'ours': module.our_step(x, target, name)}
        if name == 'row' and number <= 1024:
            steps['host'] = module.host_step(x, target)
        milliseconds = {key: 1e3 * value for key, value in timing.interleave(steps, args.rounds, args.device).items()}
        return [
            compare('ms, forward and backward', milliseconds['ours'], milliseconds.get('host')),
            compare('peak MiB', timing.peak_memory(steps['ours'], args.device) / timing.MIB),
            compare('host waits', count_waits(steps['ours'], args.device), at_most=0)]

    for number in (12, 24) if args.dry_run else (512, 4096):
        for name in ('row', 'batch', 'uniform'):
            yield f'B = {number}, {name}', lambda number=number, name=name: run(number, name)


def loading(args) -> Iterator[Case]:
    def run() -> list[dict]:
        import loading as module
        size, batch_size = (32, 6) if args.dry_run else (224, 96)
        settings = argparse.Namespace(size=size, batch_size=batch_size, workers=workers(args), cpu_time=False,
                                      device=args.device, rounds=min(args.rounds, 3))
        with tempfile.TemporaryDirectory() as folder:
            row = module.measure(next(iter(module.CASES)), make_images(folder, args, 16), [3], settings)[0]
        return [compare(name, row[way], row['timm images/s'], at_least=1)
                for name, way in (('images/s', 'ours'), ('images/s, fast=True', 'fast'))]

    yield f'm = 3, {workers(args)} workers', run


def extraction(args) -> Iterator[Case]:
    def run(size: int, dtype: torch.dtype | None) -> list[dict]:
        from extraction import open_steady
        trunk, batch_size = ('test_resnet', 4) if args.dry_run else ('resnet50', 64)
        model = open_steady(timm_multigrain.register_multigrain(trunk))
        plain = timm.create_model(trunk, num_classes=0).eval().to(args.device)
        protocol = Protocol(size, 'crop')

        def ours(folder: str) -> None:
            for _ in embed_images(model, find_images(folder), protocol, batch_size=batch_size, workers=workers(args),
                                  device=args.device, dtype=dtype, progress=False):
                pass

        @torch.inference_mode()
        def peer(folder: str) -> None:
            loader = create_loader(
                ImageDataset(folder), size, batch_size, num_workers=workers(args), device=torch.device(args.device),
                crop_pct=protocol.crop_pct, interpolation=protocol.interpolation, pin_memory=args.device != 'cpu',
                persistent_workers=False)
            for images, _ in loader:
                with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                    output = plain(images)
                output.float().cpu()

        with tempfile.TemporaryDirectory() as folder:
            make_images(folder, args, 16 if size < 500 else 4)
            number = len(os.listdir(folder))
            ways = {'ours': lambda: ours(folder), 'peer': lambda: peer(folder)}
            seconds = timing.interleave(ways, min(args.rounds, 3), args.device)
        return [compare('images/s', number / seconds['ours'], number / seconds['peer'], at_least=0.95)]

    for size in (32, 64) if args.dry_run else (224, 500):
        for dtype, name in ((None, 'float32'), (torch.bfloat16, 'bfloat16')):
            yield f'{size} pixels, {name}', lambda size=size, dtype=dtype: run(size, dtype)


def workers(args) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return 1 if args.dry_run else min(cores, 16)


def make_images(folder: str, args, copies: int) -> Path:
    """96 files and as many links to each as make an epoch long enough to time."""
    import loading as module
    folder = module.make_images(Path(folder), 6 if args.dry_run else 96)
    for path in list(folder.iterdir()):
        for copy in range(1, 2 if args.dry_run else copies):
            os.link(path, path.with_stem(f'{path.stem}-{copy}'))
    return folder


def gpu_environment(device: str) -> dict:
    """The driver, and what torch brings for the GPU."""
    try:
        driver = subprocess.run(
            ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True,
            timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        driver = 'unknown'
    memory = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
    return {'GPU memory': f'{memory:.0f} GiB', 'driver': driver, 'CUDA': torch.version.cuda,
            'cuDNN': torch.backends.cudnn.version()}


SECTIONS = {  # with the seconds each may take at most, so that the later ones have theirs
    'tests': (tests, 90), 'training': (training, 60), 'sampling': (sampling, 40), 'nccl': (nccl, 40),
    'loading': (loading, 60), 'extraction': (extraction, 80), 'compiled': (compiled, 300)}

if __name__ == '__main__':
    main()
