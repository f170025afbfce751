"""Every benchmark that needs no data, at settings that take less than 30 minutes in all on two idle cores.

    python benchmarks/all.py [--output benchmarks/output] [--scripts NAME ...]

One after the other, each in a process of its own whose output goes to OUTPUT/NAME.txt. One that fails is told, and the
others go on. At the end the scripts that need data are listed, with their commands.
"""
import argparse
import ast
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
QUICK = {
    'import_time': '--rounds 5',
    'sampling': '--rounds 5',
    'inference': '--batch-size 1 --rounds 5',
    'training_step': '--batch-size 12 --rounds 3',
    'loading': '--repeats 1 3 --rounds 3',
    'whitening': '--rounds 1 --memory 20000',
    'evaluation': '--rounds 3',
    'poolings': '',
    'collection': '--sizes 100000 --work {work}',
    'gpu': '--device cpu --dry-run',  # with a GPU: without these flags
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=FOLDER / 'output', metavar='DIR')
    parser.add_argument('--scripts', nargs='+', choices=QUICK, default=list(QUICK), metavar='NAME')
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    failed = [name for name in args.scripts if not run(name, args.output / f'{name}.txt')]
    print(f'{time.monotonic() - start:.0f} s in all; output in {args.output}'
          + (f'; failed: {", ".join(failed)}' if failed else ''))
    print('\nNot run, as they need data (benchmarks/README.md says which was used):')
    for path in sorted(FOLDER.glob('*.py')):
        if path.stem not in (*QUICK, 'all', 'timing'):
            print(usage(path))
    return bool(failed)


def run(name: str, output: Path) -> bool:
    """Whether a benchmark ran through; its output, errors included, goes to a file."""
    print(f'{name:14}', end='', flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='multigrain-') as work, open(output, 'w') as file:
        command = [sys.executable, f'{FOLDER / name}.py', *shlex.split(QUICK[name].format(work=shlex.quote(work)))]
        print('$', shlex.join(['python', *command[1:]]), file=file, flush=True)
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    print(f'{time.monotonic() - start:6.0f} s' + (f'  failed ({status}), see {output}' if status else ''), flush=True)
    return status == 0


def usage(path: Path) -> str:
    """The commands in the docstring of a script."""
    lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    return '\n'.join(line for line in lines if line.startswith('    '))


if __name__ == '__main__':
    sys.exit(main())
