"""Building blocks of the backbones: attention, streams, the output layer, initialization."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.errors import UserError
from mmdit.nn.attention import QKV, Heads, attention
from mmdit.nn.embeddings import VectorEmbedding
from mmdit.nn.mlp import MLP, tanh_gelu
from mmdit.nn.modulation import Modulation, modulate
from mmdit.nn.norms import LayerNorm, RMSNorm


class AttentionInput(QKV):
    """Q, K and V of one stream, with RMSNorm on Q and K per head if `qk_norm` is set."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__(width, num_heads)
        head_width = width // num_heads
        self.q_norm = RMSNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_width) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Heads:  # (b, n, d)
        q, k, v = super().forward(x)
        return Heads(self.q_norm(q), self.k_norm(k), v)


def joint_attention(*streams: Heads) -> tuple[Tensor, ...]:
    """One attention over the concatenated sequences; each stream gets its own tokens back."""
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
    return attention(q, k, v).split([stream.q.shape[1] for stream in streams], dim=1)


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Operations of Q K^T and of the weighted sum of V, over all heads."""
    return 2 * (2 * queries * keys * width)


class Stream(nn.Module):
    """The layers of one modality in a block: everything but the attention itself (Fig. 2b)."""

    modulation_parts = 6  # shift, scale and gate, of attention and of the MLP

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        if not 0.5 < mlp_ratio * width < math.inf:
            raise UserError(f"mlp_ratio={mlp_ratio} must be a number above 0, in most models 4")
        self.width, self.hidden = width, round(mlp_ratio * width)
        self.modulation = Modulation(width, self.modulation_parts)
        self.norm1 = LayerNorm(width)
        self.attention_in = AttentionInput(width, num_heads, qk_norm=qk_norm)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, self.hidden, tanh_gelu)

    def token_flops(self, tokens: int) -> int:
        """Operations of all layers: modulation once; Q, K, V, output and MLP for each token."""
        d = self.width
        return 2 * self.modulation_parts * d**2 + tokens * 2 * (4 * d**2 + 2 * d * self.hidden)


class Block(nn.Module, ABC):
    """A layer of a backbone: maps tokens to tokens, modulated by the vector y."""

    # Indices of the arguments that it returns, changed; the last one is of the image's tokens.
    returns: tuple[int, ...]

    @abstractmethod
    def flops(self, image_tokens: int, text_tokens: int) -> int:
        """Operations of one forward pass of one sample; see `Backbone.flops`."""


class SkippedBlock(Block):
    """Takes the place of a skipped block, and returns unchanged what the block would change."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.returns = block.returns

    def forward(self, *given: Tensor) -> Any:
        kept = tuple(given[i] for i in self.returns)
        return kept if len(kept) > 1 else kept[0]

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        return 0


class OutputLayer(nn.Module):
    """Modulated LayerNorm and a linear layer to the values of each patch."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.norm = LayerNorm(width)
        self.linear = nn.Linear(width, patch_values)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.modulation(y)
        return self.linear(modulate(self.norm(x), shift, scale))


@torch.no_grad()
def reset_as_in_dit(network: nn.Module) -> None:
    """Initialize all but a network's last linear layer as in DiT (Peebles & Xie 2023)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, AttentionInput):
            # As thirds of one matrix, as in DiT.
            for part in (module.q, module.k, module.v):
                nn.init.xavier_uniform_(part.weight, gain=0.5**0.5)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()
    for module in network.modules():
        if isinstance(module, VectorEmbedding):
            # Small first embeddings: y starts near zero, where SiLU is nearly linear.
            nn.init.normal_(module.fc1.weight, std=0.02)
            nn.init.normal_(module.fc2.weight, std=0.02)
        elif isinstance(module, Modulation):
            # Closed gates: every block starts as the identity (adaLN-zero).
            module.reset_parameters()
