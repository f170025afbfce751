"""Formats that Pillow learns from a package of its own, where that is installed."""
from functools import cache

from PIL import Image

from timm_multigrain.images.sources import ImageFiles, read_image

__all__ = ['CollectionFiles', 'read_picture', 'register_formats']


@cache
def register_formats() -> None:
    """Let Pillow read HEIC if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def read_picture(path, exif: bool = True) -> Image.Image:
    """As `read_image`, HEIC too if pillow-heif is installed."""
    register_formats()
    return read_image(path, exif=exif)


class CollectionFiles(ImageFiles):
    """Image files whose reading processes know all formats, however they were started."""

    def load(self, i: int, exif: bool = True) -> Image.Image:
        register_formats()
        return super().load(i, exif=exif)
