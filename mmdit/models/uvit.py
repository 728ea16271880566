"""UViT: a transformer in the middle of a convolutional U-Net (Fig. 4).

"simple diffusion", Hoogeboom et al. 2023: convolutions at high resolution, attention at low.
Residual blocks at the resolution of the latent are followed by a DiT, whose tokens are the text and
patches of the feature maps, and by residual blocks with skip connections from the first ones.
"""

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.checks import at_least_one
from mmdit.errors import UserError
from mmdit.models.backbone import PatchBackbone, Shared
from mmdit.models.blocks import OutputLayer
from mmdit.models.dit import DiTBlock
from mmdit.nn.modulation import Modulation, modulate
from mmdit.registry import register


class MapModulation(Modulation):
    """`parts` vectors of size `channels`, which modulate feature maps."""

    def __init__(self, width: int, channels: int, parts: int) -> None:
        super().__init__(width, parts)
        self.values = parts * channels
        self.linear = nn.Linear(width, parts * channels)

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:  # (b, d) -> parts x (b, c, 1, 1)
        return tuple(rearrange(part, "b 1 c -> b c 1 1") for part in super().forward(y))


class ConvolutionBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, modulated and gated in between (adaLN-zero)."""

    def __init__(self, channels: int, out_channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.channels, self.out_channels, self.width = channels, out_channels, width
        self.modulation = MapModulation(width, out_channels, 3)
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h (b, c, h, w), y (b, d) -> h."""
        shift, scale, gate = self.modulation(y)
        change = self.conv1(F.silu(self.norm1(h)))
        change = self.conv2(F.silu(modulate(self.norm2(change), shift, scale)))
        return self.shortcut(h) + gate * change

    def flops(self, pixels: int) -> int:
        c, out = self.channels, self.out_channels
        shortcut = c * out if c != out else 0
        return 2 * (3 * self.width * out + pixels * (9 * c * out + 9 * out**2 + shortcut))


@register
class UViT(PatchBackbone):
    """The velocity (or another prediction) of a noised latent, given text.

    Channels double where the resolution drops: the convolutions have half of `width`, in as many
    groups (GroupNorm) as there are heads, which makes 32 channels each for heads of 64.

    Args: those of `PatchBackbone`, and
        depth: number of transformer blocks; `skipping` uses their indices.
        patch_size: factor by which the sides of the feature maps shrink before the transformer.
        conv_blocks: residual blocks before the transformer, and as many after it.

    Raises:
        UserError: as for `PatchBackbone`; half of `width` does not split into groups.
    """

    def __init__(
        self,
        *,
        conv_blocks: int = 2,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        at_least_one("UViT", conv_blocks=conv_blocks)
        width, heads = self.width, self.num_heads
        if width % (2 * heads):
            raise UserError(
                f"UViT: width {width} must be divisible by {2 * heads}: its convolutions have "
                f"width/2 channels, which GroupNorm splits into {heads} groups, as num_heads says"
            )
        channels = width // 2
        self.conv_in = nn.Conv2d(self.latent_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(
            ConvolutionBlock(channels, channels, width, heads) for _ in range(conv_blocks)
        )
        self.blocks = nn.ModuleList(self.block(DiTBlock) for _ in range(self.depth))
        self.output = OutputLayer(self.width, self.patch_values)
        self.up = nn.ModuleList(
            ConvolutionBlock(2 * channels, channels, width, heads) for _ in range(conv_blocks)
        )
        self.norm_out = nn.GroupNorm(heads, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, self.latent_channels, 3, padding=1)
        if not self.positions.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """One evaluation of the network; see `Backbone.forward`."""
        y = self.vector(t, c_vec)
        c = self.text_tokens(c_ctxt)

        h = self.conv_in(z_t.to(self.compute_dtype))
        seen = []
        for block in self.down:
            h = block(h, y)
            seen.append(h)

        x = torch.cat([c, self.image_tokens(h)], dim=1)
        for block in self.blocks:
            x = block(x, y)
        h = self.prediction(x[:, c.shape[1] :], y, *z_t.shape[-2:])  # feature maps

        for block in self.up:
            h = block(torch.cat([h, seen.pop()], dim=1), y)
        return self.conv_out(F.silu(self.norm_out(h)))

    @staticmethod
    def patched_channels(latent_channels: int, width: int) -> int:
        """Channels of the feature maps, which are cut into patches in place of the latent."""
        return width // 2

    @staticmethod
    def width_unit(num_heads: int) -> int:
        """As `PatchBackbone.width_unit`, and twice the groups of the convolutions."""
        return math.lcm(4, 2 * num_heads)

    def flops(self, *, height: int, width: int, text_length: int) -> int:
        """`PatchBackbone.flops`, of the transformer, and those of the convolutions around it."""
        transformer = super().flops(height=height, width=width, text_length=text_length)
        pixels = height * width
        ends = 2 * pixels * 2 * 9 * self.latent_channels * (self.width // 2)
        around = sum(block.flops(pixels) for block in self.convolutions)
        return transformer + ends + around

    @property
    def convolutions(self) -> list[ConvolutionBlock]:
        """The residual blocks, those before the transformer first."""
        return [*self.down, *self.up]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `PatchBackbone.compile`, and the residual blocks one by one."""
        super().compile(*args, **kwargs)
        for block in self.convolutions:
            block.compile(*args, **kwargs)

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.conv_out

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as in DiT, convolutions like linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        super().reset_parameters()  # zeroes the last one
