"""Weights in codes of 2 to 8 bits, in blocks with scales of their own: the block types of GGUF.

A matrix is stored row by row, each row in blocks of 32 or 256 values. A block holds its scales in
float16 and its values as small integers; the sizes and the order of the bits are those of ggml,
whose files (GGUF) this project reads. All values follow from the codes by products and sums in
float32, in the order in which ggml's Python package takes them, so they are equal to the last bit.

8-bit floats (`F8_E4M3`, `F8_E5M2`) are here, too, as blocks of one value without a scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 1 << 24  # values decoded at a time; of the public matrices only T5's embedding has more


class BlockType(NamedTuple):
    """How a block is stored.

    Attributes:
        values: the number of values.
        size: the number of bytes.
        decode: from blocks (n, size), uint8, to values (n, values), float32; None for types that
            only the `gguf` package decodes.
        scales: slice of each float16 in a block by which values are multiplied or shifted.
    """

    values: int
    size: int
    decode: Callable[[Tensor], Tensor] | None = None
    scales: tuple[int, ...] = ()


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 that begins at a byte of each block, as float32 (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def fields(codes: Tensor, bits: int) -> Tensor:
    """The bit fields of each byte, lowest first, before the axis of the bytes.

    Args:
        codes: (..., b), uint8.
        bits: width of a field.

    Returns:
        (..., 8 / bits, b), uint8.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes[..., None, :] >> shifts[:, None]) & (2**bits - 1)


def fifth_bits(codes: Tensor) -> Tensor:
    """The highest of five bits, of 32 values in four bytes: (n, 4) -> (n, 32), 0 or 16."""
    return fields(codes, 1).transpose(1, 2).flatten(1) << 4


def decode_q8_0(blocks: Tensor) -> Tensor:
    """A scale and 32 signed bytes."""
    return half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def decode_q4_0(blocks: Tensor) -> Tensor:
    """A scale and 32 values of 4 bits, from -8."""
    return half(blocks, 0) * (fields(blocks[:, 2:], 4).flatten(1).float() - 8)


def decode_q4_1(blocks: Tensor) -> Tensor:
    """A scale, a minimum and 32 values of 4 bits."""
    return half(blocks, 0) * fields(blocks[:, 4:], 4).flatten(1).float() + half(blocks, 2)


def decode_q5_0(blocks: Tensor) -> Tensor:
    """A scale, 32 fifth bits, and 32 times 4 bits, from -16."""
    codes = fields(blocks[:, 6:], 4).flatten(1) | fifth_bits(blocks[:, 2:6])
    return half(blocks, 0) * (codes.float() - 16)


def decode_q5_1(blocks: Tensor) -> Tensor:
    """A scale, a minimum, 32 fifth bits, and 32 times 4 bits."""
    codes = fields(blocks[:, 8:], 4).flatten(1) | fifth_bits(blocks[:, 4:8])
    return half(blocks, 0) * codes.float() + half(blocks, 2)


def decode_q2_k(blocks: Tensor) -> Tensor:
    """16 groups of 16: scale and minimum of a group in 4 bits each, values in 2 bits."""
    packed = blocks[:, :16]
    scale = half(blocks, 80) * (packed & 15).float()
    least = half(blocks, 82) * (packed >> 4).float()
    codes = fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16).float()
    return (scale[..., None] * codes - least[..., None]).flatten(1)


def decode_q3_k(blocks: Tensor) -> Tensor:
    """16 groups of 16: scales of 6 bits, values of 2 bits and, elsewhere, a third."""
    low = fields(blocks[:, 96:104], 4).flatten(1)
    high = fields(blocks[:, 104:108], 2).flatten(1)
    scale = half(blocks, 108) * ((low | high << 4).float() - 32)
    low = fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).flatten(1)
    high = fields(blocks[:, :32], 1).flatten(1)
    codes = low.float() - 4 * (1 - high.float())
    return (scale[..., None] * codes.unflatten(1, (16, 16))).flatten(1)


