"""The `timm-multigrain` command, also `python -m timm_multigrain`: one module a subcommand.

A first argument that ends in .py is one of timm's scripts, to be run with this package registered.
"""
import argparse
import sys

from timm_multigrain.version import __version__

from . import (
    app,
    convert,
    dedup,
    demo,
    embed,
    evaluate,
    export,
    index,
    publish,
    publish_official,
    recipe,
    search,
    tune_p,
    validate,
    whiten,
)

__all__ = ['main']

_COMMANDS = {
    'demo': demo, 'recipe': recipe, 'embed': embed, 'evaluate': evaluate, 'validate': validate, 'whiten': whiten,
    'tune-p': tune_p, 'index': index, 'search': search,
    'dedup': dedup, 'app': app, 'export': export, 'convert': convert, 'publish': publish,
    'publish-official': publish_official}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. What the user can mend is one sentence on stderr and exit status 2, not a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith('.py'):
        from timm_multigrain.launcher import launch
        launch(argv[0], argv[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog='timm-multigrain',
        description='MultiGrain for timm: one image embedding for classes, instances and copies.',
        epilog="With a first argument that ends in .py, such as PATH/train.py, it runs that script of timm's.")
    parser.add_argument('--version', action='version', version=f'timm_multigrain {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, module in _COMMANDS.items():
        text = module.__doc__.strip()
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        print(f'timm-multigrain {args.command}: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'timm-multigrain {args.command}: interrupted', file=sys.stderr)
        return 130
