"""A photo collection: index it, search it, find copies in it. README.md beside this has the format and plans."""
import importlib

_HOME = {'Hit': 'index', 'Index': 'index', 'Record': 'records', 'BuildReport': 'build', 'build_index': 'build',
         'DamagedIndex': 'errors', 'IndexInUse': 'errors', 'OtherModel': 'errors'}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
