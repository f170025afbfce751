"""Some of the images of a source."""
import hashlib
import json
from collections.abc import Sequence

from PIL import Image

from .sources import Box, ImageSource

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
        return self.source.load(self.indices[i], exif=exif)

    def box(self, i: int) -> Box | None:
        return self.source.box(self.indices[i])

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.source.fingerprint(), self.indices]).encode()).hexdigest()
