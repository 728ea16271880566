"""Feed-forward layers."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016): x (1 + tanh u) / 2, u = u(x, x^3)."""
    if torch.compiler.is_compiling():
        # The same value, since (1 + tanh u) / 2 = sigmoid(2u), but twice as fast once compiled for
        # a CPU. Uncompiled, each operation would be one pass over memory.
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return self.fc2(self.activation(self.fc1(x)))
