"""ControlNets: a second network that reads a control image and adds to an MMDiT's image tokens.

Published by Stability AI for SD3.5 Large (blur, canny, depth). The idea is Zhang et al. 2023's: the
base model is unchanged, and an untrained control net has no effect.
"""

import copy
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.checks import at_least_one, number, one_of
from mmdit.errors import UserError
from mmdit.models.backbone import Backbone
from mmdit.models.blocks import Block, reset_as_in_dit
from mmdit.models.dit import DiTBlock
from mmdit.models.mmdit import MMDiT
from mmdit.nn.embeddings import PatchEmbedding, TimestepEmbedding, VectorEmbedding
from mmdit.nn.network import Network
from mmdit.registry import describe, register

# Factor and offset that map pixels in [0, 1] to the autoencoder's input, in the order of
# `control_type` in the public files. Canny edges leave [-1, 1] (0.5 to 128), as those files expect.
CONTROL_RANGES = {"blur": (2.0, -1.0), "canny": (127.5, 0.5), "depth": (2.0, -1.0)}


def control_pixels(pixels: Tensor, control_type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map control images to the autoencoder's input: uint8 (b, h, w, 3) -> (b, 3, h, w).

    Raises:
        UserError: `control_type` is not one of `CONTROL_RANGES`.
    """
    check_control_type(control_type)
    factor, offset = CONTROL_RANGES[control_type]
    return rearrange(pixels, "b h w c -> b c h w").contiguous().to(dtype) / 255 * factor + offset


def check_control_type(control_type: str) -> None:
    """Raise UserError if there is no such type of control image."""
    one_of("control_type", control_type, CONTROL_RANGES)


@register
class ControlNet(Network):
    """Residuals for the image tokens of an MMDiT, as in SD3.5 Large: each block follows the last.

    It reads the base model's tokens of the latent, positions included, and only the pooled text.

    Args:
        depth: number of blocks, and of residuals (19 in the public ones).
        width: that of the base model.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over `width`.
        latent_channels: channels c of the control latent.
        patch_size: side of the square patches p.
        pooled_width: width of c_vec.
        control_type: what the control image shows, 'blur', 'canny' or 'depth' (`control_pixels`).

    Raises:
        UserError: an impossible depth or width; no such `control_type`.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        latent_channels: int = 16,
        patch_size: int = 2,
        pooled_width: int = 2048,
        control_type: str = "blur",
    ) -> None:
        super().__init__()
        at_least_one("ControlNet", depth=depth, num_heads=num_heads)
        if width % num_heads:
            raise UserError(f"ControlNet: width {width} must be divisible by num_heads {num_heads}")
        check_control_type(control_type)
        self.width, self.control_type = width, control_type
        self.control_embedding = PatchEmbedding(latent_channels, width, patch_size)
        self.timestep_embedding = TimestepEmbedding(width)
        self.pooled_embedding = VectorEmbedding(pooled_width, width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, num_heads, mlp_ratio, qk_norm=False) for _ in range(depth)
        )
        self.to_residuals = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.reset_parameters()

    def forward(
        self, base: MMDiT, z_t: Tensor, t: Tensor, c_vec: Tensor, control_latent: Tensor
    ) -> list[Tensor]:
        """One residual for every block of this network.

        Args:
            base: the network that is controlled.
            z_t: noised latent (b, c, h, w).
            t: time in [0, 1], (b,).
            c_vec: pooled text (b, p).
            control_latent: of the control image, (b, c, h, w).

        Returns:
            depth x (b, n, d).
        """
        y = self.vector(base, t, c_vec)
        x = base.image_tokens(z_t) + self.control_embedding(control_latent.to(base.compute_dtype))
        residuals = []
        for block, to_residual in zip(self.blocks, self.to_residuals, strict=True):
            x = block(x, y)
            residuals.append(to_residual(x))
        return residuals

    def vector(self, base: MMDiT, t: Tensor, c_vec: Tensor) -> Tensor:
        """Embedding y of timestep and pooled text, by which blocks are modulated: (b, d)."""
        return self.timestep_embedding(t, self.cast) + self.pooled_embedding(self.cast(c_vec))

    def flops(self, base: MMDiT, tokens: int) -> int:
        """Operations of one forward pass of one sample; see `Backbone.flops`.

        Args:
            base: the network that is controlled.
            tokens: of its image.
        """
        d = self.width
        vector = (256 + base.pooled_width) * d + 2 * d**2
        embeddings = 2 * tokens * base.patch_values * d  # of the latent, and of the control latent
        to_residuals = len(self.blocks) * tokens * d**2
        around = 2 * (vector + embeddings + to_residuals)
        layers: list[Any] = [*self.blocks]
        return around + sum(block.flops(tokens, 0) for block in layers)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as in DiT; the residuals of an untrained control net are zero."""
        reset_as_in_dit(self)
        for parameter in self.to_residuals.parameters():
            nn.init.zeros_(parameter)


@register
class ParallelControlNet(ControlNet):
    """Residuals for an MMDiT, from blocks that all see the same tokens, side by side.

    The reference's other control net, made for the 2B model; no public weights of it are known. It
    embeds the latent itself, without positions, and the base model's embedding of the pooled text.

    Args: those of `ControlNet`, but for `pooled_width`, which is `width` here.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        latent_channels: int = 16,
        patch_size: int = 2,
        control_type: str = "blur",
    ) -> None:
        super().__init__(
            depth=depth,
            width=width,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            latent_channels=latent_channels,
            patch_size=patch_size,
            pooled_width=width,
            control_type=control_type,
        )
        self.patch_embedding = PatchEmbedding(latent_channels, width, patch_size)
        self.reset_parameters()

    def forward(
        self, base: MMDiT, z_t: Tensor, t: Tensor, c_vec: Tensor, control_latent: Tensor
    ) -> list[Tensor]:
        """One residual for every block of this network; see `ControlNet.forward`."""
        y = self.vector(base, t, c_vec)
        x = self.patch_embedding(z_t.to(base.compute_dtype))
        x = x + self.control_embedding(control_latent.to(base.compute_dtype))
        return [
            to_residual(block(x, y))
            for block, to_residual in zip(self.blocks, self.to_residuals, strict=True)
        ]

    def vector(self, base: MMDiT, t: Tensor, c_vec: Tensor) -> Tensor:
        """As in `ControlNet`, but of the base model's embedding of the pooled text."""
        pooled = self.pooled_embedding(base.pooled_embedding(base.cast(c_vec)))
        return self.timestep_embedding(t, self.cast) + pooled

    def flops(self, base: MMDiT, tokens: int) -> int:
        """`ControlNet.flops`, and those of the embedding of the base model's pooled text."""
        return super().flops(base, tokens) + 2 * 2 * self.width**2


