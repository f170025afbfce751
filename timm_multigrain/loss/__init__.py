"""Instance losses and the samplers that choose the triplets they work on."""
from .losses import (
    ContrastiveLoss,
    MarginLoss,
    MetricLearningLoss,
    TripletLoss,
    create_instance_loss,
    margin_loss,
    margin_statistics,
)
from .sampling import (
    DistanceWeightedSampler,
    Triplets,
    TripletSampler,
    UniformSampler,
    create_sampler,
    effective_negatives,
)

__all__ = [
    'ContrastiveLoss', 'DistanceWeightedSampler', 'MarginLoss', 'MetricLearningLoss', 'TripletLoss', 'TripletSampler',
    'Triplets', 'UniformSampler', 'create_instance_loss', 'create_sampler', 'effective_negatives', 'margin_loss',
    'margin_statistics',
]
