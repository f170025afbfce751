"""What can be wrong with an index folder, each with a sentence for the user."""

__all__ = ['DamagedIndex', 'IndexInUse', 'OtherModel']


class DamagedIndex(ValueError):
    """A file of the index is not what was written. The pictures are not touched by it; the index is made again."""

    def __init__(self, path, what: str):
        super().__init__(f'{path} is damaged ({what}): put a backup of the folder back, or delete the folder and run '
                         'timm-multigrain index again.')


class IndexInUse(RuntimeError):
    """Another process is writing to the index."""


class OtherModel(ValueError):
    """A model or preprocessing that the index was not built with, so that its descriptors do not compare."""
