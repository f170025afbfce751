"""Images of a published set on the disk: found by name wherever an archive put them, counted, and missed by name."""
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm_multigrain.images.sources import image_names, printable

__all__ = ['locate', 'require_folder', 'some']


def some(names: Sequence[str], number: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - number} more' if len(names) > number else ''
    return ', '.join(map(printable, names[:number])) + more


def require_folder(folder: str | os.PathLike, title: str, source: str) -> Path:
    """The folder as a path.

    Raises:
        FileNotFoundError: It is not there, or is a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is no folder, so {title} is not there; {source}.')
    return folder


def locate(folder: Path, names: Iterable[str], title: str, source: str, prefer: Sequence[str] = ()) -> list[Path]:
    """Files of these names, in their order, wherever they are below the folder.

    Args:
        folder: Where to look.
        names: File names, without a suffix if it does not matter.
        title: Name of the set, for the error.
        source: Where it is to be had, for the error.
        prefer: Names of folders whose files win over files of the same name elsewhere, the first most.

    Raises:
        FileNotFoundError: Some are not there.
        ValueError: A name is there more than once.
    """
    names = list(names)
    wanted, found = set(names), {}
    for path in image_names(folder):
        base = path.rpartition('/')[2]
        for key in wanted.intersection((base, os.path.splitext(base)[0])):
            found.setdefault(key, []).append(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f'{folder} lacks {len(missing)} of the {len(names)} images of {title}: '
                                f'{some(missing)}; {source}.')
    return [folder / _choose(name, found[name], folder, prefer) for name in names]


def _choose(name: str, paths: Sequence[str], folder: Path, prefer: Sequence[str]) -> str:
    for wanted in prefer:
        inside = [path for path in paths if wanted in path.split('/')[:-1]]
        if len(inside) == 1:
            return inside[0]
    if len(paths) > 1:
        raise ValueError(f'{folder} has the image {name} more than once ({some(paths)}): leave one.')
    return paths[0]