def six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes: (n, 12) -> (n, 8), (n, 8)."""
    first, second, third = packed.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return scales.float(), minima.float()


def _scaled_and_shifted(blocks: Tensor, codes: Tensor) -> Tensor:
    """Values of `Q4_K` and `Q5_K`, of whose 8 groups of 32 the codes are given."""
    scales, minima = six_bits(blocks[:, 4:16])
    scale, least = half(blocks, 0) * scales, half(blocks, 2) * minima
    return (scale[..., None] * codes.reshape(-1, 8, 32).float() - least[..., None]).flatten(1)


def decode_q4_k(blocks: Tensor) -> Tensor:
    """8 groups of 32: scale and minimum of a group in 6 bits each, values in 4 bits."""
    return _scaled_and_shifted(blocks, fields(blocks[:, 16:].unflatten(1, (4, 32)), 4))


def decode_q5_k(blocks: Tensor) -> Tensor:
    """As `Q4_K`, with a fifth bit of each value elsewhere."""
    low = fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).flatten(1, 2)
    return _scaled_and_shifted(blocks, low | fields(blocks[:, 16:48], 1) << 4)


def decode_q6_k(blocks: Tensor) -> Tensor:
    """16 groups of 16: signed scales of 8 bits, values of 4 bits and, elsewhere, two more."""
    low = fields(blocks[:, :128].unflatten(1, (2, 64)), 4).flatten(1)
    high = fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1)
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    codes = (low | high << 4).unflatten(1, (16, 16)).float() - 32
    return (scale[..., None] * codes).flatten(1)


# What a tensor is called whose values are codes.
BLOCK_TYPES = {
    "Q8_0": BlockType(32, 34, decode_q8_0, (0,)),
    "Q5_1": BlockType(32, 24, decode_q5_1, (0, 2)),
    "Q5_0": BlockType(32, 22, decode_q5_0, (0,)),
    "Q4_1": BlockType(32, 20, decode_q4_1, (0, 2)),
    "Q4_0": BlockType(32, 18, decode_q4_0, (0,)),
    "Q2_K": BlockType(256, 84, decode_q2_k, (80, 82)),
    "Q3_K": BlockType(256, 110, decode_q3_k, (108,)),
    "Q4_K": BlockType(256, 144, decode_q4_k, (0, 2)),
    "Q5_K": BlockType(256, 176, decode_q5_k, (0, 2)),
    "Q6_K": BlockType(256, 210, decode_q6_k, (208,)),
    "IQ1_S": BlockType(256, 50),
    "IQ1_M": BlockType(256, 56),
    "IQ2_XXS": BlockType(256, 66),
    "IQ2_XS": BlockType(256, 74),
    "IQ2_S": BlockType(256, 82),
    "IQ3_XXS": BlockType(256, 98),
    "IQ3_S": BlockType(256, 110),
    "IQ4_NL": BlockType(32, 18),
    "IQ4_XS": BlockType(256, 136),
    "TQ1_0": BlockType(256, 54),
    "TQ2_0": BlockType(256, 66),
    "MXFP4": BlockType(32, 17),
}
EIGHT_BITS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class Codes(NamedTuple):
    """A matrix in codes.

    Attributes:
        kind: its type, in `BLOCK_TYPES` or `EIGHT_BITS`.
        rows: the bytes (out, bytes of a row), uint8.
        scale: a factor of all values, float32 (), of 8-bit floats that have one.
    """

    kind: str
    rows: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values of each."""
        block = BLOCK_TYPES.get(self.kind)
        size = self.rows.shape[1]
        return self.rows.shape[0], size if block is None else size // block.size * block.values

    @property
    def decodable(self) -> bool:
        """Whether this module decodes the type."""
        return self.kind in EIGHT_BITS or BLOCK_TYPES[self.kind].decode is not None

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The values (out, in), computed in float32."""
        values = torch.empty(self.shape, dtype=dtype, device=self.rows.device)
        step = max(1, PIECE // max(1, self.shape[1]))
        for start in range(0, len(self.rows), step):
            values[start : start + step] = self._decoded(self.rows[start : start + step])
        return values

    def _decoded(self, rows: Tensor) -> Tensor:
        if self.kind in EIGHT_BITS:
            values = rows.view(EIGHT_BITS[self.kind]).float()
            return values if self.scale is None else values * self.scale
        block = BLOCK_TYPES[self.kind]
        assert block.decode is not None, self.kind
        return block.decode(rows.reshape(-1, block.size)).view(len(rows), -1)

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite: of blocks, only the scales can be."""
        if self.kind in EIGHT_BITS:
            return bool(self.decoded(torch.float32).isfinite().all())
        block = BLOCK_TYPES[self.kind]
        blocks = self.rows.reshape(-1, block.size)
        return all(bool(half(blocks, start).isfinite().all()) for start in block.scales)
