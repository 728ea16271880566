"""The numbers in tensors: equality bit for bit, conversion, and whether all are finite."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The least pattern of bits, but for the sign, that is no finite number: all ones in the exponent.
LIMITS = {
    torch.float8_e4m3fn: 0x7F,  # which has no infinity
    torch.float8_e5m2: 0x7C,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
PIECE = 1 << 18  # values that are still in the cache when they are looked at a second time


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as signed integers."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Equality bit for bit, of 8-bit floats too."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def computed_in(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or the tensor's; bf16 for 8-bit floats, in which nothing computes."""
    if dtype is not None:
        return dtype
    return torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors in which a value is NaN or infinite."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy computes outside Python's lock
        finite = list(pool.map(is_finite, tensors.values()))
    return [key for key, fine in zip(tensors, finite, strict=True) if not fine]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    As integers, such values are the largest of their sign: of the positive ones when the integers
    are signed, of the negative ones when they are not. So two maxima tell, which run at the speed
    of the memory; `isfinite` takes twenty times as long.
    """
    limit, sign = LIMITS[tensor.dtype], 1 << (8 * tensor.element_size() - 1)
    signed = bits(tensor).flatten().numpy()
    unsigned = signed.view(f"u{tensor.element_size()}")
    pieces = [slice(start, start + PIECE) for start in range(0, len(signed), PIECE)]
    return all(
        signed[piece].max() < limit and unsigned[piece].max() < limit + sign for piece in pieces
    )
