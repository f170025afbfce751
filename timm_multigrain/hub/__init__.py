"""Models in the layout of the Hugging Face Hub: saved, published with a card, and verified when they are downloaded."""
from .metrics import Metric, read_metrics
from .publish import Publication, publish
from .save import save_pretrained
from .verify import verified_hub_file

__all__ = ['Metric', 'Publication', 'publish', 'read_metrics', 'save_pretrained', 'verified_hub_file']
