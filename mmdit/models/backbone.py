"""The interface of a pipeline's network, and what the backbones of Figure 4 share.

A backbone embeds latent and text as tokens, applies blocks that timestep and pooled text modulate,
and maps the final image tokens to the prediction. Its `forward` shows the whole order in one place.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Required, Self, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from mmdit.checks import at_least_one
from mmdit.errors import UserError
from mmdit.flow.cached_velocity import Residuals
from mmdit.models.blocks import Block, OutputLayer, SkippedBlock, reset_as_in_dit
from mmdit.models.reuse import CompletingBlock, DecidingBlock, LaterBlock
from mmdit.nn.embeddings import (
    PatchEmbedding,
    TimestepEmbedding,
    VectorEmbedding,
    centre_crop,
    position_table,
    unpatchify,
)
from mmdit.nn.network import Network
from mmdit.registry import build, describe


class Backbone(Network, ABC):
    """The velocity (or another prediction) of a noised latent, given text.

    Attributes:
        reads: arguments of `forward` besides text, by their names in `Condition.extra`; a pipeline
            samples only with exactly these.
        latent_channels: channels c of the latent.
        patch_size: the sides of a latent are multiples of it.
        context_width: width of c_ctxt.
        pooled_width: width p of c_vec.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    latent_channels: int
    patch_size: int
    context_width: int
    pooled_width: int

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

    @property
    @abstractmethod
    def longest_side(self) -> int:
        """The largest height or width of a latent."""

    @property
    @abstractmethod
    def layers(self) -> list[Block]:
        """All blocks in order; `skipping` uses their indices."""

    @abstractmethod
    def skipping(self, layers: Collection[int]) -> Self:
        """A view of this network, of the same weights, without some blocks (skip-layer guidance).

        Raises:
            UserError: there is no block of that index.
        """

    def reusing(self, residuals: Residuals) -> Self:
        """A view of this network, of the same weights, that need not evaluate all blocks.

        It evaluates the first block, and the others only for the samples that `residuals` then
        chooses; the other samples take from `residuals` what these blocks last added. The `flops`
        of the view are those per sample of its latest evaluation.

        Raises:
            UserError: this kind of network cannot, or has no block after the first.
        """
        raise UserError(
            f"{type(self).__name__} has no first-block cache: sample without one, or use "
            "TaylorCache"
        )

    @abstractmethod
    def flops(self, *, height: int, width: int, text_length: int) -> int:
        """Operations of one forward pass of one sample; a training step takes three times as many.

        Counts matrix products, convolutions and attention in closed form, with the customary two
        operations for each multiply-add.

        Args:
            height, width: of the latent.
            text_length: tokens of c_ctxt.
        """

    @abstractmethod
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, in place, but block by block: equal blocks share one graph."""


class Shared(TypedDict, total=False):
    """Arguments of every `PatchBackbone`; a subclass hands them on and names only its own."""

    depth: Required[int]
    width: Required[int]
    num_heads: Required[int]
    mlp_ratio: float
    qk_norm: bool
    latent_channels: int
    patch_size: int
    context_width: int
    pooled_width: int
    position_size: int
    position_grid: int
    position_base: int


K = TypeVar("K", bound=Block)


class PatchBackbone(Backbone):
    """A backbone of Figure 4: its tokens are patches of the latent, with positions.

    A subclass adds `blocks`, an `output`, and calls `reset_parameters` where it is not on meta.

    Args:
        depth: number of blocks.
        width: channels of a token; the paper's models have 64 * depth.
        num_heads: attention heads; the paper's models have `depth`, each of size 64.
        mlp_ratio: hidden width of the MLPs over `width`.
        qk_norm: RMSNorm on queries and keys (SD3.5; against the growth of logits, Fig. 5).
        latent_channels: channels c of the latent.
        patch_size: side of the square patches p.
        context_width: width of c_ctxt.
        pooled_width: width p of c_vec.
        position_size, position_grid, position_base: side of the stored position table, side of the
            grid at training resolution and span of coordinates, in patches (`position_table`).

    Raises:
        UserError: a count is not positive; `width` does not split into `num_heads`, or into the
            four parts of a position.
    """

    positions: Tensor  # buffer (size, size, d)
    _description: dict[str, Any]
    blocks: nn.ModuleList
    output: OutputLayer

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        latent_channels: int = 16,
        patch_size: int = 2,
        context_width: int = 4096,
        pooled_width: int = 2048,
        position_size: int = 192,
        position_grid: int = 64,
        position_base: int = 16,
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
        self.depth, self.width, self.num_heads = depth, width, num_heads
        self.mlp_ratio, self.qk_norm = mlp_ratio, qk_norm
        channels = self.patched_channels(latent_channels, width)
        self.patch_values = patch_size**2 * channels
        self._position = {"size": position_size, "grid": position_grid, "base": position_base}

        self.patch_embedding = PatchEmbedding(channels, width, patch_size)
        self.register_buffer("positions", torch.empty(position_size, position_size, width))
        self.timestep_embedding = TimestepEmbedding(width)
        self.pooled_embedding = VectorEmbedding(pooled_width, width)
        self.context_embedding = nn.Linear(context_width, width)

    def block(self, cls: Callable[..., K]) -> K:
        """A new block of the sizes of this network."""
        return cls(self.width, self.num_heads, self.mlp_ratio, qk_norm=self.qk_norm)

    @staticmethod
    def patched_channels(latent_channels: int, width: int) -> int:
        """Channels of what is cut into patches: the latent, unless a subclass says otherwise."""
        return latent_channels

    @staticmethod
    def width_unit(num_heads: int) -> int:
        """Smallest valid width; all others are multiples of it."""
        return math.lcm(num_heads, 4)

    def vector(self, t: Tensor, c_vec: Tensor) -> Tensor:
        """Embedding y of timestep and pooled text, by which blocks are modulated: (b, d)."""
        time = self.timestep_embedding(t, self.cast)
        return time + self.pooled_embedding(self.cast(c_vec))

    def text_tokens(self, c_ctxt: Tensor) -> Tensor:
        """Project text states (b, l, context_width) to the width of the network: (b, l, d)."""
        return self.context_embedding(self.cast(c_ctxt))

    def image_tokens(self, z: Tensor) -> Tensor:
        """Embed the patches of a latent (b, c, h, w) and add their positions: (b, n, d)."""
        positions = centre_crop(self.positions, *self.grid(*z.shape[-2:]))
        x = self.patch_embedding(z.to(self.compute_dtype))
        return x + positions.to(x.dtype)

    def prediction(self, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
        """Map the final image tokens (b, n, d) to the prediction (b, c, height, width)."""
        rows, columns = self.grid(height, width)
        x = self.output(x, y)
        return unpatchify(x, rows=rows, columns=columns, patch_size=self.patch_size)

    @property
    def layers(self) -> list[Block]:
        # A last block of another class is stored in `last_block`.
        last = [self._modules["last_block"]] if "last_block" in self._modules else []
        return [*self.blocks, *last]

    def skipping(self, layers: Collection[int]) -> Self:
        whole = self.layers
        if absent := sorted(set(layers) - set(range(len(whole)))):
            raise UserError(f"layers {absent} cannot be skipped: there are 0 to {len(whole) - 1}")
        return self._with(
            [SkippedBlock(block) if i in layers else block for i, block in enumerate(whole)]
        )

    def reusing(self, residuals: Residuals) -> Self:
        blocks = self.layers
        evaluated = [i for i, block in enumerate(blocks) if not isinstance(block, SkippedBlock)]
        if len(evaluated) < 2:
            raise UserError(
                f"a first-block cache needs a block after the first, but {type(self).__name__} "
                f"has {len(evaluated)} of {len(blocks)} here: sample without one, or use "
                "TaylorCache"
            )
        first, last = evaluated[0], len(blocks) - 1
        later = [LaterBlock(block, residuals) for block in blocks[first + 1 : last]]
        ends = DecidingBlock(blocks[first], residuals), CompletingBlock(blocks[last], residuals)
        return self._with([*blocks[:first], ends[0], *later, ends[1]])

    def _with(self, blocks: list[Block]) -> Self:
        """A view of this network with other blocks, as many as it has."""
        view = copy.copy(self)
        view._modules = dict(self._modules)
        blocks = [*blocks]
        if "last_block" in view._modules:
            view._modules["last_block"] = blocks.pop()
        view._modules["blocks"] = nn.ModuleList(blocks)
        return view

    def flops(self, *, height: int, width: int, text_length: int) -> int:
        d, n = self.width, math.prod(self.grid(height, width))
        vector = (256 + self.pooled_width) * d + 2 * d**2
        text = text_length * self.context_width * d
        image = n * self.patch_values * d
        output = 2 * d**2 + n * d * self.patch_values
        around = 2 * (vector + text + image + output)
        return around + sum(block.flops(n, text_length) for block in self.layers)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for part in (*self.layers, self.output):
            part.compile(*args, **kwargs)

    @property
    def longest_side(self) -> int:
        return self.patch_size * self.positions.shape[0]

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
        """Initialize as in DiT, which the paper follows, and recompute the position table."""
        self.positions.copy_(position_table(self.positions.shape[-1], **self._position))
        reset_as_in_dit(self)
        # The untrained network predicts zero: the loss starts at E||target||^2.
        nn.init.zeros_(self.last_layer.weight)


B = TypeVar("B", bound=PatchBackbone)


@torch.no_grad()
def crop_positions(network: nn.Module, height: int, width: int) -> None:
    """Keep only the middle of position tables, for latents of height x width and smaller ones.

    In place, and exact: every size that remains possible sees the positions that it saw. The table
    of SD3.5 Medium takes 453 MB in 16 bits, and its middle for images of 1024 x 1024 12.6 MB. The
    network then is one with a smaller `position_size`.

    Args:
        network: a backbone, or one that holds some.
        height, width: of the largest latent.

    Raises:
        UserError: the size is not possible.
    """
    for part in network.modules():
        if isinstance(part, PatchBackbone):
            size = part.positions.shape[0]
            side = max(part.grid(height, width))
            # Of the same parity, so that the middle of the middle is the middle of the whole.
            side += (size - side) % 2
            middle = centre_crop(part.positions, side, side)
            part.positions = middle.unflatten(0, (side, side)).clone()
            part._position = {**part._position, "size": side}
            part._description = {**describe(part), "position_size": side}


def with_qk_norm(model: B) -> B:
    """Copy a model and add RMSNorm with unit weights to its queries and keys.

    For finetuning at high resolution a model that was trained without it (Fig. 5, Sec. 5.3.2). The
    copy computes something else from the start, so it has to be trained further before use.

    Raises:
        UserError: the model has QK-norm already.
    """
    description = describe(model)
    if description["qk_norm"]:
        raise UserError(f"this {type(model).__name__} has QK-norm already (qk_norm is true)")
    return changed(model, qk_norm=True)


def changed(model: B, **arguments: Any) -> B:
    """Copy a model with QK-norm or other positions, to finetune it at another resolution.

    Its weights stay; new norms begin as ones, and positions are those of the arguments.

    Args:
        arguments: `qk_norm`, `position_size`, `position_grid` or `position_base`, see
            `PatchBackbone`.

    Raises:
        UserError: a number is not positive.
    """
    with torch.device("meta"):
        network: B = build({**describe(model), **arguments})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, slot in network.state_dict().items():
        if name not in weights:
            weights[name] = model.cast(torch.ones(slot.shape))
    if any(name.startswith("position_") for name in arguments):
        table = position_table(network.positions.shape[-1], **network._position)
        weights["positions"] = model.cast(table)
    network.load_state_dict(weights, assign=True)
    network.compute_dtype = model.compute_dtype
    return network.train(model.training)
