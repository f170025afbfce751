"""Some of the images of a source."""
import hashlib
import json
from collections.abc import Sequence

from PIL import Image

from .sources import ImageSource

__all__ = ['Subset']


class Subset(ImageSource):
    """The images of these numbers, in this order.

    Args:
        source: Images.
        indices: Numbers of those to take.
        labels: Class of each, those of the source by default.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], labels: Sequence[int] | None = None):
        self.source = source
        self.indices = list(indices)
        self.names = [source.names[i] for i in self.indices]
        self.class_names = source.class_names
        self.labels = labels
        if labels is None and source.labels is not None:
            self.labels = [source.labels[i] for i in self.indices]

    def load(self, i: int, exif: bool = True) -> Image.Image:
        return self.load_part(i, exif)[0]

    def load_part(self, i: int, exif: bool = True) -> tuple[Image.Image, tuple[int, int]]:
        return self.source.load_part(self.indices[i], exif=exif)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.source.fingerprint(), self.indices]).encode()).hexdigest()