class NoControl(nn.Module):
    """Takes the place of a skipped control net: adds nothing after any block."""

    blocks = ()

    def forward(self, base: MMDiT, z_t: Tensor, *_: Tensor) -> list[Tensor]:
        return [torch.zeros((), dtype=base.compute_dtype, device=z_t.device)]

    def flops(self, base: MMDiT, tokens: int) -> int:
        return 0


def after_every_block(residuals: Sequence[Tensor], depth: int) -> list[Tensor]:
    """The reference's rule: each residual serves depth/n blocks in a row, the last included.

    Raises:
        UserError: the number of residuals does not divide `depth`.
    """
    n = len(residuals)
    if depth % n:
        raise UserError(
            f"{n} residuals of the control net cannot be shared out evenly among {depth} blocks: "
            f"take one whose depth divides {depth}, or placement='before_the_last_block'"
        )
    return [residuals[i // (depth // n)] for i in range(depth)]


def before_the_last_block(residuals: Sequence[Tensor], depth: int) -> list[Tensor]:
    """diffusers' rule: any number of residuals up to `depth`; nothing after the last block.

    Raises:
        UserError: there are more residuals than blocks.
    """
    n = len(residuals)
    if n > depth:
        raise UserError(
            f"{n} residuals of the control net are more than {depth} blocks of the model"
        )
    # In floating point, as there: exact integers would differ for some n that do not divide.
    shared = [residuals[int(i / (depth / n))] for i in range(depth - 1)]
    return [*shared, torch.zeros_like(residuals[-1])]


# residuals, depth of the base model -> what is added after each of its blocks
PLACEMENTS: dict[str, Callable[[Sequence[Tensor], int], list[Tensor]]] = {
    "after_every_block": after_every_block,
    "before_the_last_block": before_the_last_block,
}


@register
class ControlledMMDiT(Backbone):
    """An MMDiT that follows a control image, for use in a pipeline like the MMDiT itself.

    It holds two networks and has no weights of its own, so it is cheap to create. The control
    image comes with each call, as the text does: the latent of `control_pixels`, one for each
    sample, is what `forward` takes as `control`, and `Condition.extra` carries it there.

    Example:
        >>> net = mmdit.load_controlnet("sd3.5_large_controlnet_canny.safetensors")
        >>> pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=net)
        >>> pixels = control_pixels(edges, net.control_type)  # of edges, uint8 (1, h, w, 3)
        >>> images = pipe("a house", extra={"control": pipe.autoencoder.encode(pixels)})

    Training and the functions below the pipeline take it in the condition itself, with a latent
    for each sample: `condition._replace(extra={"control": latents})`.

    Args:
        base: the network that is controlled.
        control_net: reads the control image.
        strength: factor of the residuals.
        placement: which residual is added after which block, a name of `PLACEMENTS`.

    Raises:
        UserError: the two networks differ in width, dtype or what they read; `strength` is not
            finite; there is no such placement.
    """

    reads = frozenset({"control"})

    def __init__(
        self,
        *,
        base: MMDiT,
        control_net: ControlNet,
        strength: float = 1.0,
        placement: str = "after_every_block",
    ) -> None:
        super().__init__()
        self.compute_dtype = base.compute_dtype
        if control_net.width != base.width:
            raise UserError(
                f"the control net has width {control_net.width}, the model {base.width}: "
                "it was made for another model"
            )
        if control_net.compute_dtype != base.compute_dtype:
            raise UserError(
                f"the control net computes in {control_net.compute_dtype}, the model in "
                f"{base.compute_dtype}: make them the same"
            )
        number("control_strength", strength)
        one_of("placement", placement, PLACEMENTS)
        reads, has = describe(control_net), describe(base)
        for name in ("pooled_width", "latent_channels", "patch_size"):
            if reads.get(name, has[name]) != has[name]:
                raise UserError(
                    f"the control net has {name} {reads[name]}, the model {has[name]}: it was made "
                    "for another model"
                )
        self.base, self.control_net = base, control_net
        self.strength, self.placement = strength, PLACEMENTS[placement]
        self.latent_channels, self.patch_size = base.latent_channels, base.patch_size
        self.context_width, self.pooled_width = base.context_width, base.pooled_width

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        c_vec: Tensor,
        c_ctxt: Tensor,
        control: Tensor | None = None,
    ) -> Tensor:
        """`MMDiT.forward`, with the residuals of the control net added after its blocks.

        Args:
            control: latents of the control images (b, c, h, w), of any dtype, on any device.

        Raises:
            UserError: there is no control latent, or its shape is not that of `z_t`; the residuals
                do not fit the depth of the model.
        """
        if control is None or control.shape != z_t.shape:
            has = "missing" if control is None else f"{tuple(control.shape)}"
            raise UserError(
                f"the control latent is {has}, but must have the shape of the latent, "
                f"{tuple(z_t.shape)}: give one for each sample in Condition.extra['control']"
            )
        base = self.base
        y = base.vector(t, c_vec)
        c = base.text_tokens(c_ctxt)
        x = base.image_tokens(z_t)
        residuals = self.control_net(base, z_t, t, c_vec, control.to(z_t.device))
        *inner, last = self.placement(residuals, len(base.blocks) + 1)
        for block, residual in zip(base.blocks, inner, strict=True):
            c, x = block(c, x, y)
            x = x + self.strength * residual
        x = base.last_block(c, x, y) + self.strength * last
        return base.prediction(x, y, *z_t.shape[-2:])

    @property
    def longest_side(self) -> int:
        return self.base.longest_side

    @property
    def layers(self) -> list[Block]:
        return self.base.layers

    def skipping(self, layers: Collection[int]) -> Self:
        """The weaker network of skip-layer guidance; as in the reference, it is not controlled."""
        view = copy.copy(self)
        view._modules = {"base": self.base.skipping(layers), "control_net": NoControl()}
        return view

    def flops(self, *, height: int, width: int, text_length: int) -> int:
        tokens = math.prod(self.base.grid(height, width))
        base = self.base.flops(height=height, width=width, text_length=text_length)
        return base + self.control_net.flops(self.base, tokens)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.base.compile(*args, **kwargs)
        for block in self.control_net.blocks:
            block.compile(*args, **kwargs)
