"""Values of tensors: bitwise equality, dtypes to compute in, and a search for NaN."""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mmdit.checkpoints.headers import DTYPES, Info

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The smallest bit pattern, sign aside, that is not a finite number: an exponent of all ones.
LIMITS = {
    torch.float8_e4m3fn: 0x7F,  # which has no infinity
    torch.float8_e5m2: 0x7C,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
PIECE = 1 << 18  # values per piece, which is still in the cache for its second pass


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as signed integers of the same size."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, 8-bit floats included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def computed_in(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The requested dtype, or else the tensor's own; bfloat16 for 8-bit floats."""
    if dtype is not None:
        return dtype
    return torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype


def loaded_in(info: Info) -> torch.dtype:
    """The dtype of a stored tensor in a model: its own, or bfloat16 for codes of up to 8 bits."""
    dtype = DTYPES.get(info.dtype, torch.uint8)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def loaded_bytes(info: Info) -> int:
    """The memory that a stored tensor takes in a model that keeps the file's dtypes."""
    return math.prod(info.shape) * loaded_in(info).itemsize


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors in which a value is NaN or infinite."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the GIL
        finite = list(pool.map(is_finite, tensors.values()))
    return [key for key, fine in zip(tensors, finite, strict=True) if not fine]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Read as integers, such values exceed all others of their sign: a maximum over signed integers
    finds the positive ones, and one over unsigned integers the negative ones. Both run at the speed
    of memory; `isfinite` takes twenty times as long.
    """
    limit, sign = LIMITS[tensor.dtype], 1 << (8 * tensor.element_size() - 1)
    signed = bits(tensor).flatten().numpy()
    unsigned = signed.view(f"u{tensor.element_size()}")
    pieces = [slice(start, start + PIECE) for start in range(0, len(signed), PIECE)]
    return all(
        signed[piece].max() < limit and unsigned[piece].max() < limit + sign for piece in pieces
    )
