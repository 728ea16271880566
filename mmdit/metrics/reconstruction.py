"""Reconstruction metrics of autoencoders: PSNR and SSIM."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmdit.dtypes import wide
from mmdit.errors import UserError

WINDOW, SIGMA = 11, 1.5  # pixels: side and standard deviation of the window of SSIM
K1, K2 = 0.01, 0.03


def psnr(images: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over a batch of uint8 images; infinite if equal."""
    error = (wide(images) - wide(truth)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(images: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, Eq. 13); at most 1, reached by equal images.

    An 11 x 11 Gaussian window takes all positions inside the image. The value is the mean over
    positions, channels (the paper uses luminance alone) and the batch. Images are not downscaled.

    Args:
        images, truth: uint8 (b, h, w, c).

    Raises:
        UserError: the shapes differ, or images are smaller than the window.
    """
    if images.shape != truth.shape:
        raise UserError(f"images {tuple(images.shape)} must have the shape {tuple(truth.shape)}")
    if images.ndim != 4 or min(images.shape[1:3]) < WINDOW:
        raise UserError(
            f"images {tuple(images.shape)} must be (b, h, w, c), at least {WINDOW} pixels a side"
        )
    x, y = (rearrange(batch.double(), "b h w c -> (b c) 1 h w") for batch in (images, truth))
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean().item()


def _windowed(images: Tensor) -> Tensor:
    """Windowed means, one axis after the other: (n, 1, h, w) to (n, 1, h - 10, w - 10)."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    rows = F.conv2d(images, weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))
