"""Repeated augmentation, instance ids and transforms of MultiGrain (arXiv 1902.05509)."""
from timm_multigrain.images.transforms import create_eval_transform, resize_shape

from .decoded import DecodedDataset
from .instance_dataset import InstanceDataset
from .lighting import Lighting
from .loader import create_loader
from .repeated_aug import RepeatedAugSampler
from .transforms import create_transform

__all__ = [
    'DecodedDataset',
    'InstanceDataset',
    'Lighting',
    'RepeatedAugSampler',
    'create_eval_transform',
    'create_loader',
    'create_transform',
    'resize_shape',
]
