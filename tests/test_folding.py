"""Folded batch norms: the same function up to rounding, or the model as it was."""
import pytest
import timm
import torch
import torch.nn as nn

from timm_multigrain.models import MultiGrain
from timm_multigrain.models.trunk import fold_batch_norm


def randomize(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize('trunk', ['test_resnet', 'test_efficientnet', 'test_byobnet', 'resnet18', 'densenet121'])
def test_same_function(trunk):
    model = randomize(MultiGrain(trunk, 0))
    folded = fold_batch_norm(model)
    assert norms(folded) == {'densenet121': 62}.get(trunk, 0) < norms(model)
    x = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(folded.embed(x), model.embed(x), atol=5e-5, rtol=0)


@pytest.mark.parametrize('trunk', ['test_convnext', 'test_vit'])
def test_models_without(trunk):
    model = MultiGrain(trunk, 0).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(fold_batch_norm(model)(x), model(x))


class Shared(nn.Module):
    """A convolution whose output is used twice, and a batch norm that runs twice."""
    in_chans = 3

    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y) + y
        return self.bn2(self.conv2(z)) + self.bn2(z)


def test_impossible_foldings_are_left():
    model = randomize(Shared())
    x = torch.randn(2, 3, 16, 16)
    folded = fold_batch_norm(model)
    with torch.inference_mode():
        assert torch.equal(folded(x), model(x)) and norms(folded) == norms(model)


def test_the_model_stays():
    model = randomize(timm.create_model('test_resnet', num_classes=0)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not fold_batch_norm(model).training and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
