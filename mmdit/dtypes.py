"""Dtypes to compute in, and casts that keep sensitive values in at least float32."""

from typing import Any

import torch
from torch import Tensor

from mmdit.errors import UserError

COMPUTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """Cast x to float32, unless it is float64."""
    return x.to(at_least_float32(x.dtype))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 if `dtype` is float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect_computable(dtype: Any) -> None:
    """Check that models can compute in a dtype; None stands for that of the weights.

    Raises:
        UserError: they cannot.
    """
    if dtype is not None and dtype not in COMPUTABLE:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(map(str, COMPUTABLE))}")
