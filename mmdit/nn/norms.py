"""Normalizations. Statistics are computed in at least float32, whatever the input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.dtypes import wide


class LayerNorm(nn.Module):
    """LayerNorm without affine parameters, eps 1e-6: adaLN supplies scale and shift."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return F.layer_norm(x, (self.width,), eps=self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; of Q and K per head with `qk_norm` (Sec. 5.3.2).

    The mean square is computed in at least float32: a bfloat16 error would reach the logits.
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
