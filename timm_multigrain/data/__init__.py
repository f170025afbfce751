"""Repeated augmentation, instance ids and transforms of MultiGrain (arXiv 1902.05509)."""
from .instance_dataset import InstanceDataset
from .lighting import Lighting
from .loader import create_loader
from .repeated_aug import RepeatedAugSampler
from .transforms import create_eval_transform, create_transform, resize_shape

__all__ = [
    'InstanceDataset',
    'Lighting',
    'RepeatedAugSampler',
    'create_eval_transform',
    'create_loader',
    'create_transform',
    'resize_shape',
]
