"""Parts of the pictures of an index, by boxes of a list or of any detector, embedded beside the whole pictures."""
import importlib
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from timm_multigrain.embed.embedder import embed_images
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import counted, printable
from timm_multigrain.images.pixels import UnreadableImage, read_image
from timm_multigrain.images.sources import ImageSource, read_entries

from .records import REGION
from .store import Store, Writer

PICTURES = 256  # whose parts are committed at a time
LONGEST = REGION['category'].itemsize


class Boxes:
    """Where things are in pictures.

    Args:
        boxes: A list (.csv or .jsonl, see `Entry`) with the path below the indexed folder, box and category of
            each thing; or a function, or its name as 'module:function', that is given a picture (PIL, RGB) and gives
            (left, top, right, bottom) or (left, top, right, bottom, category) for each thing in it.
    """

    def __init__(self, boxes: str | os.PathLike | Callable[[Image.Image], Iterable[Sequence]]):
        self.listed, self.detector, self.lost = defaultdict(list), None, set()
        if callable(boxes):
            self.detector, self.source = boxes, f'{boxes.__module__}:{boxes.__qualname__}'
        elif os.fspath(boxes).endswith(('.csv', '.jsonl')):
            self.source = 'list'
            for entry in read_entries(boxes):
                self.listed[os.fsencode(entry.path)] += [(*entry.box, entry.category)] if entry.box else []
        else:
            self.detector, self.source = _imported(os.fspath(boxes)), os.fspath(boxes)

    def of(self, store: Store, row: int, exif: bool) -> np.ndarray:
        """The regions of an image, cut to it, (n,) of `REGION`; UnreadableImage if a detector cannot see it."""
        path, size = os.fsdecode(store.path(row)), store.records[['width', 'height']][row].item()
        given = self.listed.get(store.names[row], []) if self.detector is None else self._detected(path, exif)
        found = np.array([(*_region(box, size, path), 0) for box in given], dtype=REGION)
        inside = (found['box'][:, :2] < found['box'][:, 2:]).all(1)
        self.lost |= set() if inside.all() else {path}
        return found[inside]

    def _detected(self, path: str, exif: bool) -> list[Sequence]:
        image = read_image(path, exif=exif)
        try:
            return list(self.detector(image))
        except Exception as e:  # whatever somebody's code raises
            raise RuntimeError(f'{printable(path)}: {self.source} failed with {type(e).__name__}: {e}') from e

    def news(self, store: Store, row: int, exif: bool) -> bool:
        """Whether the index does not have the regions of an image as they are; a detector is asked once of each."""
        if self.detector is not None:
            return store.region_sources.get(int(store.ids[row])) != self.source
        there, here = store.regions_of(row), self.of(store, row, exif)
        return not all(np.array_equal(there[name], here[name]) for name in ('box', 'category'))


def _imported(name: str) -> Callable:
    module, _, function = name.partition(':')
    if not function:
        raise ValueError(f'{printable(name)} gives no boxes: name a list, .csv or .jsonl, or module:function.')
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as e:  # whatever somebody's code raises
        raise ImportError(f'{printable(name)}: {module} cannot be imported: {type(e).__name__}: {e}') from e
    if not callable(found):
        raise ValueError(f'{printable(name)} is not a function: {module} does not have it.')
    return found


def _region(box: Sequence, size: tuple[int, int], path: str) -> tuple[tuple[int, ...], bytes]:
    """A box, rounded as Pillow's crop does and cut to the picture, and its category."""
    try:
        *sides, category = box if len(box) == 5 else (*box, None)
        category = b'' if category is None else str(category).encode()
        if len(category) > LONGEST:
            raise ValueError
        sides = zip(map(float, sides), size * 2, strict=True)
        return tuple(min(max(round(side), 0), limit) for side, limit in sides), category
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{printable(path)}: a box is left, top, right, bottom in pixels, and perhaps a category of '
                         f'up to {LONGEST} bytes, not {printable(repr(box)[:200])}.') from None


class _Parts(ImageSource):
    """Parts of pictures, each a picture of its own. Those of one picture follow each other: it is read once."""

    def __init__(self, paths: Sequence[str], parts: Sequence[tuple]):
        self.names, self.parts, self._last = paths, parts, (None, None)

    def load(self, i: int, exif: bool = True) -> Image.Image:
        if self._last[0] != self.names[i]:
            self._last = self.names[i], read_image(self.names[i], exif=exif)
        return self._last[1].crop(self.parts[i])


def update_regions(
        writer: Writer,
        model: Callable[[], torch.nn.Module],
        protocol: Protocol,
        boxes: Boxes,
        folders: Sequence[bytes],
        progress: bool = True,
        **extraction,
) -> None:
    """Bring the regions of the images below these folders of an index up to date; `model` opens its model."""
    store = Store(writer.folder)
    rows = [row for row, root in enumerate(store.records['root'].tolist()) if store.roots[root] in folders]
    unknown = boxes.listed.keys() - {store.names[row] for row in rows}
    if unknown:
        text = (f'Not in the index: {len(unknown):,} of {counted(len(boxes.listed), "picture")} with boxes, such as '
                f'{printable(min(unknown))}. A path is that below an indexed folder.')
        if len(unknown) == len(boxes.listed):
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)
    rows = [row for row in rows if boxes.news(store, row, protocol.exif)]
    writer.commit(pending=len(rows))
    for start in tqdm(range(0, len(rows), PICTURES), 'Regions', unit='batch', disable=None if progress else True):
        found = {}
        for row in rows[start:start + PICTURES]:
            with suppress(UnreadableImage):  # the next update tries again
                found[row] = boxes.of(store, row, protocol.exif)
        owners = [row for row, regions in found.items() for _ in regions]
        parts = _Parts([os.fsdecode(store.path(row)) for row in owners],
                       [tuple(box) for regions in found.values() for box in regions['box'].tolist()])
        vectors, embedded = np.zeros((len(parts), store.dim), np.float32), np.zeros(len(parts), bool)
        if owners:
            for batch in embed_images(model(), parts, protocol, on_error=lambda i, _, parts=parts: boxes.lost.add(
                    parts.names[i]), progress=False, **extraction):
                vectors[batch.indices], embedded[batch.indices] = batch.vectors, True
        writer.set_regions(store.ids[list(found)], boxes.source, [
            regions[embedded[np.equal(owners, row)]] for row, regions in found.items()], vectors[embedded])
        writer.commit(pending=max(0, len(rows) - start - PICTURES))
    if boxes.lost:
        warnings.warn(f'Boxes of {counted(len(boxes.lost), "picture")} were left out, such as of '
                      f'{printable(min(boxes.lost))}: they have no area in it, or too little for the model; a box is '
                      'left, top, right, bottom in pixels.', stacklevel=2)
