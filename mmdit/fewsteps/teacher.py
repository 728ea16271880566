"""The frozen model that a student of few steps learns from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.dtypes import wide
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Objective
from mmdit.models.backbone import Backbone


class Teacher:
    """A network that stays as it is, with the guidance that it samples with.

    Args:
        network: predicts velocities on the straight path.
        unconditional: the condition that guidance moves away from, of one sample.
        guidance: scale w of classifier-free guidance; 1 is none.
        opponent: what is trained to tell the student from the teacher by `features`, if anything.
    """

    def __init__(
        self,
        network: Backbone,
        unconditional: Condition,
        guidance: float,
        opponent: nn.Module | None = None,
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.unconditional, self.guidance = unconditional, guidance
        self.opponent = opponent

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

    def features(
        self, objective: Objective, z: Tensor, t: Tensor, condition: Condition
    ) -> tuple[list[Tensor], Tensor, int]:
        """What the network makes of z on its way; gradients flow to z, not to its weights.

        Args:
            objective: what the network was trained with.
            z: latents on the straight path (b, c, h, w).
            t: their noise levels (b,).
            condition: of the batch.

        Returns:
            Image tokens (b, n, d) after each block, the embedding y of timestep and pooled text
            (b, d), and the rows of the grid of tokens.
        """
        with watched(self.network) as (tokens, vectors):
            objective.velocity(self.network, z, t, condition)
        return tokens, vectors[-1], z.shape[-2] // self.network.patch_size


@contextmanager
def watched(network: Backbone) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The block within which the image tokens and the vector y of each layer are kept."""
    tokens, vectors = list[Tensor](), list[Tensor]()

    def keep(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tokens.append(output[-1] if isinstance(output, tuple) else output)  # the image comes last
        vectors.append(inputs[-1])

    handles = [layer.register_forward_hook(keep) for layer in network.layers]
    try:
        yield tokens, vectors
    finally:
        for handle in handles:
            handle.remove()
