"""adaLN-zero: timestep and pooled text give every block its shifts, scales and gates."""

import torch.nn.functional as F
from torch import Tensor, nn


class Modulation(nn.Module):
    """`parts` vectors of size `width`, as a linear function of SiLU(y) (Fig. 2b).

    Initialized to zero, so that a new block is the identity (its gates are closed).
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts, self.values = parts, parts * width
        self.linear = nn.Linear(width, parts * width)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:  # (b, d) -> parts x (b, 1, d)
        return self.linear(F.silu(y)).unsqueeze(1).chunk(self.parts, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x (b, n, d) and the vectors (b, 1, d)."""
    return x * (1 + scale) + shift
