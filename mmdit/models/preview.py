"""A rough preview of latents of SD3's autoencoder, without decoding them."""

import torch
from torch import Tensor

from mmdit.dtypes import wide
from mmdit.errors import UserError

# Red, green and blue of each of the 16 channels, as published with the reference sampler: a linear
# fit, good enough to watch an image while it is generated.
RGB_OF_CHANNELS = (
    *((-0.0645, 0.0177, 0.1052), (0.0028, 0.0312, 0.0650), (0.1848, 0.0762, 0.0360)),
    *((0.0944, 0.0360, 0.0889), (0.0897, 0.0506, -0.0364), (-0.0020, 0.1203, 0.0284)),
    *((0.0855, 0.0118, 0.0283), (-0.0539, 0.0658, 0.1047), (-0.0057, 0.0116, 0.0700)),
    *((-0.0412, 0.0281, -0.0039), (0.1106, 0.1171, 0.1220), (-0.0248, 0.0682, -0.0481)),
    *((0.0815, 0.0846, 0.1207), (-0.0120, -0.0055, -0.0867), (-0.0749, -0.0634, -0.0456)),
    (-0.1418, -0.1457, -0.1259),
)


def latent_preview(latent: Tensor) -> Tensor:
    """Preview images of an eighth of the size, for the cost of one small product.

    For the published autoencoder only: other autoencoders have other channels.

    Args:
        latent: normalized, (b, 16, h, w).

    Returns:
        uint8 (b, h, w, 3); fractions are cut off, as in the reference.

    Raises:
        UserError: not 16 channels.
    """
    if latent.ndim != 4 or latent.shape[1] != len(RGB_OF_CHANNELS):
        raise UserError(
            f"latent_preview: a latent of shape {tuple(latent.shape)} must be "
            f"(b, {len(RGB_OF_CHANNELS)}, h, w), of SD3's autoencoder"
        )
    latent = wide(latent)
    rgb = torch.einsum("b c h w, c r -> b h w r", latent, latent.new_tensor(RGB_OF_CHANNELS))
    return (((rgb + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
