"""CLIP's image tower, for comparing images with prompts (CLIP score, Sec. 5.1)."""

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from mmdit.checks import at_least_one
from mmdit.errors import UserError
from mmdit.models.clip import CLIPLayer, QuickGELU
from mmdit.nn.network import Network
from mmdit.registry import register

# Statistics per channel of the pixels in [0, 1] that CLIP was trained on.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPImageLayer(CLIPLayer):
    """Pre-norm transformer layer in which every patch attends to all others."""

    causal = False


@register
class CLIPImageModel(Network):
    """Image tower of CLIP, a vision transformer; the defaults are ViT-L/14, CLIP-L's.

    Args:
        width, depth, num_heads: of the transformer.
        image_size: side of the square images, in pixels.
        patch_size: side of the square patches, in pixels.
        projection_width: of the space shared with the text tower.

    Raises:
        UserError: `width` or `image_size` is not divisible as required.
    """

    def __init__(
        self,
        *,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        image_size: int = 224,
        patch_size: int = 14,
        projection_width: int = 768,
    ) -> None:
        super().__init__()
        at_least_one("CLIP", width=width, depth=depth, num_heads=num_heads)
        at_least_one("CLIP", image_size=image_size, patch_size=patch_size)
        at_least_one("CLIP", projection_width=projection_width)
        if width % num_heads:
            raise UserError(f"CLIP: width {width} must be divisible by num_heads {num_heads}")
        if image_size % patch_size:
            raise UserError(
                f"CLIP: image_size {image_size} must be divisible by patch_size {patch_size}"
            )
        self.width, self.image_size = width, image_size
        self.projection_width = projection_width
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(
            torch.empty((image_size // patch_size) ** 2 + 1, width)
        )
        self.first_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            CLIPImageLayer(width, num_heads, QuickGELU()) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, projection_width, bias=False)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """`clip_pixels` (b, 3, image_size, image_size) -> (b, projection_width), not normalized.

        Raises:
            UserError: images of another size.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise UserError(
                f"CLIP: images {tuple(images.shape)} must be (b, 3, {self.image_size}, "
                f"{self.image_size}), as `clip_pixels` makes them"
            )
        patches = rearrange(self.patch_embedding(self.cast(images)), "b d h w -> b (h w) d")
        class_token = repeat(self.class_embedding, "d -> b 1 d", b=len(images))
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding
        x = self.first_norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.final_norm(x[:, 0]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """CLIP's initialization (Radford et al. 2021)."""
        nn.init.normal_(self.patch_embedding.weight, std=0.02)
        nn.init.normal_(self.class_embedding, std=self.width**-0.5)
        nn.init.normal_(self.position_embedding, std=self.width**-0.5)
        for layer in self.layers:
            assert isinstance(layer, CLIPImageLayer)
            layer.reset_parameters(len(self.layers))
        self.first_norm.reset_parameters()
        self.final_norm.reset_parameters()
        nn.init.normal_(self.projection.weight, std=self.width**-0.5)


def clip_pixels(pixels: Tensor, size: int = 224) -> Tensor:
    """Resize, crop and normalize images for CLIP's image tower.

    The shorter side is resized to `size` by Pillow's bicubic filter, the middle square cut out,
    and every channel normalized: what CLIP was trained with, and what published scores use.

    Args:
        pixels: uint8 (b, h, w, 3).
        size: `image_size` of the tower.

    Returns:
        float32 (b, 3, size, size), on the device of `pixels`.
    """
    height, width = pixels.shape[1:3]
    shorter = min(height, width)
    resized = (size * width // shorter, size * height // shorter)  # Pillow: width first
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    squares = [
        np.asarray(
            Image.fromarray(image)
            .resize(resized, Image.Resampling.BICUBIC)
            .crop((left, top, left + size, top + size))
        )
        for image in pixels.cpu().numpy()
    ]
    values = torch.from_numpy(np.stack(squares)).to(pixels.device).float() / 255
    mean, std = values.new_tensor(PIXEL_MEAN), values.new_tensor(PIXEL_STD)
    return rearrange((values - mean) / std, "b h w c -> b c h w").contiguous()
