"""MM-DiT, the joint-attention transformer of Stable Diffusion 3 (Sec. 4, Fig. 2).

Text and image are two streams of tokens, each with its own weights, which meet in one attention
over both sequences. Timestep and pooled text steer every block through adaLN-zero modulation.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
from mmdit.registry import register


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


def joint_attention(text: Heads, image: Heads) -> tuple[Tensor, Tensor]:
    """One attention over the concatenated sequences; each stream gets its own tokens back."""
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
    length = text.q.shape[1]
    attended = attention(q, k, v)  # (b, l + n, d)
    return attended[:, :length], attended[:, length:]


class Stream(nn.Module):
    """What one modality owns in a joint block: everything but the attention itself (Fig. 2b)."""

    modulation_parts = 6  # shift, scale and gate, of attention and of the MLP

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.modulation = Modulation(width, self.modulation_parts)
        self.norm1 = LayerNorm(width)
        self.attention_in = AttentionInput(width, num_heads, qk_norm=qk_norm)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, round(mlp_ratio * width), tanh_gelu)


class JointBlock(nn.Module):
    """Modulate, attend together, modulate, MLP: text and image side by side (Fig. 2b)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.text = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.image = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)

    def forward(self, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """c (b, l, d), x (b, n, d), y (b, d) -> c, x."""
        text, image = self.text, self.image
        c_shift1, c_scale1, c_gate1, c_shift2, c_scale2, c_gate2 = text.modulation(y)
        x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = image.modulation(y)

        c_attended, x_attended = joint_attention(
            text.attention_in(modulate(text.norm1(c), c_shift1, c_scale1)),
            image.attention_in(modulate(image.norm1(x), x_shift1, x_scale1)),
        )
        c = c + c_gate1 * text.attention_out(c_attended)
        x = x + x_gate1 * image.attention_out(x_attended)

        c = c + c_gate2 * text.mlp(modulate(text.norm2(c), c_shift2, c_scale2))
        x = x + x_gate2 * image.mlp(modulate(image.norm2(x), x_shift2, x_scale2))
        return c, x


class DualStream(Stream):
    """The image stream of MMDiT-X: a second attention, among image tokens only (SD3.5 Medium)."""

    modulation_parts = 9  # the second attention's triple comes last

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.attention2_in = AttentionInput(width, num_heads, qk_norm=qk_norm)
        self.attention2_out = nn.Linear(width, width)


class DualAttentionBlock(nn.Module):
    """A joint block in which the image also attends to itself alone, in parallel (MMDiT-X)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.text = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.image = DualStream(width, num_heads, mlp_ratio, qk_norm=qk_norm)

    def forward(self, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """c (b, l, d), x (b, n, d), y (b, d) -> c, x."""
        text, image = self.text, self.image
        c_shift1, c_scale1, c_gate1, c_shift2, c_scale2, c_gate2 = text.modulation(y)
        modulation = image.modulation(y)
        x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = modulation[:6]
        x_shift_alone, x_scale_alone, x_gate_alone = modulation[6:]

        x_normed = image.norm1(x)
        c_attended, x_attended = joint_attention(
            text.attention_in(modulate(text.norm1(c), c_shift1, c_scale1)),
            image.attention_in(modulate(x_normed, x_shift1, x_scale1)),
        )
        alone = image.attention2_in(modulate(x_normed, x_shift_alone, x_scale_alone))
        c = c + c_gate1 * text.attention_out(c_attended)
        x = x + x_gate1 * image.attention_out(x_attended)
        x = x + x_gate_alone * image.attention2_out(attention(*alone))

        c = c + c_gate2 * text.mlp(modulate(text.norm2(c), c_shift2, c_scale2))
        x = x + x_gate2 * image.mlp(modulate(image.norm2(x), x_shift2, x_scale2))
        return c, x


class LastTextStream(nn.Module):
    """The text stream of the last block: it is read by the image and goes no further."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.norm1 = LayerNorm(width)
        self.attention_in = AttentionInput(width, num_heads, qk_norm=qk_norm)


class LastJointBlock(nn.Module):
    """The last block: a joint block whose text stops after attention."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.text = LastTextStream(width, num_heads, qk_norm=qk_norm)
        self.image = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)

    def forward(self, c: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """c (b, l, d), x (b, n, d), y (b, d) -> x."""
        text, image = self.text, self.image
        c_shift, c_scale = text.modulation(y)
        x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = image.modulation(y)

        _, x_attended = joint_attention(
            text.attention_in(modulate(text.norm1(c), c_shift, c_scale)),
            image.attention_in(modulate(image.norm1(x), x_shift1, x_scale1)),
        )
        x = x + x_gate1 * image.attention_out(x_attended)
        return x + x_gate2 * image.mlp(modulate(image.norm2(x), x_shift2, x_scale2))


class SkippedBlock(nn.Module):
    """Stands where a joint block was left out."""

    def forward(self, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return c, x


class SkippedLastBlock(nn.Module):
    """Stands where the last block was left out."""

    def forward(self, c: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return x


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


@register
class MMDiT(nn.Module):
    """The velocity (or another prediction) of a noised latent, given text.

    Args:
        depth: number of joint blocks.
        width: of both token streams; the paper's models have 64 * depth.
        num_heads: attention heads; the paper's models have `depth`, each of size 64.
        mlp_ratio: hidden width of the MLPs over `width`.
        latent_channels: channels c of the latent.
        patch_size: side of the square patches p.
        context_width: width of c_ctxt.
        pooled_width: width p of c_vec.
        qk_norm: RMSNorm on queries and keys (SD3.5; against the growth of logits, Fig. 5).
        dual_attention: indices of the blocks with a second attention among image tokens only;
            0 to 12 in SD3.5 Medium (MMDiT-X).
        position_size, position_grid, position_base: side of the stored position table, side of the
            grid at training resolution and span of coordinates, in patches (`position_table`).

    Raises:
        UserError: `width` does not split into `num_heads`, or into the four parts of a position;
            `dual_attention` names a block that is not there, or the last.
    """

    positions: Tensor  # buffer (size, size, d)

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        latent_channels: int = 16,
        patch_size: int = 2,
        context_width: int = 4096,
        pooled_width: int = 2048,
        qk_norm: bool = False,
        dual_attention: Sequence[int] = (),
        position_size: int = 192,
        position_grid: int = 64,
        position_base: int = 16,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"MMDiT: depth {depth} must be at least 1")
        if num_heads < 1 or width % num_heads:
            raise UserError(f"MMDiT: width {width} must be divisible by num_heads {num_heads}")
        if width % 4:
            raise UserError(f"MMDiT: width {width} must be divisible by 4 (2D sin-cos positions)")
        if not set(dual_attention) <= set(range(depth - 1)):
            raise UserError(
                f"MMDiT: dual_attention {list(dual_attention)} must name blocks before the last, "
                f"from 0 to {depth - 2}"
            )
        self.latent_channels, self.patch_size = latent_channels, patch_size
        self.context_width, self.pooled_width = context_width, pooled_width
        self._position = {"size": position_size, "grid": position_grid, "base": position_base}

        self.patch_embedding = PatchEmbedding(latent_channels, width, patch_size)
        self.register_buffer("positions", torch.empty(position_size, position_size, width))
        self.timestep_embedding = VectorEmbedding(256, width)
        self.pooled_embedding = VectorEmbedding(pooled_width, width)
        self.context_embedding = nn.Linear(context_width, width)
        self.blocks = nn.ModuleList(
            (DualAttentionBlock if i in dual_attention else JointBlock)(
                width, num_heads, mlp_ratio, qk_norm=qk_norm
            )
            for i in range(depth - 1)
        )
        self.last_block = LastJointBlock(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.output = OutputLayer(width, patch_size**2 * latent_channels)
        if not self.positions.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """One evaluation of the network (Fig. 2a).

        Args:
            z_t: noised latent (b, c, h, w).
            t: time in [0, 1], 0 data and 1 noise, (b,).
            c_vec: pooled text (b, p).
            c_ctxt: text tokens (b, l, context_width).

        Returns:
            (b, c, h, w).
        """
        y = self.vector(t, c_vec)
        c = self.text_tokens(c_ctxt)
        x = self.image_tokens(z_t)
        for block in self.blocks:
            c, x = block(c, x, y)
        x = self.last_block(c, x, y)
        return self.prediction(x, y, *z_t.shape[-2:])

    def vector(self, t: Tensor, c_vec: Tensor) -> Tensor:
        """y, by which timestep and pooled text steer every block: (b,), (b, p) -> (b, d)."""
        return self.timestep_embedding(sinusoid(t)) + self.pooled_embedding(c_vec)

    def text_tokens(self, c_ctxt: Tensor) -> Tensor:
        """Text of the encoders (b, l, context_width) in the width of the network: (b, l, d)."""
        return self.context_embedding(c_ctxt.to(self.dtype))

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

    def skipping(self, layers: Collection[int]) -> "MMDiT":
        """The same network, weights shared, with some blocks passed by (skip-layer guidance).

        Raises:
            UserError: there is no block of that index.
        """
        depth = len(self.blocks) + 1
        if absent := sorted(set(layers) - set(range(depth))):
            raise UserError(f"layers {absent} cannot be skipped: there are 0 to {depth - 1}")
        kept = [SkippedBlock() if i in layers else b for i, b in enumerate(self.blocks)]
        last = SkippedLastBlock() if depth - 1 in layers else self.last_block
        view = copy.copy(self)
        view._modules = {**self._modules, "blocks": nn.ModuleList(kept), "last_block": last}
        return view

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, in place, but block by block: equal blocks share one graph."""
        for part in (*self.blocks, self.last_block, self.output):
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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in DiT, which the paper follows; the position table is computed anew."""
        self.positions.copy_(position_table(self.positions.shape[-1], **self._position))
        reset_as_in_dit(self)
        # The untrained network predicts zero: the loss starts at E||target||^2.
        nn.init.zeros_(self.output.linear.weight)
