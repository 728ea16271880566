"""What stays in float32 where the rest is half precision, and in float64 where it is that."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 where it is narrower; float64 stays float64."""
    return x.to(at_least_float32(x.dtype))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 where `dtype` is that, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
