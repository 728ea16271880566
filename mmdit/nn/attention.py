"""The one door to attention: every network here calls `attention`."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(b, n, h*d) -> (b, h, n, d)."""
    return rearrange(x, "b n (h d) -> b h n d", h=num_heads)


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
        q, k, v: (b, h, n, d).
        bias: added to the logits, broadcastable to (b, h, n, n).
        causal: each position sees itself and what precedes it.
        scale: of the logits; 1/sqrt(d) when None.

    Returns:
        (b, n, h*d).
    """
    if q.device.type == "cpu" and q.requires_grad:
        out = _explicit(q, k, v, bias=bias, causal=causal, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return rearrange(out, "b h n d -> b n (h d)")


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """The same, written out: on CPU the fused kernel's bfloat16 backward is many times slower."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    if causal:
        n = q.shape[-2]
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    return logits.softmax(dim=-1) @ v
