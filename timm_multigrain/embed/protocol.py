"""How an image becomes the network's input at test time, and how several views of it become one descriptor.

'crop' and 'longer-side': Berman et al., arXiv 1902.05509, section 4. 'thumbnail' and several scales: the public
evaluation of Radenović et al., arXiv 1711.02512, github.com/filipradenovic/cnnimageretrieval-pytorch.
"""
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms as T

from timm_multigrain.files import json_p, printable
from timm_multigrain.images.pixels import decode
from timm_multigrain.models.save import fitted, whitened_for
from timm_multigrain.models.trunk import InputSizes

MS_SCALES = (1., 2 ** -0.5, 0.5)
_KINDS = ('crop', 'longer-side', 'shorter-side', 'thumbnail')
MAX_SIZE = 65_535  # pixels, the longest side of a JPEG
_FILTERS = [mode.value for mode in T.InterpolationMode if mode is not T.InterpolationMode.NEAREST_EXACT]
_CROP_MODES = ('center', 'squash', 'border')
_LONGEST = 32  # times the shorter side: what a centre crop has no use for


@dataclass(frozen=True)
class Protocol:
    """Test protocol.

    Attributes:
        size: Side of the crop, or longer or shorter side, in pixels.
        kind: 'crop' (shorter side size / crop_pct, then the central size x size pixels), 'longer-side' (longer side
            becomes size, nothing is cut off), 'shorter-side' (the same with the shorter one) or 'thumbnail' (longer
            side becomes at most size, by Pillow's thumbnail; a part cut out of an image is reduced by the factor of the
            whole).
        scales: Factors of the input's sides; the descriptor is the average over them.
        flip: Average the descriptors of the image and its mirror image at each scale.
        exif: Turn images upright as their EXIF orientation says.
        mean: Normalisation mean, RGB.
        std: Normalisation standard deviation, RGB.
        crop_pct: Share of the shorter side that the crop keeps; 224 / 256 in the paper.
        interpolation: Filter of the resize: 'bilinear' as in the paper, 'bicubic', ...; 'lanczos' of 'thumbnail'.
        crop_mode: Of 'crop', as in timm: 'center', or 'squash' or 'border' for nothing cut off.

    Raises:
        ValueError: Unknown kind, interpolation or crop mode, a size below 1, or a scale that is not above 0.
    """
    size: int = 224
    kind: str = 'crop'
    scales: tuple[float, ...] = (1.,)
    flip: bool = False
    exif: bool = True
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    interpolation: str = 'bilinear'
    crop_mode: str = 'center'

    def __post_init__(self):
        if self.kind == 'thumbnail':
            object.__setattr__(self, 'interpolation', 'lanczos')
        for name in ('scales', 'mean', 'std'):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not (isinstance(self.size, int) and 0 < self.size <= MAX_SIZE):
            raise ValueError(f'size is {self.size}: give a number from 1 to {MAX_SIZE} pixels, such as 224.')
        for name, known in (('kind', _KINDS), ('crop_mode', _CROP_MODES), ('interpolation', _FILTERS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} is {getattr(self, name)!r}: give one of {", ".join(known)}.')
        if not 0 < self.crop_pct <= self.size:
            raise ValueError(f'crop_pct is {self.crop_pct}: give a number above 0, such as 0.875.')
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f'scales are {self.scales}: give factors above 0, such as 1 0.7071 0.5')

    @classmethod
    def for_model(cls, model: torch.nn.Module, default_kind: str = 'longer-side', **kwargs) -> 'Protocol':
        """The protocol for a model.

        Args:
            model: Its data configuration gives the defaults, as timm tests it; if it is whitened, size and kind are
                those that the whitening was fitted for.
            default_kind: Kind for a model that is not whitened.
            **kwargs: Attributes that are given; None counts as not given.
        """
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        size = (cfg.get('test_input_size') or cfg.get('input_size') or (3, 224, 224))[-1]
        own = {'size': size, 'kind': default_kind, 'crop_pct': cfg.get('test_crop_pct') or cfg.get('crop_pct'),
               **{name: cfg.get(name) for name in ('mean', 'std', 'interpolation', 'crop_mode')}}
        values = {**own, **whitened_for(model), **{k: v for k, v in kwargs.items() if v is not None}}
        return cls(**{k: v for k, v in values.items() if v is not None})

    def __str__(self) -> str:
        name = {
            'longer-side': f'longer side {self.size}, smaller images enlarged',
            'shorter-side': f'shorter side {self.size}, smaller images enlarged',
            'thumbnail': f'longer side at most {self.size} (thumbnail), smaller images as they are',
            'crop': f'crop {self.size}' + f', crop_pct {self.crop_pct:g}' * (self.crop_pct != 0.875)
                    + f', {self.crop_mode}' * (self.crop_mode != 'center')}[self.kind]
        name += f', {self.interpolation}' * (self.interpolation != 'bilinear')
        if self.scales != (1.,):
            name += ', scales ' + ' '.join(f'{scale:.4g}' for scale in self.scales)
        return name + ', flip' * self.flip + ', EXIF ignored' * (not self.exif)

    def to_dict(self) -> dict:
        """Its attributes as JSON has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def transform(self, image: Image.Image) -> torch.Tensor:
        """PIL image to normalised float32 (3, H, W)."""
        return self.normalize(self.pixels(image))

    def pixels(
            self,
            image: Image.Image,
            whole: tuple[int, int] | None = None,
            sizes: InputSizes | None = None,
    ) -> torch.Tensor:
        """PIL image to (3, H, W) uint8, resized and cropped.

        Args:
            whole: (width, height) of the image that it was cut out of.
            sizes: The model's; an image of another size is resized to the nearest of them, without a crop at once.
        """
        image = given = decode(image, self.exif)
        mode = T.InterpolationMode(self.interpolation)
        if self.kind == 'thumbnail':
            side = max(1, self.size * max(image.size) / max(whole or image.size))
            image = image.copy()
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        elif self.kind in ('longer-side', 'shorter-side'):
            image = image if self.kind == 'longer-side' else _cut_long_ends(image)
            side = (max if self.kind == 'longer-side' else min)(image.size)
            sides = [max(1, self.size * length // side) for length in (image.height, image.width)]
            image = T.functional.resize(image, sides, mode)
        else:
            image = self._crop(_cut_long_ends(image) if self.crop_mode == 'center' else image)
        if sizes is not None:
            height, width = sizes.nearest(image.height, image.width)
            if (width, height) != image.size:
                image = T.functional.resize(image if self.kind == 'crop' else given, [height, width], mode)
        # the layout decides which convolution runs, and so the last bits of the result
        return T.functional.pil_to_tensor(image).contiguous()

    def _crop(self, image: Image.Image) -> Image.Image:
        """timm's transform, up to the conversion to a tensor."""
        transform = create_transform(
            (3, self.size, self.size), crop_pct=self.crop_pct, crop_mode=self.crop_mode, mean=self.mean,
            interpolation=self.interpolation, normalize=False)
        return T.Compose(transform.transforms[:-1])(image)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) uint8 to float32, as ToTensor and Normalize do."""
        # not made on the device, where the host would wait for it
        mean, std = (torch.tensor(v).view(3, 1, 1).to(pixels.device, non_blocking=True) for v in (self.mean, self.std))
        return (pixels.to(torch.float32) / 255).sub_(mean).div_(std)

    def views(self, x: torch.Tensor, sizes: InputSizes | None = None) -> Iterator[list[torch.Tensor]]:
        """Scale by scale, the views of normalised images (N, 3, H, W): the images, and their mirror images.

        With the model's `sizes`, scaled ones get the nearest of them.
        """
        for scale in self.scales:
            y = x
            if scale != 1:
                scaled = tuple(math.floor(side * scale) for side in x.shape[-2:])
                size = tuple(max(1, side) for side in scaled)
                size = size if sizes is None else sizes.nearest(*size)
                by = {'scale_factor': scale} if size == scaled else {'size': size}
                y = F.interpolate(x, mode='bilinear', align_corners=False, **by)
            yield [y, y.flip(-1)] if self.flip else [y]


def _cut_long_ends(image: Image.Image) -> Image.Image:
    """Without the ends that a centre crop cuts off: enlarging them would take gigabytes for a 1 x 20,000 image."""
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = image.size
    left, top = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def check_fitted(model: torch.nn.Module, protocol: Protocol) -> str | None:
    """A sentence to warn with, if the model's whitening was fitted for another size, protocol or p; None if not."""
    settings = fitted(model, 'whitening')
    if settings is None or not getattr(model, 'whitened', False):
        return None
    here = {**protocol.to_dict(), 'p': json_p(model.gem_p)}
    there = whitened_for(model)
    if isinstance(model.gem_p, float) and settings.get('p') is not None:
        there['p'] = settings['p']
    differing = [f'{name} {printable(str(was))} there, {here[name]} here' for name, was in there.items()
                 if was != here[name]]
    if not differing:
        return None
    return f'The whitening was fitted for other settings ({"; ".join(differing)}): whiten the model again for these.'
