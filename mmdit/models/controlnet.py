"""ControlNets: a second network reads a control image and adds to the image tokens of an MMDiT.

Published by Stability AI for SD3.5 Large (blur, canny, depth). The idea is Zhang et al. 2023's: the
base model stays as it is, and a control net that is not trained yet changes nothing.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mmdit.checks import expect_finite
from mmdit.errors import UserError
from mmdit.models.backbone import reset_as_in_dit
from mmdit.models.dit import DiTBlock
from mmdit.models.mmdit import MMDiT
from mmdit.nn.embeddings import PatchEmbedding, VectorEmbedding, sinusoid
from mmdit.registry import describe, register

# In the order of `control_type` in the public files. Factor and offset of pixels in [0, 1]: what
# the autoencoder is shown. Canny edges leave [-1, 1] (0.5 to 128): the public weights expect it.
CONTROL_RANGES = {"blur": (2.0, -1.0), "canny": (127.5, 0.5), "depth": (2.0, -1.0)}


def control_pixels(pixels: Tensor, control_type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A control image as the autoencoder is to see it: uint8 (b, h, w, 3) -> (b, 3, h, w).

    Raises:
        UserError: `control_type` is not one of `CONTROL_RANGES`.
    """
    check_control_type(control_type)
    factor, offset = CONTROL_RANGES[control_type]
    return rearrange(pixels, "b h w c -> b c h w").contiguous().to(dtype) / 255 * factor + offset


def check_control_type(control_type: str) -> None:
    """Raises a UserError where there is no such type of control image."""
    if control_type not in CONTROL_RANGES:
        raise UserError(f"control_type {control_type!r} must be one of {', '.join(CONTROL_RANGES)}")


@register
class ControlNet(nn.Module):
    """Residuals for the image tokens of an MMDiT, as in SD3.5 Large: each block follows the last.

    It reads the tokens that the base model makes of the latent, positions included, and no text
    but the pooled one.

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
        if depth < 1:
            raise UserError(f"ControlNet: depth {depth} must be at least 1")
        if num_heads < 1 or width % num_heads:
            raise UserError(f"ControlNet: width {width} must be divisible by num_heads {num_heads}")
        check_control_type(control_type)
        self.width, self.control_type = width, control_type
        self.control_embedding = PatchEmbedding(latent_channels, width, patch_size)
        self.timestep_embedding = VectorEmbedding(256, width)
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
        y = self.timestep_embedding(sinusoid(t)) + self.pooled_embedding(c_vec)
        x = base.image_tokens(z_t) + self.control_embedding(control_latent.to(base.dtype))
        residuals = []
        for block, to_residual in zip(self.blocks, self.to_residuals, strict=True):
            x = block(x, y)
            residuals.append(to_residual(x))
        return residuals

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; that of the base model has to be the same."""
        return self.control_embedding.proj.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in DiT; the residuals of an untrained control net are zero."""
        reset_as_in_dit(self)
        for parameter in self.to_residuals.parameters():
            nn.init.zeros_(parameter)


@register
class ParallelControlNet(ControlNet):
    """Residuals for an MMDiT, each from a block that sees the same tokens, not its predecessor's.

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
        pooled = base.pooled_embedding(c_vec)
        y = self.timestep_embedding(sinusoid(t)) + self.pooled_embedding(pooled)
        x = self.patch_embedding(z_t.to(base.dtype))
        x = x + self.control_embedding(control_latent.to(base.dtype))
        return [
            to_residual(block(x, y))
            for block, to_residual in zip(self.blocks, self.to_residuals, strict=True)
        ]


# residuals, depth of the base model -> what is added after each of its blocks
Placement = Callable[[Sequence[Tensor], int], list[Tensor]]


