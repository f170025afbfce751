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
    parser.add_argument('name', nargs='?', metavar='NAME', help='recipe to print; none lists them')


def run(args: argparse.Namespace) -> None:
    recipes = {p.name.removesuffix('.yaml'): p for p in _FOLDER.iterdir() if p.name.endswith('.yaml')}
    if args.name is None:
        width = max(map(len, recipes))
        for name in sorted(recipes):
            print(f'{name:{width}}  {recipes[name].read_text(encoding="utf-8").splitlines()[0].lstrip("# ")}')
        return
    if args.name not in recipes:
        near = difflib.get_close_matches(args.name, recipes, n=2, cutoff=0.4) or sorted(recipes)
        raise ValueError(f'recipe {args.name!r} not found: did you mean {" or ".join(near)}?')
    # As bytes: as text the line ends would change where they are \r\n.
    sys.stdout.buffer.write(recipes[args.name].read_bytes())
    sys.stdout.buffer.flush()
