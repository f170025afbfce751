"""What the benchmarks share: interleaved timings, peak memory, tables, JSON.

    parser = timing.make_parser(__doc__)
    args = timing.start(parser)                                     # sets the threads, prints the versions
    seconds = timing.interleave({'ours': f, 'peer': g}, args.rounds, args.device)
    timing.finish(args, [{'case': 'a', 'ours ms': ..., 'ratio': seconds['ours'] / seconds['peer']}])
"""
import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # before torch: its profiler reports the absence of a GPU as an error

import torch
from torch.profiler import ProfilerActivity, profile

from timm_multigrain.files import write_text

MIB = 2 ** 20
_clock = time.perf_counter


def make_parser(doc: str, rounds: int = 15) -> argparse.ArgumentParser:
    """Parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=rounds, help='timings of each, of which the median counts')
    parser.add_argument('--threads', type=int, default=1, help='of torch on the CPU')
    parser.add_argument('--cpu-time', action='store_true', help='time of the processor instead: for a busy machine')
    parser.add_argument(
        '--pages', choices=('default', 'reused', 'fresh'), default='default',
        help="whether large tensors get pages of memory that were used before, which is quicker (glibc's malloc)")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the settings and rows there as well')
    return parser


def start(parser: argparse.ArgumentParser, argv: list[str] | None = None, packages: tuple[str, ...] = ()):
    """Parsed arguments, after setting the threads and printing where this runs; `packages` are the peers."""
    global _clock
    args = parser.parse_args(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: no GPU was found')
    _clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    _set_pages(args.pages)
    args.environment = environment(args.device, packages)
    args.environment |= {'clock': 'processor' if args.cpu_time else 'wall', 'pages': args.pages}
    print(', '.join(f'{key} {value}' for key, value in args.environment.items()), flush=True)
    return args


def environment(device: str = 'cpu', packages: tuple[str, ...] = ()) -> dict[str, str | int]:
    """Versions, threads and the names of the processors."""
    found = {name: importlib.metadata.version(name) for name in ('torch', 'timm', *packages)}
    found |= {'python': platform.python_version(), 'threads': torch.get_num_threads(), 'CPU': _cpu_name()}
    if torch.device(device).type == 'cuda':
        found['GPU'] = torch.cuda.get_device_name(device)
    return found


def clock() -> float:
    """Seconds of the clock that `start` chose."""
    return _clock()


def interleave(
        functions: dict[str, Callable[[], object]],
        rounds: int = 15,
        device: str = 'cpu',
        least_seconds: float = 0.02,
) -> dict[str, float]:
    """Median seconds of a call of each function.

    The functions take turns, in alternating order, so that a slow spell of the machine hits all of them. Quick ones are
    called several times in a turn, `least_seconds` long. A first turn of each is not counted.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, round(least_seconds / _seconds(function, 1, device)))
    seconds = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(functions)[::1 if turn % 2 else -1]:
                seconds[name].append(_seconds(functions[name], calls[name], device))
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(function: Callable[[], object], device: str = 'cpu') -> int:
    """Most bytes of torch's tensors that a call holds beyond those alive before it; numpy's are not seen."""
    function()
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == '[memory]']
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def saved_bytes(function: Callable[[], object], besides: tuple[torch.Tensor, ...] = ()) -> int:
    """Bytes that autograd keeps for the backward of a call, storages counted once, those of `besides` not at all."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # noqa: F841 - as long as the graph lives, no address is used twice
    for tensor in besides:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def print_table(rows: list[dict]) -> None:
    """Rows as a Markdown table; numbers with three significant digits."""
    headers = list(dict.fromkeys(key for row in rows for key in row))
    print('\n|', ' | '.join(headers), '|')
    print('|' + '---|' * len(headers))
    for row in rows:
        print('|', ' | '.join(_format(row.get(key)) for key in headers), '|')


def finish(args, rows: list[dict]) -> None:
    """Print the rows and write the JSON file, if one is wanted."""
    print_table(rows)
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != 'environment'}
        content = {'environment': args.environment, 'settings': settings, 'rows': rows}
        write_text(args.json, json.dumps(content, indent=1) + '\n')


def _seconds(function: Callable[[], object], calls: int, device: str) -> float:
    on_gpu = torch.device(device).type == 'cuda'
    if on_gpu:
        torch.cuda.synchronize(device)
    begin = _clock()
    for _ in range(calls):
        function()
    if on_gpu:
        torch.cuda.synchronize(device)
    return (_clock() - begin) / calls


def _set_pages(pages: str) -> None:
    """Without it, chance decides: whether a free piece of the heap is as large as the tensor."""
    if pages == 'default':
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        raise SystemExit('--pages needs the malloc of glibc')
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    if pages == 'reused':
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2 ** 31 - 1)
    else:
        mallopt(mmap_threshold, MIB)


def _format(value) -> str:
    if not isinstance(value, float):
        return '–' if value is None else str(value)
    return f'{value:.0f}' if abs(value) >= 100 else f'{value:#.3g}'


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0]} ({len(names)} cores)' if names else platform.processor()
