"""The `timm-multigrain` command, also `python -m timm_multigrain`: the subcommands are in the modules beside.

A first argument that ends in .py is one of timm's scripts, to be run with this package registered.
"""
import argparse
import importlib
import inspect
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager

import timm_multigrain

COMMANDS = {  # to the modules of their functions add_<command>, for the arguments, and run_<command>
    'demo': 'models', 'recipe': 'models', 'embed': 'measure', 'evaluate': 'measure', 'validate': 'measure',
    'whiten': 'improve', 'adapt': 'improve', 'tune-p': 'improve', 'index': 'collection', 'search': 'collection',
    'dedup': 'dedup', 'map': 'collection', 'app': 'collection', 'export': 'collection', 'convert': 'models',
    'publish': 'models'}
_LONGEST_LINE = 1000


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. What the user can mend is one sentence on stderr and exit status 2, not a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith('.py'):
        timm_multigrain._register()
        from timm_multigrain.train.launcher import launch
        launch(argv[0], argv[1:])
        return 0
    args = _parse(argv)
    try:
        with _sigterm_interrupts(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            timm_multigrain._register()
            return args.run(args) or 0
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        print(f'timm-multigrain {args.command}: error: {_shown(_sentence(e))}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        terminated = isinstance(e, _Terminated)
        print(f'timm-multigrain {args.command}: {"terminated" if terminated else "interrupted"}', file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='timm-multigrain',
        description='MultiGrain for timm: one image embedding for classes, instances and copies.',
        epilog="With a first argument that ends in .py, such as PATH/train.py, it runs that script of timm's.")
    parser.add_argument('--version', action='version', version=f'timm_multigrain {timm_multigrain.__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, home in COMMANDS.items():
        module, function = importlib.import_module(f'.{home}', __package__), name.replace('-', '_')
        run = getattr(module, f'run_{function}')
        text = inspect.getdoc(run)
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        getattr(module, f'add_{function}')(command)
        command.set_defaults(run=run)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the usage of the subcommand helps more than the list of all
        commands.choices[args.command].error(f'unrecognized arguments: {" ".join(unknown)}')
    return args


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which `kill`, service managers and schedulers send: everything is cleaned up as after Ctrl-C."""


@contextmanager
def _sigterm_interrupts():
    """SIGTERM raises `_Terminated` in the block, unless the process has a handler of its own."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def handle(*_) -> None:
        if os.getpid() != process:  # a forked worker that has not set its own handlers yet
            os._exit(128 + signal.SIGTERM)
        raise _Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sentence(error: Exception) -> str:
    """The system's errors without their number; of two names the one that was meant, not that of a temporary file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f'{error.filename2 or error.filename}: {error.strerror}.'
    return str(error)


def _show_warning(message: Warning, category: type, filename: str, lineno: int, *_) -> None:
    where = '' if issubclass(category, UserWarning) else f' ({filename}:{lineno})'  # ours are for users
    print(f'warning: {_shown(str(message))}{where}', file=sys.stderr)


def _shown(text: str) -> str:
    """A message that may quote names from a file of somebody else's, without their controls, its lines not endless."""
    from timm_multigrain.files import printable
    lines = map(printable, text.splitlines())
    return '\n'.join(line if len(line) <= _LONGEST_LINE else f'{line[:_LONGEST_LINE]}...' for line in lines)
