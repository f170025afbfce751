"""Embedding and logits of any timm model from one pass through its head, the embedding without dropout.

Most of timm's heads apply dropout before they return what `pre_logits=True` asks for, and some have a batch norm, which
a second pass would update twice.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from timm_multigrain.models.trunk import own_size

_DROPOUTS = F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout


class Head(NamedTuple):
    """What comes between the embedding and the logits of a model.

    Attributes:
        shape: How the classifier takes an embedding, (C,) or (C, 1, 1); None where the logits are not the classifier of
            the embedding: several classifiers, or a norm between the two.
        drop_rate: Of the dropout before the classifier.
    """
    shape: tuple[int, ...] | None
    drop_rate: float


class _NoDropout(TorchFunctionMode):
    """Leaves out every dropout, module or function, and keeps their rates."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            self.rates.append(kwargs['p'] if 'p' in kwargs else args[1])
            return kwargs['input'] if 'input' in kwargs else args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def inspect_head(model: nn.Module) -> Head:
    """The head of a timm model, found by running it once; the model is left in its mode."""
    modes = {module: module.training for module in model.modules()}
    channels = getattr(model, 'in_chans', model.pretrained_cfg['input_size'][0])
    x = torch.randn(1, channels, *own_size(model), generator=torch.Generator().manual_seed(0))
    calls, classifier = [], model.get_classifier()
    handle = None
    try:
        features = model.eval().forward_features(x.to(next(model.parameters())))
        embedding = model.forward_head(features, pre_logits=True)
        if isinstance(classifier, nn.Module):
            handle = classifier.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
        with _NoDropout() as dropouts:
            logits = model.forward_head(features)
    finally:
        if handle is not None:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    drop_rate = dropouts.rates[-1] if dropouts.rates else 0.
    if len(calls) == 1:
        given, output = calls[0]
        if torch.equal(given.flatten(1), embedding) and torch.equal(output.flatten(1), logits):
            return Head(tuple(given.shape[1:]), drop_rate)
    return Head(None, drop_rate)


def embed_and_classify(model: nn.Module, features: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, E) embedding before any dropout, and (N, K) logits after it, of what ``forward_features`` gives."""
    if model.training and head.drop_rate:
        with _NoDropout():
            embedding = model.forward_head(features, pre_logits=True)
    else:
        embedding = model.forward_head(features, pre_logits=True)
    if head.shape is None:
        return embedding, model.forward_head(features)
    dropped = F.dropout(embedding, head.drop_rate, model.training)
    return embedding, model.get_classifier()(dropped.reshape(-1, *head.shape)).flatten(1)
