"""What the web app shows, computed without gradio: classes, nearest images, groups of copies, thumbnails."""
import os
import threading
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw

from timm_multigrain.images.labels import class_names
from timm_multigrain.images.sources import UnreadableImage, printable, read_image
from timm_multigrain.index.dedup import BASES, Copies, CopyGroup, find_copies
from timm_multigrain.index.model import cut, embed_queries
from timm_multigrain.index.records import Record, top_classes
from timm_multigrain.report.page import file_size

if TYPE_CHECKING:
    from timm_multigrain.index.index import Index

__all__ = ['Answers', 'Found']

THUMBNAIL = 400
MAX_HITS = 100
CACHED_THUMBNAILS = 500


class Found(NamedTuple):
    """An image as it is shown: small picture, caption, and some lines about it."""
    picture: Image.Image
    caption: str
    details: str = ''


class Answers:
    """The questions of the web app to one index; pictures above `max_pixels` are refused before they are decoded."""

    def __init__(self, index: 'Index', max_pixels: int):
        self.index, self.max_pixels = index, max_pixels
        self._lock = threading.Lock()  # the model works on one picture at a time
        self.thumbnail = lru_cache(maxsize=CACHED_THUMBNAILS)(self._thumbnail)

    @cached_property
    def class_names(self) -> list[str]:
        """Names to filter by, those that are the most probable class of some image."""
        numbers = sorted(set(self.index.columns['classes'][:, 0].tolist()) - {-1})
        return class_names(map(self._class_name, numbers))

    def _class_name(self, number: int) -> str:
        names = self.index.label_names
        return names[number] if names else str(number)

    @cached_property
    def copies(self) -> Copies:
        """The groups of copies, found at the first question."""
        return find_copies(self.index)

    def read(self, path: str) -> Image.Image:
        """A picture to search for; UnreadableImage, whose message has no path, if it is not one or too large."""
        try:
            return read_image(path, exif=self.index.protocol().exif, max_pixels=self.max_pixels)
        except UnreadableImage as e:
            reason = str(e).removeprefix(f'{printable(path)}: ')
            raise UnreadableImage(f'This picture cannot be used: {reason}.') from e

    def search(
            self, image: Image.Image, crop: tuple | None, k: int, class_name: str | None,
    ) -> tuple[dict[str, float], list[Found]]:
        """The most probable classes of a picture or of a part (x, y, width, height), and the k nearest images."""
        image = cut(image, crop, 'the picture') if crop else image
        with self._lock:
            embedded = embed_queries(self.index.model(), self.index.protocol(), [image])
        classes = {}
        if embedded.logits is not None:
            numbers, probabilities = (values[0].tolist() for values in top_classes(embedded.logits))
            classes = {printable(self._class_name(i)): p for i, p in zip(numbers, probabilities, strict=True)}
        scores, rows = self.index.search(embedded.vectors, k, class_name)
        records = map(self.index.records, rows[0].tolist())
        return classes, [Found(self.thumbnail(r.path), f'{score:.3f}  {self.name(r.path)}', self.describe(r))
                         for score, r in zip(scores[0].tolist(), records, strict=True)]

    def cover(self, group: CopyGroup) -> Found:
        kind = 'identical' if group.kind == 'exact' else 'similar'
        return Found(self.thumbnail(group.keep),
                     f'{len(group.files)} {kind} · {file_size(group.surplus_bytes)} to gain')

    def members(self, group: CopyGroup) -> list[Found]:
        """The files of a group of copies, the one to keep first."""
        marks = ['KEEP', *(', '.join([BASES[file.basis], *file.edits]) for file in group.files[1:])]
        return [Found(self.thumbnail(r.path), f'{mark}  {self.name(r.path)} · {r.width} x {r.height} · '
                                              f'{file_size(r.bytes)}')
                for mark, r in zip(marks[:MAX_HITS], (file.record for file in group.files), strict=False)]

    def describe(self, record: Record) -> str:
        lines = [self.name(record.path), f'{record.width} x {record.height} pixels, {file_size(record.bytes)}']
        if record.classes:
            lines.append(', '.join(f'{printable(name)} {probability:.0%}' for name, probability in record.classes[:3]))
        return '\n'.join(lines)

    def name(self, path: str) -> str:
        """A path as it is shown: below the indexed folders, whose own places are nobody's business."""
        for folder in self.index.info['folders']:
            if path.startswith(folder.rstrip(os.sep) + os.sep):
                return printable(os.path.relpath(path, folder))
        return printable(os.path.basename(path))

    def _thumbnail(self, path: str) -> Image.Image:
        """A small picture of an indexed image; a grey one that says so if the file is gone."""
        try:
            image = read_image(
                path, exif=self.index.protocol().exif, max_pixels=self.max_pixels, size=THUMBNAIL)
        except UnreadableImage:
            image = Image.new('RGB', (THUMBNAIL, THUMBNAIL), (128, 128, 128))
            ImageDraw.Draw(image).text((20, THUMBNAIL // 2), 'The file cannot be read', 'white', font_size=24)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image
