"""The frozen model that a student of few steps learns from."""

import torch
from torch import Tensor

from mmdit.dtypes import wide
from mmdit.flow.condition import Condition
from mmdit.models.backbone import Backbone


class Teacher:
    """A network that stays as it is, with the guidance that it samples with.

    Args:
        network: predicts velocities on the straight path.
        unconditional: the condition that guidance moves away from, of one sample.
        guidance: scale w of classifier-free guidance; 1 is none.
    """

    def __init__(self, network: Backbone, unconditional: Condition, guidance: float) -> None:
        self.network = network.requires_grad_(False).eval()
        self.unconditional, self.guidance = unconditional, guidance

    @torch.no_grad()
    def velocity(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v = v_uncond + w (v_cond - v_uncond), at least float32.

        Args:
            z: latents (b, c, h, w).
            t: their times (b,).
            condition: of the batch.
        """
        c_vec, c_ctxt, extra = condition
        conditional = wide(self.network(z, t, c_vec, c_ctxt, **extra))
        if self.guidance == 1.0:
            return conditional
        none = self.unconditional.map(lambda part: part.expand(len(z), *part.shape[1:]))
        unconditional = wide(self.network(z, t, none.c_vec, none.c_ctxt, **extra))
        return unconditional + self.guidance * (conditional - unconditional)
