"""Models in the layout of the Hugging Face Hub: saved, and published with a card."""
from .metrics import Metric, read_metrics
from .publish import Publication, publish
from .save import save_pretrained

__all__ = ['Metric', 'Publication', 'publish', 'read_metrics', 'save_pretrained']
