"""Models in the layout of the Hugging Face Hub: saved, and published with a card."""
from timm_multigrain.measure.results import Metric, read_metrics
from timm_multigrain.models.save import save_pretrained

from .publish import Publication, publish

__all__ = ['Metric', 'Publication', 'publish', 'read_metrics', 'save_pretrained']
