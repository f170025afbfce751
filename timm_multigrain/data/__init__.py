"""Repeated augmentation, instance ids and colour noise of MultiGrain (arXiv 1902.05509)."""
from .instances import DecodedDataset, InstanceDataset
from .loader import create_loader
from .samplers import InstanceSampler, RepeatedAugSampler
from .transforms import Lighting

__all__ = ['DecodedDataset', 'InstanceDataset', 'InstanceSampler', 'Lighting', 'RepeatedAugSampler', 'create_loader']
