"""What the web app shows, computed without gradio: classes, nearest images, groups of copies, thumbnails."""
import os
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from timm_multigrain.images.labels import class_names
from timm_multigrain.images.sources import UnreadableImage, printable, read_image
from timm_multigrain.index.dedup import Copies, CopyGroup, find_copies
from timm_multigrain.index.queries import cut, embed_queries
from timm_multigrain.index.records import Record, top_classes

if TYPE_CHECKING:
    from timm_multigrain.index.index import Index

__all__ = ['Answers', 'Found']

THUMBNAIL = 400
MAX_HITS = 100
CACHED_THUMBNAILS = 500


@dataclass(frozen=True)
class Found:
    """What a search gives: (class, probability), and (picture, caption, record) of each image, nearest first."""
    classes: tuple[tuple[str, float], ...]
    hits: tuple[tuple[Image.Image, str, Record], ...]


class Answers:
    """The questions of the web app to one index.

    Args:
        index: The index.
        max_pixels: Larger pictures are refused before they are decoded.
    """

    def __init__(self, index: 'Index', max_pixels: int):
        self.index, self.max_pixels = index, max_pixels
        self._lock = threading.Lock()  # the model works on one picture at a time
        self.thumbnail = lru_cache(maxsize=CACHED_THUMBNAILS)(self._thumbnail)

    @cached_property
    def class_names(self) -> list[str]:
        """Names to filter by, those that are the most probable class of some image."""
        numbers = sorted(set(self.index.columns['classes'][:, 0].tolist()) - {-1})
        names = self.index.label_names
        return class_names(names[i] if names else str(i) for i in numbers)

    @cached_property
    def copies(self) -> Copies:
        """The groups of copies, found at the first question."""
        return find_copies(self.index)

    def read(self, path: str) -> Image.Image:
        """A picture to search for.

        Raises:
            UnreadableImage: It is not a picture, or too large; the message does not tell its path.
        """
        try:
            return read_image(path, exif=self.index.protocol().exif, max_pixels=self.max_pixels)
        except UnreadableImage as e:
            reason = str(e).removeprefix(f'{printable(path)}: ')
            raise UnreadableImage(f'This picture cannot be used: {reason}.') from e

    def search(self, image: Image.Image, crop: tuple | None, k: int, class_name: str | None) -> Found:
        """Classes and nearest images of a picture or a part of it.

        Args:
            image: Picture.
            crop: (x, y, width, height) in its pixels.
            k: Images wanted.
            class_name: Only images of this class.

        Raises:
            ValueError: The crop is outside of the picture, or the class was not found.
        """
        image = cut(image, crop, 'the picture') if crop else image
        with self._lock:
            embedded = embed_queries(self.index.model(), self.index.protocol(), [image])
        scores, rows = self.index.search(embedded.vectors, k, class_name)
        hits = []
        for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
            record = self.index.records(row)
            hits.append((self.thumbnail(row), f'{score:.3f}  {self.name(record.path)}', record))
        return Found(self._classes(embedded.logits), tuple(hits))

    def _classes(self, logits) -> tuple[tuple[str, float], ...]:
        if logits is None:
            return ()
        numbers, probabilities = (values[0].tolist() for values in top_classes(logits))
        names = self.index.label_names
        return tuple((printable(names[i]) if names else str(i), p)
                     for i, p in zip(numbers, probabilities, strict=True))

    def cover(self, group: CopyGroup) -> tuple[Image.Image, str]:
        """Picture and caption of a group."""
        surplus = sum(file.record.bytes for file in group.files[1:])
        kind = 'identical' if group.kind == 'exact' else 'similar'
        return self._picture_of(group.keep), f'{len(group.files)} {kind} · {size(surplus)} to gain'

    def members(self, group: CopyGroup) -> list[tuple[Image.Image, str]]:
        """Pictures and captions of the files of a group, the one to keep first."""
        shown = []
        for i, file in enumerate(group.files[:MAX_HITS]):
            r = file.record
            mark = 'KEEP' if i == 0 else f'{file.score:.3f}'
            shown.append((self._picture_of(r.path),
                          f'{mark}  {self.name(r.path)} · {r.width} x {r.height} · {size(r.bytes)}'))
        return shown

    def describe(self, record: Record) -> str:
        """A few lines on an image, plain text."""
        lines = [self.name(record.path), f'{record.width} x {record.height} pixels, {size(record.bytes)}']
        if record.classes:
            lines.append(', '.join(f'{printable(name)} {probability:.0%}' for name, probability in record.classes[:3]))
        return '\n'.join(lines)

    def name(self, path: str) -> str:
        """A path as it is shown: below the indexed folders, whose own places are nobody's business."""
        for folder in self.index.info['folders']:
            if path.startswith(folder.rstrip(os.sep) + os.sep):
                return printable(os.path.relpath(path, folder))
        return printable(os.path.basename(path))

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.index.paths)}

    def _picture_of(self, path: str) -> Image.Image:
        return self.thumbnail(self._rows[path])

    def _thumbnail(self, row: int) -> Image.Image:
        """A small picture of an indexed image; a grey one that says so if the file is gone."""
        try:
            image = read_image(
                self.index.path_of(row), exif=self.index.protocol().exif, max_pixels=self.max_pixels, size=THUMBNAIL)
        except UnreadableImage:
            image = Image.new('RGB', (THUMBNAIL, THUMBNAIL), (128, 128, 128))
            ImageDraw.Draw(image).text((20, THUMBNAIL // 2), 'The file cannot be read', 'white', font_size=24)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image


def size(number: int) -> str:
    """Bytes in words."""
    return f'{number / 1e6:.1f} MB' if number >= 1e6 else f'{number / 1e3:.0f} kB'
