"""Where bfloat16 pays, and how it is switched on. Autocast lives in engine and pipeline only."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mmdit.errors import UserError

Autocast = Callable[[], AbstractContextManager[object]]


# By what processors multiply bfloat16 matrices, as torch names it and as people do.
CPU_UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "sve_bf16": "SVE-BF16",
    "bf16": "NEON-BF16",
}


def cpu_capabilities() -> Mapping[str, Any]:
    """What the processor can do, whatever instructions torch is limited to."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {  # of the first versions of torch that are supported
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }


def bf16_unit(device: torch.device) -> str | None:
    """By what the device multiplies bfloat16 matrices in hardware; None where it does not."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16 tensor cores" if native else None
    known = cpu_capabilities() if device.type == "cpu" else {}
    return next((name for key, name in CPU_UNITS.items() if known.get(key)), None)


def reason(device: torch.device, precision: str) -> str:
    """What is computed in, and why, for the first lines of a run."""
    name = "bf16" if chosen_dtype(device, precision) == torch.bfloat16 else "fp32"
    if precision != "auto":
        return f"{name}, as asked for by precision={precision}"
    found = f"has {unit}" if (unit := bf16_unit(device)) else "has no bfloat16 matrix instructions"
    return f"{name} (precision=auto): this {device.type} {found}"


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
    pays = precision == "bf16" or (precision == "auto" and bf16_unit(device) is not None)
    return torch.bfloat16 if pays else torch.float32
