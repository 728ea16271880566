"""Attention: the one function that every network calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_trained = ContextVar("attention as in training", default=False)


@contextmanager
def as_in_training() -> Iterator[None]:
    """Compute attention within the block as where it is differentiated, bit for bit.

    On a CPU, that is another way than the fastest without a gradient. So what a model gives here
    can be compared with what it gives while it is trained: their ratio is exactly 1.
    """
    token = _trained.set(True)
    try:
        yield
    finally:
        _trained.reset(token)


class Heads(NamedTuple):
    """Queries, keys and values of a sequence, each (b, n, h, d)."""

    q: Tensor
    k: Tensor
    v: Tensor


class QKV(nn.Module):
    """Queries, keys and values of tokens, split into heads.

    Three matrices rather than a fused one: public files store either, and both can then be used in
    place, without a copy (thirds of a fused matrix are contiguous rows). The products take equally
    long.
    """

    def __init__(
        self, width: int, num_heads: int, *, head_width: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        inner = width if head_width is None else num_heads * head_width
        self.num_heads = num_heads
        self.q = nn.Linear(width, inner, bias=bias)
        self.k = nn.Linear(width, inner, bias=bias)
        self.v = nn.Linear(width, inner, bias=bias)

    def forward(self, x: Tensor) -> Heads:  # (b, n, width)
        parts = (self.q(x), self.k(x), self.v(x))
        return Heads(*(rearrange(p, "b n (h d) -> b n h d", h=self.num_heads) for p in parts))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention over heads, merged back into one width.

    Args:
        q, k, v: (b, n, h, d).
        bias: added to the logits, broadcastable to (b, h, n, n).
        causal: each position attends to itself and to earlier ones.
        scale: of the logits; 1/sqrt(d) when None.

    Returns:
        (b, n, h*d).
    """
    q, k, v = (rearrange(part, "b n h d -> b h n d") for part in (q, k, v))
    on_cpu, keys = q.device.type == "cpu", k.shape[-2]
    differentiated = q.requires_grad or _trained.get()
    if on_cpu and differentiated and q.shape[-2] <= 1024:
        out = _explicit(q, k, v, bias=bias, causal=causal, scale=scale)
    else:
        half = on_cpu and not differentiated and q.element_size() < 4
        if half and keys % 32 and (keys < 512 or keys % 2):
            k, v, bias = _padded(k, v, bias=bias, causal=causal)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return rearrange(out, "b h n d -> b n (h d)")


def _padded(
    k: Tensor, v: Tensor, *, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad keys and values to a multiple of 32 keys, with a bias that masks the padding.

    On a CPU the fused kernel is slow for other numbers of keys in bfloat16: 333 take 3.4 times as
    long as 352. From 512 keys on, for even numbers, the bias would cost as much as it saves.
    """
    missing = -k.shape[-2] % 32
    if not causal:  # causal attention never sees the padding, which comes last
        bias = k.new_zeros(1, 1, 1, k.shape[-2]) if bias is None else bias
        bias = F.pad(bias, (0, missing), value=float("-inf"))
    k, v = (F.pad(part, (0, 0, 0, missing)) for part in (k, v))
    return k, v, bias


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention written out: on a CPU the fused kernel's bfloat16 backward pass is slower.

    Five times slower at 48 tokens, 1.8 times at 410, and no slower from a thousand on. There the
    probabilities, which the fused kernel does not keep, would need much memory.
    """
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    if causal:
        n = q.shape[-2]
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    return logits.softmax(dim=-1) @ v
