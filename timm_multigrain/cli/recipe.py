"""Print a training recipe, a YAML file for timm's train.py.

    timm-multigrain recipe resnet50_paper > resnet50_paper.yaml
    python -m timm_multigrain PATH/train.py -c resnet50_paper.yaml --data-dir DIR

Without a name it lists the recipes.
"""
import argparse
import difflib
import sys
from importlib.resources import files

_FOLDER = files('timm_multigrain.recipes')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('name', nargs='?', metavar='NAME', help='recipe to print; none lists them')
    add('--list', action='store_true', help='list the recipes')


def run(args: argparse.Namespace) -> None:
    names = recipe_names()
    if args.name is None or args.list:
        width = max(map(len, names))
        for name in names:
            title = read_recipe(name).decode().splitlines()[0].lstrip('# ')
            print(f'{name:{width}}  {title}')
        return
    # As bytes: as text the line ends would change where they are \r\n.
    sys.stdout.buffer.write(read_recipe(args.name))
    sys.stdout.buffer.flush()


def recipe_names() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(p.name.removesuffix('.yaml') for p in _FOLDER.iterdir() if p.name.endswith('.yaml'))


def read_recipe(name: str) -> bytes:
    """The YAML file of a recipe as it is."""
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.4) or names
        raise ValueError(f'recipe {name!r} not found: did you mean {" or ".join(near)}?')
    return (_FOLDER / f'{name}.yaml').read_bytes()
