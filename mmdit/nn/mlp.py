"""Feed-forward layers."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return self.fc2(self.activation(self.fc1(x)))
