import torch
import torch.nn.functional as F
from torch import nn

from mmdit.nn.mlp import MLP, tanh_gelu


def test_mlp_is_linear_activation_linear():
    mlp = MLP(3, 7, nn.ReLU())
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    hidden = (x @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert mlp.fc1.weight.shape == (7, 3)


def test_tanh_gelu_is_the_same_compiled_and_not():
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    expected = F.gelu(x, approximate="tanh")
    assert torch.equal(tanh_gelu(x), expected)
    traced = torch.compile(tanh_gelu, backend="eager")
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=1e-12)
    assert not torch.equal(traced(x), expected), "the compiled form was not reached"
