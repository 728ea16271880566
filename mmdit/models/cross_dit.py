"""CrossDiT: a DiT over the image with cross-attention to the text (Fig. 4).

Image tokens attend to text tokens, which are the same for every block.
"""

from typing import Unpack

from einops import rearrange
from torch import Tensor, nn

from mmdit.models.backbone import PatchBackbone, Shared
from mmdit.models.blocks import AttentionInput, Block, OutputLayer, Stream, attention_flops
from mmdit.nn.attention import Heads, attention
from mmdit.nn.modulation import modulate
from mmdit.nn.norms import LayerNorm
from mmdit.registry import register


class CrossAttentionInput(AttentionInput):
    """Queries from the image, keys and values from the text."""

    def forward(self, x: Tensor, c: Tensor) -> Heads:  # type: ignore[override]
        """x (b, n, d), c (b, l, d)."""
        parts = (self.q(x), self.k(c), self.v(c))
        q, k, v = (rearrange(part, "b n (h d) -> b n h d", h=self.num_heads) for part in parts)
        return Heads(self.q_norm(q), self.k_norm(k), v)


class CrossBlock(Stream, Block):
    """Attend to the image, attend to the text, MLP, each modulated and gated (adaLN-zero)."""

    modulation_parts = 9  # shift, scale and gate, of both attentions and of the MLP
    returns = (0,)

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.cross_norm = LayerNorm(width)
        self.cross_in = CrossAttentionInput(width, num_heads, qk_norm=qk_norm)
        self.cross_out = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        """x (b, n, d), c (b, l, d), y (b, d) -> x."""
        modulation = self.modulation(y)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:6]
        cross_shift, cross_scale, cross_gate = modulation[6:]

        attended = attention(*self.attention_in(modulate(self.norm1(x), shift1, scale1)))
        x = x + gate1 * self.attention_out(attended)
        queries = modulate(self.cross_norm(x), cross_shift, cross_scale)
        x = x + cross_gate * self.cross_out(attention(*self.cross_in(queries, c)))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        n, d = image_tokens, self.width
        cross = 2 * (2 * n + 2 * text_tokens) * d**2 + attention_flops(n, text_tokens, d)
        return self.token_flops(n) + attention_flops(n, n, d) + cross


@register
class CrossDiT(PatchBackbone):
    """The velocity (or another prediction) of a noised latent, given text.

    Args: those of `PatchBackbone`.
    """

    def __init__(
        self,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        # The blocks do not normalize the text, so its scale is fixed here.
        self.text_norm = LayerNorm(self.width)
        self.blocks = nn.ModuleList(self.block(CrossBlock) for _ in range(self.depth))
        self.output = OutputLayer(self.width, self.patch_values)
        if not self.positions.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """One evaluation of the network; see `Backbone.forward`."""
        y = self.vector(t, c_vec)
        c = self.text_norm(self.text_tokens(c_ctxt))
        x = self.image_tokens(z_t)
        for block in self.blocks:
            x = block(x, c, y)
        return self.prediction(x, y, *z_t.shape[-2:])
