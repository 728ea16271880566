"""What the backbones of Figure 4 have in common: all but the way text and image meet.

Each makes tokens of latent and text, lets blocks act on them, steered by timestep and pooled text,
and reads the prediction off the final image tokens. A subclass says in one `forward` how.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from mmdit.checks import at_least_one
from mmdit.errors import UserError
from mmdit.nn.attention import QKV, Heads, attention
from mmdit.nn.embeddings import (
    PatchEmbedding,
    VectorEmbedding,
    centre_crop,
    position_table,
    sinusoid,
    unpatchify,
)
from mmdit.nn.mlp import MLP, tanh_gelu
from mmdit.nn.modulation import Modulation, modulate
from mmdit.nn.norms import LayerNorm, RMSNorm
from mmdit.registry import build, describe


class AttentionInput(QKV):
    """Q, K and V of one stream, with RMSNorm on Q and K per head where `qk_norm` asks."""

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
    """Of Q K^T and of the weighted sum of V, over all heads."""
    return 2 * (2 * queries * keys * width)


class Stream(nn.Module):
    """What one modality owns in a block: everything but the attention itself (Fig. 2b)."""

    modulation_parts = 6  # shift, scale and gate, of attention and of the MLP

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        if not 0.5 < mlp_ratio * width < math.inf:
            raise UserError(f"mlp_ratio {mlp_ratio} must be a number above 0, in most models 4")
        self.width, self.hidden = width, round(mlp_ratio * width)
        self.modulation = Modulation(width, self.modulation_parts)
        self.norm1 = LayerNorm(width)
        self.attention_in = AttentionInput(width, num_heads, qk_norm=qk_norm)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, self.hidden, tanh_gelu)

    def token_flops(self, tokens: int) -> int:
        """Of all its layers: modulation once, Q, K, V, output and MLP for each token."""
        d = self.width
        return 2 * self.modulation_parts * d**2 + tokens * 2 * (4 * d**2 + 2 * d * self.hidden)


class Block(nn.Module, ABC):
    """A layer of a backbone: tokens, and the vector y that steers it, to tokens."""

    returns: ClassVar[tuple[int, ...]]  # which of its arguments come back changed

    @abstractmethod
    def flops(self, image_tokens: int, text_tokens: int) -> int:
        """Of one forward pass of one sample; see `Backbone.flops`."""


class SkippedBlock(Block):
    """Stands where a block was left out: what it would have changed comes back as it is."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.unchanged = block.returns

    def forward(self, *given: Tensor) -> Any:
        kept = tuple(given[i] for i in self.unchanged)
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
    """Initialization of DiT (Peebles & Xie 2023), of all but a network's last linear layer."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, AttentionInput):
            # As thirds of one matrix, which they are in DiT.
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


class Backbone(nn.Module, ABC):
    """The velocity (or another prediction) of a noised latent, given text.

    A subclass adds `blocks`, an `output`, and calls `reset_parameters` where it is not on meta.

    Args:
        depth: number of blocks.
        width: of the tokens.
        num_heads: attention heads.
        latent_channels: channels c of the latent.
        patch_size: side of the square patches p.
        context_width: width of c_ctxt.
        pooled_width: width p of c_vec.
        position_size, position_grid, position_base: side of the stored position table, side of the
            grid at training resolution and span of coordinates, in patches (`position_table`).
        patched_channels: channels of what is cut into patches, where that is not the latent.

    Raises:
        UserError: a count is not positive; `width` does not split into `num_heads`, or into the
            four parts of a position.
    """

    positions: Tensor  # buffer (size, size, d)
    blocks: nn.ModuleList
    output: OutputLayer

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_heads: int,
        latent_channels: int,
        patch_size: int,
        context_width: int,
        pooled_width: int,
        position_size: int,
        position_grid: int,
        position_base: int,
        patched_channels: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        at_least_one(name, depth=depth, width=width, num_heads=num_heads, patch_size=patch_size)
        at_least_one(name, latent_channels=latent_channels, context_width=context_width)
        at_least_one(name, pooled_width=pooled_width, position_size=position_size)
        at_least_one(name, position_grid=position_grid, position_base=position_base)
        if width % num_heads:
            raise UserError(f"{name}: width {width} must be divisible by num_heads {num_heads}")
        if width % 4:
            raise UserError(f"{name}: width {width} must be divisible by 4 (2D sin-cos positions)")
        self.latent_channels, self.patch_size = latent_channels, patch_size
        self.context_width, self.pooled_width = context_width, pooled_width
        self.width = width
        channels = latent_channels if patched_channels is None else patched_channels
        self.patch_values = patch_size**2 * channels
        self._position = {"size": position_size, "grid": position_grid, "base": position_base}

        self.patch_embedding = PatchEmbedding(channels, width, patch_size)
        self.register_buffer("positions", torch.empty(position_size, position_size, width))
        self.timestep_embedding = VectorEmbedding(256, width)
        self.pooled_embedding = VectorEmbedding(pooled_width, width)
        self.context_embedding = nn.Linear(context_width, width)

    @abstractmethod
    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """One evaluation of the network.

        Args:
            z_t: noised latent (b, c, h, w).
            t: time in [0, 1], 0 data and 1 noise, (b,).
            c_vec: pooled text (b, p), of any dtype, on any device.
            c_ctxt: text tokens (b, l, context_width), likewise.

        Returns:
            (b, c, h, w).
        """

    @staticmethod
    def width_unit(num_heads: int) -> int:
        """What a width has to be a multiple of: of the heads, and of the parts of a position."""
        return math.lcm(num_heads, 4)

    def vector(self, t: Tensor, c_vec: Tensor) -> Tensor:
        """y, by which timestep and pooled text steer every block: (b,), (b, p) -> (b, d)."""
        return self.timestep_embedding(sinusoid(t)) + self.pooled_embedding(c_vec)

    def text_tokens(self, c_ctxt: Tensor) -> Tensor:
        """Text of the encoders (b, l, context_width) in the width of the network: (b, l, d)."""
        return self.context_embedding(c_ctxt.to(self.context_embedding.weight))

    def image_tokens(self, z: Tensor) -> Tensor:
        """Patches of a latent (b, c, h, w), with their positions: (b, n, d)."""
        positions = centre_crop(self.positions, *self.grid(*z.shape[-2:]))
        x = self.patch_embedding(z.to(self.dtype))
        return x + positions.to(x.dtype)

    def prediction(self, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
        """What the final image tokens (b, n, d) say of a latent: (b, c, height, width)."""
        rows, columns = self.grid(height, width)
        x = self.output(x, y)
        return unpatchify(x, rows=rows, columns=columns, patch_size=self.patch_size)

    @property
    def layers(self) -> list[Block]:
        """All blocks in order; the last, where it is of another kind, lies in `last_block`."""
        last = [self._modules["last_block"]] if "last_block" in self._modules else []
        return [*self.blocks, *last]

    def skipping(self, layers: Collection[int]) -> Self:
        """The same network, weights shared, with some blocks passed by (skip-layer guidance).

        Raises:
            UserError: there is no block of that index.
        """
        whole = self.layers
        if absent := sorted(set(layers) - set(range(len(whole)))):
            raise UserError(f"layers {absent} cannot be skipped: there are 0 to {len(whole) - 1}")
        kept = [SkippedBlock(block) if i in layers else block for i, block in enumerate(whole)]
        view = copy.copy(self)
        view._modules = dict(self._modules)
        if "last_block" in view._modules:
            view._modules["last_block"] = kept.pop()
        view._modules["blocks"] = nn.ModuleList(kept)
        return view

    def flops(self, *, height: int, width: int, text_length: int) -> int:
        """Operations of one forward pass of one sample, in closed form; training takes three times.

        Matrix products, convolutions and attention, two for each multiply-add, as is customary.

        Args:
            height, width: of the latent.
            text_length: tokens of c_ctxt.
        """
        d, n = self.width, math.prod(self.grid(height, width))
        vector = (256 + self.pooled_width) * d + 2 * d**2
        text = text_length * self.context_width * d
        image = n * self.patch_values * d
        output = 2 * d**2 + n * d * self.patch_values
        around = 2 * (vector + text + image + output)
        return around + sum(block.flops(n, text_length) for block in self.layers)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, in place, but block by block: equal blocks share one graph."""
        for part in (*self.layers, self.output):
            part.compile(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; what enters the network is cast to it."""
        return self.context_embedding.weight.dtype

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (rows, columns) of a latent of height x width.

        Raises:
            UserError: a side is not a multiple of the patch, or exceeds the position table.
        """
        p, size = self.patch_size, self.positions.shape[0]
        for name, side in (("height", height), ("width", width)):
            if side % p or not 1 <= side // p <= size:
                raise UserError(
                    f"latent {name} {side} must be a multiple of patch_size {p}, "
                    f"from {p} to {size * p} (the position table has {size} patches a side)"
                )
        return height // p, width // p

    @property
    def last_layer(self) -> nn.Linear | nn.Conv2d:
        """The layer whose output is the prediction."""
        return self.output.linear

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in DiT, which the paper follows; the position table is computed anew."""
        self.positions.copy_(position_table(self.positions.shape[-1], **self._position))
        reset_as_in_dit(self)
        # The untrained network predicts zero: the loss starts at E||target||^2.
        nn.init.zeros_(self.last_layer.weight)


B = TypeVar("B", bound=Backbone)


def with_qk_norm(model: B) -> B:
    """A copy with RMSNorm on queries and keys, its weights one, and all other weights the same.

    For finetuning a model that was trained without at high resolution (Fig. 5, Sec. 5.3.2). It is
    another network at once: training has to go on before it is of use.

    Raises:
        UserError: the model has QK-norm already.
    """
    description = describe(model)
    if description["qk_norm"]:
        raise UserError(f"this {type(model).__name__} has QK-norm already (qk_norm is true)")
    with torch.device("meta"):
        network: B = build({**description, "qk_norm": True})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, slot in network.state_dict().items():
        if name not in weights:
            weights[name] = torch.ones_like(slot, dtype=model.dtype, device=model.positions.device)
    network.load_state_dict(weights, assign=True)
    return network.train(model.training)
