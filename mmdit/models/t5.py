"""The encoder of T5 v1.1 (Raffel et al. 2020; gated GELU of Shazeer 2020)."""

import math
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.checks import at_least_one
from mmdit.nn.attention import QKV, attention
from mmdit.nn.mlp import tanh_gelu
from mmdit.nn.network import Network
from mmdit.nn.norms import RMSNorm
from mmdit.registry import register


def relative_buckets(offset: Tensor, *, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Bucket of each relative position key - query, for a bidirectional encoder.

    Half of the buckets serve each direction; the nearer half of those count single steps, the
    rest grow logarithmically up to `max_distance`.

    Returns:
        int64 of the shape of `offset`, in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(offset > 0, half, 0) + torch.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """A learned bias per bucket and head, added to the logits of every layer."""

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, position: Tensor) -> Tensor:  # (n,) int64 -> (1, h, n, n)
        buckets = relative_buckets(
            position[None, :] - position[:, None],
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return rearrange(self.embedding(buckets), "q k h -> 1 h q k")


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of float16, which T5's residual stream overflows; otherwise `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


class T5Layer(nn.Module):
    """Pre-norm self-attention without scaling, then a gated MLP; no biases anywhere.

    It computes in the dtype of `bias`. If that is float16, the residual stream, the hidden values
    of the MLP and the weight of `down` are float32.
    """

    def __init__(self, width: int, num_heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        inner = num_heads * head_width
        self.norm1 = RMSNorm(width)
        self.attention_in = QKV(width, num_heads, head_width=head_width, bias=False)
        self.attention_out = nn.Linear(inner, width, bias=False)
        self.norm2 = RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # (b, n, d), (1, h, n, n) -> (b, n, d)
        q, k, v = self.attention_in(self.norm1(x).to(bias.dtype))
        x = x + self.attention_out(attention(q, k, v, bias=bias.to(q.dtype), scale=1.0))
        normed = self.norm2(x).to(bias.dtype)
        hidden = stream_dtype(bias.dtype)
        gate, up = tanh_gelu(self.gate(normed)).to(hidden), self.up(normed).to(hidden)
        return x + self.down(gate * up)


@register
class T5Encoder(Network):
    """Text to hidden states. Padding is attended to, as everywhere in SD3.

    Args:
        vocabulary_size, width, depth, num_heads, head_width, hidden: 32128, 4096, 24, 64, 64, 10240
            in T5-v1.1-XXL.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 32128,
        width: int,
        depth: int,
        num_heads: int,
        head_width: int = 64,
        hidden: int,
    ) -> None:
        super().__init__()
        at_least_one("T5", vocabulary_size=vocabulary_size, width=width, depth=depth)
        at_least_one("T5", num_heads=num_heads, head_width=head_width, hidden=hidden)
        self.vocabulary_size = vocabulary_size
        self.width, self.head_width = width, head_width
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_bias = RelativePositionBias(num_heads)
        self.layers = nn.ModuleList(
            T5Layer(width, num_heads, head_width, hidden) for _ in range(depth)
        )
        self.final_norm = RMSNorm(width)
        if not self.final_norm.weight.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:  # (b, n) int64 -> (b, n, d)
        position = torch.arange(ids.shape[1], device=ids.device)
        bias = self.position_bias(position).to(self.compute_dtype)
        x = self.token_embedding(ids).to(stream_dtype(self.compute_dtype))
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)

    def _apply(self, fn, recurse=True) -> Self:  # what .to(), .cuda() and .half() go through
        super()._apply(fn, recurse)
        if self.compute_dtype == torch.float16:
            for layer in self.layers:
                layer.down.float()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, in place, but layer by layer: all share one graph."""
        for layer in self.layers:
            layer.compile(*args, **kwargs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """T5's own scales: Q absorbs the missing 1/sqrt(head_width) of the attention."""
        width, head_width = self.width, self.head_width
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.position_bias.embedding.weight, std=width**-0.5)
        for layer in self.layers:
            assert isinstance(layer, T5Layer)
            nn.init.normal_(layer.attention_in.q.weight, std=(width * head_width) ** -0.5)
            nn.init.normal_(layer.attention_in.k.weight, std=width**-0.5)
            nn.init.normal_(layer.attention_in.v.weight, std=width**-0.5)
            nn.init.normal_(layer.attention_out.weight, std=layer.attention_out.in_features**-0.5)
            nn.init.normal_(layer.gate.weight, std=width**-0.5)
            nn.init.normal_(layer.up.weight, std=width**-0.5)
            nn.init.normal_(layer.down.weight, std=layer.down.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
