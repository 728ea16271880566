"""Dtypes to compute in, and what stays in float32 or float64 where the rest is narrower."""

from typing import Any

import torch
from torch import Tensor

from mmdit.errors import UserError

COMPUTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """x in float32 where it is narrower; float64 stays float64."""
    return x.to(at_least_float32(x.dtype))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 where `dtype` is that, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect_computable(dtype: Any) -> None:
    """Refuse a dtype that models cannot compute in; None stands for that of the weights.

    Raises:
        UserError: it is one of those.
    """
    if dtype is not None and dtype not in COMPUTABLE:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(map(str, COMPUTABLE))}")
