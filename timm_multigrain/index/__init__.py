"""A photo collection: index it, search it, find copies in it. README.md beside this has the format and plans."""
from .build import BuildReport, build_index
from .index import Hit, Index
from .records import DamagedIndex, IndexInUse, OtherModel, Record

__all__ = ['BuildReport', 'DamagedIndex', 'Hit', 'Index', 'IndexInUse', 'OtherModel', 'Record', 'build_index']
