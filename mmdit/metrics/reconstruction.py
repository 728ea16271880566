"""How faithfully an autoencoder gives images back."""

import math

from torch import Tensor


def psnr(images: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over a batch of uint8 images; infinite where equal."""
    error = (images.float() - truth.float()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)
