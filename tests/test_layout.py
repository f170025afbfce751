"""The rooms of the package import upwards in one order only, and no two modules need each other."""
import ast
from pathlib import Path

import timm_multigrain

ROOT = Path(timm_multigrain.__file__).parent
NAME = ROOT.name
# every room may import those before it: what data becomes, from a file to a page
ORDER = ['version', 'extras', 'files', '_timm', 'layers', 'loss', 'images', 'models', 'data', 'task', 'embed', 'whiten',
         'search', 'index', 'measure', 'train', 'report', 'app', 'hub', 'demo', 'cli', 'recipes', 'auto', '__main__']


def _name(path: Path) -> str:
    parts = [NAME, *path.relative_to(ROOT).with_suffix('').parts]
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {_name(path): path for path in ROOT.rglob('*.py')}


def _imports(module: str) -> set[str]:
    """Modules of the package that this one imports anywhere, inside functions and for type checks too."""
    path, found = MODULES[module], set()
    package = module if path.name == '__init__.py' else module.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[:len(package.split('.')) + 1 - node.level] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            found |= {f'{base}.{a.name}' if f'{base}.{a.name}' in MODULES else base for a in node.names}
    return {m for m in found if m in MODULES} - {module, NAME}


IMPORTS = {module: _imports(module) for module in MODULES if module != NAME}


def _room(module: str) -> int:
    return ORDER.index(module.split('.')[1])


def test_a_room_imports_only_the_rooms_before_it():
    assert [f'{m} imports {d}' for m, found in IMPORTS.items() for d in found if _room(d) > _room(m)] == []


def test_no_two_modules_need_each_other():
    left = {module: set(found) for module, found in IMPORTS.items()}
    while free := {module for module, found in left.items() if not found & left.keys()}:
        left = {module: found for module, found in left.items() if module not in free}
    assert sorted(left) == []
