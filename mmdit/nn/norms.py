"""Normalizations. Statistics are taken in float32 at least, whatever the dtype of the input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.dtypes import wide


class LayerNorm(nn.Module):
    """LayerNorm without affine parameters, eps 1e-6: the adaLN of DiT supplies scale and shift."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return F.layer_norm(x, (self.width,), eps=self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; of Q and K per head when `qk_norm` asks (Sec. 5.3.2).

    The mean square is taken in float32 at least: its error in bfloat16 reaches the logits.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        h = wide(x)
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (normed * wide(self.weight)).to(x.dtype)
