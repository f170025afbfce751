"""Edited copies of a picture, the kinds that copy detection is measured on (as INRIA Copydays: crop, JPEG, strong)."""
import io
import math
from collections.abc import Callable, Iterable
from functools import partial

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from .pixels import decode


def resize(image: Image.Image, scale: float) -> Image.Image:
    return image.resize([max(1, round(scale * side)) for side in image.size], Image.LANCZOS)


def crop(image: Image.Image, area: float = 0.5) -> Image.Image:
    """A share of the area, half by default, a little off the centre."""
    return _crop(image, math.sqrt(area) * image.width, math.sqrt(area) * image.height, 0.4, 0.6)


def jpeg(image: Image.Image, quality: int = 8) -> Image.Image:
    """Compression, heavy by default: JPEG quality 8."""
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=quality)
    return Image.open(buffer).convert('RGB')


def rotate(image: Image.Image, degrees: float = 15) -> Image.Image:
    """Less than a quarter turn, 15 degrees by default, cropped to the largest upright rectangle inside."""
    angle = math.radians(degrees)
    sin, cos = math.sin(angle), math.cos(angle)
    long, short = max(image.size), min(image.size)
    if short <= 2 * sin * cos * long:  # two corners of the rectangle touch the long sides
        across = 0.5 * short
        width, height = (across / sin, across / cos) if image.width >= image.height else (across / cos, across / sin)
    else:
        width = (image.width * cos - image.height * sin) / math.cos(2 * angle)
        height = (image.height * cos - image.width * sin) / math.cos(2 * angle)
    turned = image.rotate(degrees, Image.BICUBIC, expand=True)
    return _crop(turned, width - 1, height - 1, 0.5, 0.5)


def blur(image: Image.Image, share: float = 0.02) -> Image.Image:
    """Gaussian blur; its deviation is a share of the side, 2 % by default."""
    return image.filter(ImageFilter.GaussianBlur(share * math.sqrt(image.width * image.height)))


def colour(image: Image.Image) -> Image.Image:
    """Darker, more contrast, paler colours."""
    for enhance, factor in ((ImageEnhance.Brightness, 0.75), (ImageEnhance.Contrast, 1.4), (ImageEnhance.Color, 0.4)):
        image = enhance(image).enhance(factor)
    return image


def text(image: Image.Image) -> Image.Image:
    """A caption on a dark band over the lower quarter."""
    image, words = image.copy(), 'SEEN THIS?'
    width, height = image.size
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0.75 * height, width, height), fill=(20, 20, 20))
    font_size = min(0.2 * height, 1.4 * width / len(words))
    if font_size >= 1:
        draw.text((width / 2, 0.875 * height), words, 'white', ImageFont.load_default(font_size), anchor='mm')
    return image


def screenshot(image: Image.Image) -> Image.Image:
    """The picture inset in a page twice its area, between a dark bar and lines of text."""
    width, height = (math.ceil(math.sqrt(2) * side) for side in image.size)
    page = Image.new('RGB', (width, height), (240, 240, 245))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(max(4, 0.04 * height))
    draw.rectangle((0, 0, width, 0.1 * height), fill=(50, 80, 140))
    for line in range(3):
        draw.text((0.05 * width, (0.86 + 0.045 * line) * height), 'Something is written below it.', 'black', font)
    page.paste(image, (int(0.8 * (width - image.width)), int(0.45 * (height - image.height))))
    return page


def strong(image: Image.Image) -> Image.Image:
    """Crop, rotation, colour change and heavy compression together."""
    return jpeg(colour(rotate(crop(image))))


def _crop(image: Image.Image, width: float, height: float, across: float, down: float) -> Image.Image:
    """Crop at least one pixel, `across` and `down` being the share of the margin left of it and above it."""
    width, height = max(1, int(width)), max(1, int(height))
    left, top = int(across * (image.width - width)), int(down * (image.height - height))
    return image.crop((left, top, left + width, top + height))


# Every edit takes an RGB picture and gives one, mild and strong; nothing is random.
EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    'resize 1/2': partial(resize, scale=0.5),
    'resize 1/4': partial(resize, scale=0.25),
    'resize x2': partial(resize, scale=2),
    **{f'crop {share} %': partial(crop, area=share / 100) for share in (90, 70, 50)},
    **{f'jpeg {quality}': partial(jpeg, quality=quality) for quality in (90, 50, 20, 10, 5)},
    **{f'rotate {degrees}': partial(rotate, degrees=degrees) for degrees in (5, 10, 15)},
    'rotate 90': partial(Image.Image.transpose, method=Image.Transpose.ROTATE_90),
    'blur 1 %': partial(blur, share=0.01),
    'blur 2 %': partial(blur, share=0.02),
    'bright x1.5': lambda image: ImageEnhance.Brightness(image).enhance(1.5),
    'colour': colour,
    'grey': lambda image: ImageOps.grayscale(image).convert('RGB'),
    'mirror': ImageOps.mirror,
    'text': text,
    'screenshot': screenshot,
    'strong': strong,
}
# One of each kind, by which training, the demo and the benchmarks of models measure; more and less of it is above.
COPY_TRANSFORMS: dict[str, Callable[[Image.Image], Image.Image]] = {
    'crop': crop, 'jpeg': jpeg, 'rotate': rotate, 'blur': blur, 'colour': colour, 'mirror': ImageOps.mirror,
    'text': text, 'strong': strong}


def make_copies(image: Image.Image, names: Iterable[str] = COPY_TRANSFORMS) -> dict[str, Image.Image]:
    """Edited RGB copies of a picture of any mode and size, always the same for the same picture.

    Args:
        image: The picture; it is not changed.
        names: Keys of `COPY_TRANSFORMS`.
    """
    image = decode(image)
    return {name: COPY_TRANSFORMS[name](image) for name in names}
