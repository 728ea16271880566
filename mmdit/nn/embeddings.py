"""Embeddings of timesteps, positions and patches."""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of 1000 t, cosines first; float32 always.

    In bfloat16 only about half of the thousand timesteps would stay distinct. In float64 the angles
    would differ by 1e-5 from those of other implementations, with which all weights were trained,
    and comparisons of networks in float64 would no longer be exact.

    Args:
        t: (b,), in [0, 1] as a rule; an F-prediction gives log(b_t) / 4 in its place, which may be
            negative. This is the only place where time is scaled by 1000.

    Returns:
        (b, width), float32.
    """
    half = width // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class VectorEmbedding(nn.Module):
    """Linear, SiLU, Linear; embeds the pooled text (Fig. 2a)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, width)
        self.activation = nn.SiLU()
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (b, p) -> (b, d)
        return self.fc2(self.activation(self.fc1(x)))


class TimestepEmbedding(VectorEmbedding):
    """`VectorEmbedding` of the sinusoid of a time, or of a difference of times (Fig. 2a)."""

    def __init__(self, width: int) -> None:
        super().__init__(256, width)

    def forward(self, t: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """t (b,) -> (b, d), of the sinusoid as `cast` returns it (`Network.cast`)."""
        return super().forward(cast(sinusoid(t)))


class PatchEmbedding(nn.Module):
    """Embed non-overlapping p x p patches of the latent as tokens, row by row."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width)

    def forward(self, z: Tensor) -> Tensor:  # (b, c, h, w) -> (b, n, d)
        p = self.patch_size
        return self.proj(rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


def unpatchify(x: Tensor, *, rows: int, columns: int, patch_size: int) -> Tensor:
    """Assemble patches: (b, rows*columns, p*p*c) -> (b, c, rows*p, columns*p)."""
    p = patch_size
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)


def position_table(width: int, *, size: int, grid: int, base: int) -> Tensor:
    """Fixed 2D sin-cos table of `size` x `size` patches (Sec. 5.3.2, "Positional encodings").

    Patch p of a side sits at (p - (size - grid)/2) * base/grid: the middle `grid` patches, the
    training resolution, span [0, base), the span seen when pretraining at `base` patches a side.
    The first half of the width encodes the column, the second the row, each as sines then cosines.

    Returns:
        (size, size, width), of the default dtype; computed in float64.
    """
    coordinate = (torch.arange(size, dtype=torch.float64) - (size - grid) / 2) * base / grid
    quarter = width // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = coordinate[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (size, width / 2)
    column = axis[None, :, :].expand(size, size, -1)
    row = axis[:, None, :].expand(size, size, -1)
    return torch.cat([column, row], dim=-1).to(torch.get_default_dtype())


def centre_crop(table: Tensor, rows: int, columns: int) -> Tensor:
    """Middle rows x columns of a (size, size, d) table, flattened to (rows*columns, d)."""
    size = table.shape[0]
    top, left = (size - rows) // 2, (size - columns) // 2
    return rearrange(table[top : top + rows, left : left + columns], "h w d -> (h w) d")
