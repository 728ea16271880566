"""An MM-DiT that reads a second latent beside the noised one, for editing and inpainting."""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.checks import at_least_one
from mmdit.errors import UserError
from mmdit.models.backbone import Backbone
from mmdit.models.mmdit import MMDiT
from mmdit.nn.embeddings import PatchEmbedding
from mmdit.registry import build, describe, register


@register
class ConcatMMDiT(MMDiT):
    """An `MMDiT` whose input is the noised latent and another tensor, concatenated channel-wise.

    As InstructPix2Pix reads the image that it edits (Brooks et al. 2023, Sec. 3.2), and inpainting
    models a mask with the image around it. The second tensor is the condition's `extra["image"]`.

    Args: those of `MMDiT`, and
        extra_channels: channels of the second tensor.

    Raises:
        UserError: as for `MMDiT`, or `extra_channels` is not positive.

    Example:
        network = with_extra_channels(pipe.mmdit, 16)  # its outputs are those of before
        v = network(z_t, t, c_vec, c_ctxt, image=pipe.autoencoder.encode(pixels))
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(self, *, extra_channels: int, **own: Any) -> None:
        at_least_one("ConcatMMDiT", extra_channels=extra_channels)
        super().__init__(**own)
        self.extra_channels = extra_channels
        channels = self.latent_channels + extra_channels
        self.patch_embedding = PatchEmbedding(channels, self.width, self.patch_size)
        if not self.positions.is_meta:
            self.reset_parameters()

    def forward(  # type: ignore[override]
        self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor, image: Tensor
    ) -> Tensor:
        """`MMDiT.forward` with a second latent, image (b, extra_channels, h, w)."""
        return super().forward(torch.cat([z_t, image.to(z_t)], dim=1), t, c_vec, c_ctxt)

    def flops(self, *, height: int, width: int, text_length: int) -> int:
        extra = height * width * self.extra_channels * self.width
        return super().flops(height=height, width=width, text_length=text_length) + 2 * extra


def with_extra_channels(model: Backbone, extra_channels: int) -> ConcatMMDiT:
    """Copy a model and let it read a second latent, which it ignores until it is trained.

    The new weights are zeros, so that its outputs are those of before, whatever the second latent.

    Raises:
        UserError: the model is not an `MMDiT`, or reads one already; the count is not positive.
    """
    if type(model) is not MMDiT:
        raise UserError(
            f"extra_channels={extra_channels}: only an MMDiT can be given a second latent, not a "
            f"{type(model).__name__}"
        )
    with torch.device("meta"):
        described = {**describe(model), "class": "ConcatMMDiT", "extra_channels": extra_channels}
        network = cast(ConcatMMDiT, build(described))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "patch_embedding.proj.weight"
    new = network.state_dict()[name].shape[1] - weights[name].shape[1]
    weights[name] = F.pad(weights[name], (0, new))
    network.load_state_dict(weights, assign=True)
    network.compute_dtype = model.compute_dtype
    return network.train(model.training)