def after_every_block(residuals: Sequence[Tensor], depth: int) -> list[Tensor]:
    """The reference's rule: each residual serves depth/n blocks in a row, the last included.

    Raises:
        UserError: the number of residuals does not divide `depth`.
    """
    n = len(residuals)
    if depth % n:
        raise UserError(
            f"{n} residuals of the control net cannot be shared out evenly among {depth} blocks: "
            f"take one whose depth divides {depth}, or the placement `before_the_last_block`"
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


class ControlledMMDiT(nn.Module):
    """An MMDiT that follows a control image; called as the MMDiT itself is.

    A view on two networks for one control image (or one batch of them): cheap to make, it owns no
    weights.

    Args:
        base: the network that is controlled.
        control_net: reads the control image.
        control_latent: of the control image, made of `control_pixels` (1, c, h, w), or of one for
            each picture (b', c, h, w); repeated until it fills the batch, so that the two halves of
            guidance get the same.
        strength: factor of the residuals.
        placement: which residual is added after which block.

    Raises:
        UserError: the two networks differ in width, dtype or what they read; `strength` is not
            finite.
        NotFinite: the control latent is not.
    """

    control_latent: Tensor  # buffer

    def __init__(
        self,
        *,
        base: MMDiT,
        control_net: ControlNet,
        control_latent: Tensor,
        strength: float = 1.0,
        placement: Placement = after_every_block,
    ) -> None:
        super().__init__()
        width, dtype = base.context_embedding.out_features, base.dtype
        if control_net.width != width:
            raise UserError(
                f"the control net has width {control_net.width}, the model {width}: "
                "it was made for another model"
            )
        if control_net.dtype != dtype:
            raise UserError(
                f"the control net is {control_net.dtype}, the model {dtype}: make them the same"
            )
        expect_finite("the control image's autoencoder", control_latent)
        if not math.isfinite(strength):
            raise UserError(f"the strength {strength} of the control net must be a finite number")
        reads, has = describe(control_net), describe(base)
        for name in ("pooled_width", "latent_channels", "patch_size"):
            if reads.get(name, has[name]) != has[name]:
                raise UserError(
                    f"the control net has {name} {reads[name]}, the model {has[name]}: it was made "
                    "for another model"
                )
        self.base, self.control_net = base, control_net
        self.register_buffer("control_latent", control_latent, persistent=False)
        self.strength, self.placement = strength, placement

    @property
    def latent_channels(self) -> int:
        return self.base.latent_channels

    @property
    def patch_size(self) -> int:
        return self.base.patch_size

    @property
    def positions(self) -> Tensor:
        return self.base.positions

    def forward(self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        """`MMDiT.forward`, with the residuals of the control net added after its blocks.

        Raises:
            UserError: the control latent has another size than `z_t`, or does not fill its batch;
                the residuals do not fit the depth of the model.
        """
        base = self.base
        y = base.vector(t, c_vec)
        c = base.text_tokens(c_ctxt)
        x = base.image_tokens(z_t)
        residuals = self.control_net(base, z_t, t, c_vec, self._control_for(z_t))
        *inner, last = self.placement(residuals, len(base.blocks) + 1)
        for block, residual in zip(base.blocks, inner, strict=True):
            c, x = block(c, x, y)
            x = x + self.strength * residual
        x = base.last_block(c, x, y) + self.strength * last
        return base.prediction(x, y, *z_t.shape[-2:])

    def check_pictures(self, count: int) -> None:
        """Refuse to paint another number of pictures than there are control images for.

        Raises:
            UserError: they are neither one for all nor one for each.
        """
        if len(self.control_latent) not in (1, count):
            raise UserError(
                f"{len(self.control_latent)} control images for {count} pictures: give one for "
                "all, or one for each, prompts outermost (control_latent.repeat_interleave("
                "num_images, dim=0))"
            )

    def skipping(self, layers: Collection[int]) -> MMDiT:
        """The weaker network of skip-layer guidance: as in the reference, it is not controlled."""
        return self.base.skipping(layers)

    def _control_for(self, z_t: Tensor) -> Tensor:
        control = self.control_latent
        fits = control.ndim == 4 and control.shape[1:] == z_t.shape[1:] and len(control) > 0
        if not fits or len(z_t) % len(control):
            raise UserError(
                f"the control latent {tuple(control.shape)} does not fit the latent "
                f"{tuple(z_t.shape)}: channels and size must be the same, and the batch a multiple"
            )
        return repeat(control, "b c h w -> (times b) c h w", times=len(z_t) // len(control))
