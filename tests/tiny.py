"""A MultiGrain small enough to save, send and load many times in a test, and a figure to publish with it."""
import timm
import torch

import timm_multigrain


def tiny_model(seed: int = 0, **kwargs) -> torch.nn.Module:
    """Random weights, statistics, whitening and exponents, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model('multigrain', trunk='test_resnet', **{'num_classes': 3, **kwargs}).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(('running_mean', 'whitening.mean', 'whitening.proj')):
                buffer.normal_()
        if isinstance(model.head.pool, timm_multigrain.GeM) and model.head.pool.per_channel:
            model.head.pool.p.uniform_(1, 5)
    return model


def image_for(model: torch.nn.Module, size: int = 64) -> torch.Tensor:
    """Two images of the model's channels."""
    return torch.randn(2, model.in_chans, size, size, generator=torch.Generator().manual_seed(1))


def figure(value: float = 71.5, **kwargs) -> dict:
    """A figure as a results file has it."""
    return {'task': 'classification', 'dataset': 'ImageNet-1k', 'metric': 'top1', 'value': value, 'size': 224, 'p': 3,
            'protocol': 'shorter side 256, centre crop', 'whitening': None, **kwargs}
