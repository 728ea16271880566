"""Where bfloat16 pays, and how it is switched on. Autocast lives in engine and pipeline only."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from mmdit.errors import UserError

Autocast = Callable[[], AbstractContextManager[object]]


def bf16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: str) -> Autocast:
    """Context factory for `precision`: 'bf16', 'fp32', or 'auto' (bf16 where it pays).

    Raises:
        UserError: `precision` is none of the three.
    """
    if chosen_dtype(device, precision) == torch.bfloat16:
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def chosen_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype of `precision`: 'bf16', 'fp32', or 'auto' (bf16 where it pays).

    Raises:
        UserError: `precision` is none of the three.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision {precision!r} must be 'auto', 'bf16' or 'fp32'")
    pays = precision == "bf16" or (precision == "auto" and bf16_pays(device))
    return torch.bfloat16 if pays else torch.float32
