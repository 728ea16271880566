"""The convolutional variational autoencoder of latent diffusion (Rombach et al. 2022), 16 channels.

Latents are normalized: the autoencoder applies scale and shift, and no other code does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.checks import at_least_one
from mmdit.dtypes import at_least_float32, wide
from mmdit.errors import UserError
from mmdit.nn.attention import attention
from mmdit.nn.network import Network
from mmdit.registry import register


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z | x) of the raw (not normalized) latent; each (b, c, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) per latent value, in nats; (b, c, h, w)."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; a 1x1 convolution where the width changes."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (b, c, h, w) -> (b, c, h, w)
        normed = self.norm(x)
        q, k, v = (
            rearrange(layer(normed), "b c h w -> b (h w) 1 c") for layer in (self.q, self.k, self.v)
        )
        out = rearrange(attention(q, k, v), "b (h w) c -> b c h w", h=x.shape[-2])
        return x + self.proj(out)


class Downsample(nn.Module):
    """Strided convolution, padded at the bottom and at the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Sequential):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            ResidualBlock(channels, channels),
            SpatialAttention(channels),
            ResidualBlock(channels, channels),
        )


class Encoder(nn.Module):
    """Image to the mean and log-variance of its latent."""

    def __init__(
        self, image_channels: int, widths: Sequence[int], blocks: int, latent_channels: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        levels, channels = [], widths[0]
        for i, width in enumerate(widths):
            level: list[nn.Module] = []
            for _ in range(blocks):
                level.append(ResidualBlock(channels, width))
                channels = width
            if i < len(widths) - 1:
                level.append(Downsample(channels))
            levels.append(nn.Sequential(*level))
        self.levels = nn.ModuleList(levels)
        self.middle = Middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, H, W) -> (b, 2c, h, w)
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent to image; one residual block more per level than the encoder."""

    def __init__(
        self, image_channels: int, widths: Sequence[int], blocks: int, latent_channels: int
    ) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.middle = Middle(channels)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level: list[nn.Module] = []
            for _ in range(blocks + 1):
                level.append(ResidualBlock(channels, width))
                channels = width
            if i > 0:
                level.append(Upsample(channels))
            levels.append(nn.Sequential(*level))
        self.levels = nn.ModuleList(levels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (b, c, h, w) -> (b, 3, H, W)
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@register
class Autoencoder(Network):
    """Images in [-1, 1] to normalized latents and back.

    Args:
        latent_channels: channels of the latent (Table 3: 4, 8 or 16).
        width: channels at full resolution, a multiple of 32 (GroupNorm).
        multipliers: of `width`, one per level; each level but the last halves the resolution.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        scale, shift: latent = (z - shift) * scale. Training a new autoencoder measures both.
    """

    scale: Tensor  # buffers, scalars
    shift: Tensor

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        scale: float = 1.5305,
        shift: float = 0.0609,
    ) -> None:
        super().__init__()
        at_least_one("Autoencoder", latent_channels=latent_channels, width=width)
        at_least_one("Autoencoder", levels=len(multipliers), multiplier=min(multipliers, default=1))
        if width % 32:
            raise UserError(f"Autoencoder: width {width} must be divisible by 32 (GroupNorm)")
        widths = [width * multiplier for multiplier in multipliers]
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(widths) - 1)
        # With channels last, convolutions on a CPU need no copies. But GroupNorm and its backward
        # pass are then slow for groups of few channels: training keeps the layout it is given.
        self.memory_format = torch.channels_last if width >= 128 else torch.contiguous_format
        self.encoder = Encoder(3, widths, blocks, latent_channels)
        self.decoder = Decoder(3, widths, blocks, latent_channels)
        self._given = {"scale": float(scale), "shift": float(shift)}
        for name, value in self._given.items():
            self.register_buffer(name, torch.tensor(value))

    def posterior(self, x: Tensor) -> Posterior:
        """q(z | x) of the raw latent, float32 at least; x (b, 3, H, W) in [-1, 1].

        Raises:
            UserError: a side of the image is not a multiple of the downsampling factor.
        """
        for name, side in zip(("height", "width"), x.shape[-2:], strict=True):
            if side % self.factor:
                raise UserError(f"image {name} {side} must be a multiple of {self.factor}")
        mean, log_variance = wide(self.encoder(x.to(self.compute_dtype))).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Image (b, 3, H, W) in [-1, 1] -> normalized latent (b, c, h, w).

        The mean of the posterior; with a generator, a sample of it.
        """
        posterior = self.posterior(x.contiguous(memory_format=self.memory_format))
        z = posterior.mean
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device)
            z = posterior.sample(noise.to(z))
        return (z - self.shift) * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Normalized latent (b, c, h, w) -> image (b, 3, H, W), nominally in [-1, 1]."""
        latent = latent.to(torch.promote_types(latent.dtype, self.compute_dtype))
        z = latent / self.scale + self.shift
        return wide(self.decoder(z.to(self.compute_dtype, memory_format=self.memory_format)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, in place, of `encode` and `decode`."""
        self.encoder.compile(*args, **kwargs)
        self.decoder.compile(*args, **kwargs)

    def _apply(self, fn, recurse=True):  # what .to(), .cuda() and .half() go through
        """Keep scale and shift in at least float32, whatever the dtype of the weights.

        1.5305 is 1.53125 in bfloat16, and in float64 it is itself again.
        """
        before = {name: getattr(self, name) for name in self._given}
        super()._apply(fn, recurse)
        for name, value in before.items():
            slot = getattr(self, name)
            dtype = at_least_float32(slot.dtype)
            if value.dtype != dtype == torch.float64 and value == self._given[name]:
                value = torch.tensor(self._given[name], dtype=dtype)
            setattr(self, name, value.to(slot.device, dtype))
        return self

    @torch.no_grad()
    def normalize(self, mean: Tensor, std: Tensor) -> None:
        """Set shift and scale from the statistics of raw latents over a data set (App. B.2)."""
        self.shift.copy_(mean)
        self.scale.copy_(1.0 / std)
