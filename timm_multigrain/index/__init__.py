"""A photo collection: index it, search it, find copies in it. README.md beside this has the format and plans."""
from .build import BuildReport, build_index
from .errors import DamagedIndex, IndexInUse, OtherModel
from .index import Hit, Index
from .records import Record

__all__ = ['BuildReport', 'DamagedIndex', 'Hit', 'Index', 'IndexInUse', 'OtherModel', 'Record', 'build_index']
