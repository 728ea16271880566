"""MM-DiT with three sets of weights: one each for image, CLIP and T5 tokens (Fig. 4).

Otherwise it is the MM-DiT of two sets, which the paper found hardly worse.
"""

from typing import Unpack

from torch import Tensor, nn

from mmdit.checks import whole_number
from mmdit.errors import UserError
from mmdit.models.backbone import PatchBackbone, Shared
from mmdit.models.blocks import (
    Block,
    OutputLayer,
    Stream,
    attention_flops,
    joint_attention,
)
from mmdit.models.mmdit import LastTextStream
from mmdit.nn.modulation import modulate
from mmdit.registry import register


class ThreeStreamBlock(Block):
    """Modulate, attend together, modulate, MLP: three modalities side by side."""

    returns = (0, 1, 2)

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.clip = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.t5 = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.image = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)

    def forward(
        self, clip: Tensor, t5: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """clip (b, k, d), t5 (b, l, d), x (b, n, d), y (b, d) -> clip, t5, x."""
        streams, tokens = (self.clip, self.t5, self.image), (clip, t5, x)
        heads, modulations = [], []
        for stream, own in zip(streams, tokens, strict=True):
            shift1, scale1, gate1, *of_mlp = stream.modulation(y)
            heads.append(stream.attention_in(modulate(stream.norm1(own), shift1, scale1)))
            modulations.append((gate1, *of_mlp))

        changed = []
        attended = joint_attention(*heads)
        for stream, own, part, modulation in zip(
            streams, tokens, attended, modulations, strict=True
        ):
            gate1, shift2, scale2, gate2 = modulation
            own = own + gate1 * stream.attention_out(part)
            own = own + gate2 * stream.mlp(modulate(stream.norm2(own), shift2, scale2))
            changed.append(own)
        clip, t5, x = changed
        return clip, t5, x

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        # CLIP and T5 tokens cost the same, so the split between them does not matter.
        text = self.clip.token_flops(0) + self.t5.token_flops(text_tokens)
        n = image_tokens + text_tokens
        return text + self.image.token_flops(image_tokens) + attention_flops(n, n, self.image.width)


class LastThreeStreamBlock(Block):
    """The last block: the image attends to the texts, which stop after attention."""

    returns = (2,)

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.clip = LastTextStream(width, num_heads, qk_norm=qk_norm)
        self.t5 = LastTextStream(width, num_heads, qk_norm=qk_norm)
        self.image = Stream(width, num_heads, mlp_ratio, qk_norm=qk_norm)

    def forward(self, clip: Tensor, t5: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """clip (b, k, d), t5 (b, l, d), x (b, n, d), y (b, d) -> x."""
        image = self.image
        shift1, scale1, gate1, shift2, scale2, gate2 = image.modulation(y)
        *_, x_attended = joint_attention(
            *(
                text.attention_in(modulate(text.norm1(own), *text.modulation(y)))
                for text, own in ((self.clip, clip), (self.t5, t5))
            ),
            image.attention_in(modulate(image.norm1(x), shift1, scale1)),
        )
        x = x + gate1 * image.attention_out(x_attended)
        return x + gate2 * image.mlp(modulate(image.norm2(x), shift2, scale2))

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        text = self.clip.token_flops(0) + self.t5.token_flops(text_tokens)
        n = image_tokens + text_tokens
        return text + self.image.token_flops(image_tokens) + attention_flops(n, n, self.image.width)


@register
class MMDiTThree(PatchBackbone):
    """The velocity (or another prediction) of a noised latent, given text.

    Args: those of `PatchBackbone`, and
        clip_length: tokens of c_ctxt that are CLIP's, and come first; the others are T5's.

    Raises:
        UserError: as for `PatchBackbone`; `clip_length` is not positive.
    """

    def __init__(
        self,
        *,
        clip_length: int = 77,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        whole_number("MMDiTThree: clip_length", clip_length)
        self.clip_length = clip_length
        # CLIP's tokens go through `context_embedding`.
        self.t5_embedding = nn.Linear(self.context_width, self.width)
        self.blocks = nn.ModuleList(self.block(ThreeStreamBlock) for _ in range(self.depth - 1))
        self.last_block = self.block(LastThreeStreamBlock)
        self.output = OutputLayer(self.width, self.patch_values)
        if not self.positions.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """One evaluation of the network; see `Backbone.forward`."""
        y = self.vector(t, c_vec)
        clip, t5 = self.texts(c_ctxt)
        x = self.image_tokens(z_t)
        for block in self.blocks:
            clip, t5, x = block(clip, t5, x, y)
        x = self.last_block(clip, t5, x, y)
        return self.prediction(x, y, *z_t.shape[-2:])

    def texts(self, c_ctxt: Tensor) -> tuple[Tensor, Tensor]:
        """Split c_ctxt (b, l, context_width) into tokens of CLIP (b, k, d) and T5 (b, l - k, d).

        Raises:
            UserError: there are no tokens of T5.
        """
        length = c_ctxt.shape[1]
        if length <= self.clip_length:
            raise UserError(
                f"c_ctxt has {length} tokens, of which clip_length {self.clip_length} are CLIP's: "
                "none are left for T5"
            )
        clip, t5 = c_ctxt.split([self.clip_length, length - self.clip_length], dim=1)
        return self.text_tokens(clip), self.t5_embedding(self.cast(t5))
