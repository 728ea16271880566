"""Choosing the precision: bfloat16 autocast where the hardware accelerates it, else float32."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mmdit.errors import UserError

Autocast = Callable[[], AbstractContextManager[object]]


# Instructions that multiply bfloat16 matrices: torch's name and the common name.
CPU_UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "sve_bf16": "SVE-BF16",
    "bf16": "NEON-BF16",
}


def cpu_capabilities() -> Mapping[str, Any]:
    """Capabilities of the processor, even if torch is limited to fewer instructions."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {  # in the oldest versions of torch that are supported
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }


def bf16_unit(device: torch.device) -> str | None:
    """Name of the device's hardware for bfloat16 matrix products; None if it has none."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16 tensor cores" if native else None
    known = cpu_capabilities() if device.type == "cpu" else {}
    return next((name for key, name in CPU_UNITS.items() if known.get(key)), None)


def reason(device: torch.device, precision: str) -> str:
    """The chosen precision and the reason for it, for the log."""
    name = "bf16" if chosen_dtype(device, precision) == torch.bfloat16 else "fp32"
    if precision != "auto":
        return f"{name}, as requested by precision={precision}"
    found = f"has {unit}" if (unit := bf16_unit(device)) else "has no bfloat16 matrix instructions"
    return f"{name} (precision=auto): this {device.type} {found}"


def autocast(device: torch.device, precision: str) -> Autocast:
    """Context factory for `precision`: 'bf16', 'fp32', or 'auto' (bf16 if hardware supports it).

    Raises:
        UserError: `precision` is not one of the three.
    """
    if chosen_dtype(device, precision) == torch.bfloat16:
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def chosen_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype for `precision`: 'bf16', 'fp32', or 'auto' (bf16 if hardware supports it).

    Raises:
        UserError: `precision` is not one of the three.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision {precision!r} must be 'auto', 'bf16' or 'fp32'")
    use_bf16 = precision == "bf16" or (precision == "auto" and bf16_unit(device) is not None)
    return torch.bfloat16 if use_bf16 else torch.float32
