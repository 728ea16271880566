"""MM-DiT, the joint-attention transformer of Stable Diffusion 3 (Sec. 4, Fig. 2).

Text and image are two streams of tokens, each with its own weights, joined in one attention over
both sequences. Timestep and pooled text modulate every block (adaLN-zero).
"""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor, nn

from mmdit.errors import UserError
from mmdit.models.backbone import PatchBackbone, Shared
from mmdit.models.blocks import (
    AttentionInput,
    Block,
    OutputLayer,
    Stream,
    attention_flops,
    joint_attention,
)
from mmdit.nn.attention import attention
from mmdit.nn.modulation import Modulation, modulate
from mmdit.nn.norms import LayerNorm
from mmdit.registry import register


class JointBlock(Block):
    """Modulate, attend together, modulate, MLP: text and image side by side (Fig. 2b)."""

    returns = (0, 1)

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

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        streams = self.text.token_flops(text_tokens) + self.image.token_flops(image_tokens)
        n = image_tokens + text_tokens
        return streams + attention_flops(n, n, self.image.width)


class DualStream(Stream):
    """The image stream of MMDiT-X: a second attention, among image tokens only (SD3.5 Medium)."""

    modulation_parts = 9  # the second attention's triple comes last

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.attention2_in = AttentionInput(width, num_heads, qk_norm=qk_norm)
        self.attention2_out = nn.Linear(width, width)

    def token_flops(self, tokens: int) -> int:
        return super().token_flops(tokens) + tokens * 2 * 4 * self.width**2


class DualAttentionBlock(Block):
    """A joint block in which the image also attends to itself alone, in parallel (MMDiT-X)."""

    returns = (0, 1)

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

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        streams = self.text.token_flops(text_tokens) + self.image.token_flops(image_tokens)
        n = image_tokens + text_tokens
        alone = attention_flops(image_tokens, image_tokens, self.image.width)
        return streams + attention_flops(n, n, self.image.width) + alone


class LastTextStream(nn.Module):
    """The text stream of the last block: the image attends to it, and it ends there."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.width = width
        self.modulation = Modulation(width, 2)
        self.norm1 = LayerNorm(width)
        self.attention_in = AttentionInput(width, num_heads, qk_norm=qk_norm)

    def token_flops(self, tokens: int) -> int:
        """As `Stream.token_flops`: modulation once, Q, K, V for each token."""
        return 2 * 2 * self.width**2 + tokens * 2 * 3 * self.width**2


class LastJointBlock(Block):
    """The last block: a joint block whose text stops after attention."""

    returns = (1,)

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

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        streams = self.text.token_flops(text_tokens) + self.image.token_flops(image_tokens)
        n = image_tokens + text_tokens
        return streams + attention_flops(n, n, self.image.width)


@register
class MMDiT(PatchBackbone):
    """The velocity (or another prediction) of a noised latent, given text.

    Args: those of `PatchBackbone`, and
        dual_attention: indices of the blocks with a second attention among image tokens only;
            0 to 12 in SD3.5 Medium (MMDiT-X).

    Raises:
        UserError: as for `PatchBackbone`; `dual_attention` names a block that is not there, or the
            last.
    """

    def __init__(
        self,
        *,
        dual_attention: Sequence[int] = (),
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        if not all(0 <= i < self.depth - 1 for i in dual_attention):
            raise UserError(
                f"MMDiT: dual_attention {list(dual_attention)} must name blocks before the last, "
                f"from 0 to {self.depth - 2}"
            )
        dual = set(dual_attention)
        self.blocks = nn.ModuleList(
            self.block(DualAttentionBlock if i in dual else JointBlock)
            for i in range(self.depth - 1)
        )
        self.last_block = self.block(LastJointBlock)
        self.output = OutputLayer(self.width, self.patch_values)
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
