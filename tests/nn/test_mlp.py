import torch
from torch import nn

from mmdit.nn.mlp import MLP


def test_mlp_is_linear_activation_linear():
    mlp = MLP(3, 7, nn.ReLU())
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    hidden = (x @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert mlp.fc1.weight.shape == (7, 3)
