"""Instance losses and the samplers that choose the triplets they work on."""
from .losses import (
    ContrastiveLoss,
    MarginLoss,
    MetricLearningLoss,
    TripletLoss,
    balanced_beta,
    create_instance_loss,
    margin_loss,
    margin_statistics,
)
from .sampling import DistanceWeightedSampler, UniformSampler, create_sampler, effective_negatives
from .triplets import Triplets, TripletSampler

__all__ = [
    'ContrastiveLoss', 'DistanceWeightedSampler', 'MarginLoss', 'MetricLearningLoss', 'TripletLoss', 'TripletSampler',
    'Triplets', 'UniformSampler', 'balanced_beta', 'create_instance_loss', 'create_sampler', 'effective_negatives',
    'margin_loss', 'margin_statistics',
]
