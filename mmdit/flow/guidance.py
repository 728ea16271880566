"""Guidance: wrappers that turn a conditional velocity into the one that is integrated."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.flow.solvers import VelocityFunction
from mmdit.registry import register


class Condition(NamedTuple):
    """What the network is told: pooled text and text tokens."""

    c_vec: Tensor  # (b, p)
    c_ctxt: Tensor  # (b, l, d)


# (z, t, condition) -> velocity
ConditionalVelocity = Callable[[Tensor, float, Condition], Tensor]


@register
class ClassifierFreeGuidance:
    """v = v_uncond + w (v_cond - v_uncond) (Ho & Salimans 2022), in float32.

    Args:
        scale: w. 1 is no guidance, and then the unconditional half is not computed.
    """

    def __init__(self, *, scale: float = 4.5) -> None:
        self.scale = scale

    def __call__(
        self, velocity: ConditionalVelocity, positive: Condition, negative: Condition
    ) -> VelocityFunction:
        if self.scale == 1.0:
            return lambda z, t: velocity(z, t, positive).float()
        both = Condition(
            torch.cat([positive.c_vec, negative.c_vec]),
            torch.cat([positive.c_ctxt, negative.c_ctxt]),
        )

        def guided(z: Tensor, t: float) -> Tensor:
            cond, uncond = velocity(torch.cat([z, z]), t, both).float().chunk(2)
            return uncond + self.scale * (cond - uncond)

        return guided
