"""What `import timm_multigrain` adds to `import timm`, in fresh processes, and which modules it goes to.

    python benchmarks/import_time.py [--rounds 15] [--json FILE]

With compiled bytecode beside the modules, as pip leaves it. The bar is 20 ms.
"""
import os
import re
import statistics
import subprocess
import sys

import timing

CODE = '''
import time, timm
begin, cpu = time.perf_counter(), time.process_time()
import timm_multigrain
print(time.perf_counter() - begin, time.process_time() - cpu)
'''


def main() -> None:
    args = timing.start(timing.make_parser(__doc__))
    run(CODE)  # bytecode and file cache
    wall, cpu = zip(*(map(float, run(CODE).stdout.split()) for _ in range(args.rounds)), strict=True)
    rows = [{
        'import after timm': 'timm_multigrain', 'median ms': 1e3 * statistics.median(wall),
        'least ms': 1e3 * min(wall), 'CPU ms': 1e3 * statistics.median(cpu), 'bar': 20}]
    rows += [{'import after timm': name, 'median ms': own} for name, own in parts(args.rounds)]
    timing.finish(args, rows)


def parts(rounds: int) -> list[tuple[str, float]]:
    """Own milliseconds of the ten modules that take longest."""
    own = {}
    for _ in range(rounds):
        lines = run('import timm, timm_multigrain', '-X', 'importtime').stderr.splitlines()
        start = next(i for i, line in enumerate(lines) if re.search(r'\| timm$', line))
        for microseconds, name in re.findall(r'import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)', '\n'.join(lines[start + 1:])):
            own.setdefault(name, []).append(int(microseconds) / 1e3)
    return sorted(((n, statistics.median(v)) for n, v in own.items()), key=lambda part: -part[1])[:10]


def run(code: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'}
    return subprocess.run([sys.executable, *flags, '-c', code], capture_output=True, text=True, check=True,
                          env=environment)


if __name__ == '__main__':
    main()
