"""DiT with text in its sequence: one shared set of weights for all tokens (Fig. 4).

Peebles & Xie 2023, with text in place of classes: text tokens precede image tokens, and every layer
treats both alike.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from mmdit.models.backbone import PatchBackbone, Shared
from mmdit.models.blocks import Block, OutputLayer, Stream, attention_flops
from mmdit.nn.attention import attention
from mmdit.nn.modulation import modulate
from mmdit.registry import register


class DiTBlock(Stream, Block):
    """Modulate, attend, modulate, MLP: one stream that attends to itself (adaLN-zero)."""

    returns = (0,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (b, n, d), y (b, d) -> x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(y)
        attended = attention(*self.attention_in(modulate(self.norm1(x), shift1, scale1)))
        x = x + gate1 * self.attention_out(attended)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        n = image_tokens + text_tokens
        return self.token_flops(n) + attention_flops(n, n, self.width)


@register
class DiT(PatchBackbone):
    """The velocity (or another prediction) of a noised latent, given text.

    Args: those of `PatchBackbone`.
    """

    def __init__(
        self,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        self.blocks = nn.ModuleList(self.block(DiTBlock) for _ in range(self.depth))
        self.output = OutputLayer(self.width, self.patch_values)
        if not self.positions.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """One evaluation of the network; see `Backbone.forward`."""
        y = self.vector(t, c_vec)
        c = self.text_tokens(c_ctxt)
        x = torch.cat([c, self.image_tokens(z_t)], dim=1)
        for block in self.blocks:
            x = block(x, y)
        return self.prediction(x[:, c.shape[1] :], y, *z_t.shape[-2:])
