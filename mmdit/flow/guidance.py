"""Guidance: wrappers that turn a conditional velocity into the one that is integrated."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.flow.condition import Condition, ConditionalVelocity, LayeredVelocity
from mmdit.flow.solvers import VelocityFunction
from mmdit.registry import register


class Guidance(ABC):
    """A way to strengthen the condition."""

    @abstractmethod
    def __call__(
        self,
        velocity: LayeredVelocity,
        positive: Condition,
        negative: Condition,
        grid: Tensor,
        steps: int,
    ) -> VelocityFunction:
        """The velocity to integrate, float32, a function of z and t alone.

        Args:
            velocity: of the network, for a condition.
            positive, negative: what to move towards, and away from.
            grid: the falling times that the solver will follow, (n + 1,).
            steps: of a whole grid; n unless the picture starts half-way.
        """


@register
class ClassifierFreeGuidance(Guidance):
    """v = v_uncond + w (v_cond - v_uncond) (Ho & Salimans 2022).

    Args:
        scale: w. 1 is no guidance, and then the unconditional half is not computed.
    """

    def __init__(self, *, scale: float = 4.5) -> None:
        self.scale = scale

    def __call__(
        self,
        velocity: ConditionalVelocity,
        positive: Condition,
        negative: Condition,
        grid: Tensor,
        steps: int,
    ) -> VelocityFunction:
        sides = _sides(velocity, positive, negative, self.scale)

        def guided(z: Tensor, t: float) -> Tensor:
            cond, uncond = sides(z, t)
            return uncond + self.scale * (cond - uncond)

        return guided


@register
class SkipLayerGuidance(Guidance):
    """Classifier-free guidance, early on also away from a network that lacks some blocks.

    v = v_uncond + w (v_cond - v_uncond) + s (v_cond - v_skipped), the last term only while step i
    of the solver has start * steps < i < end * steps, as in the reference: i counts from 0, also
    where a picture starts half-way. The window is one of times: t belongs to the step that begins
    at or before it, so that solvers may evaluate between the points of the grid.

    Args:
        scale: w, as in `ClassifierFreeGuidance`.
        skip_scale: s.
        layers: blocks that the weaker network lacks.
        start, end: of the window, as fractions of the steps.

    Raises:
        UserError: no layers, or a window outside [0, 1].
    """

    def __init__(
        self,
        *,
        scale: float = 4.0,
        skip_scale: float = 2.5,
        layers: Sequence[int] = (7, 8, 9),
        start: float = 0.01,
        end: float = 0.2,
    ) -> None:
        if isinstance(layers, int) or not layers:
            raise UserError(f"SkipLayerGuidance: layers {layers} must be a list like [7, 8, 9]")
        if not 0.0 <= start <= end <= 1.0:
            raise UserError(
                f"SkipLayerGuidance: start {start} and end {end} must be fractions of the steps, "
                "0 <= start <= end <= 1"
            )
        self.scale, self.skip_scale, self.layers = scale, skip_scale, tuple(layers)
        self.start, self.end = start, end

    def __call__(
        self,
        velocity: LayeredVelocity,
        positive: Condition,
        negative: Condition,
        grid: Tensor,
        steps: int,
    ) -> VelocityFunction:
        sides = _sides(velocity, positive, negative, self.scale)
        skipped = velocity.skipping(self.layers)
        windows = [
            (t_next, t)
            for i, (t, t_next) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))
            if self.start * steps < i < self.end * steps
        ]

        def guided(z: Tensor, t: float) -> Tensor:
            cond, uncond = sides(z, t)
            v = uncond + self.scale * (cond - uncond)
            if any(low < t <= high for low, high in windows):
                v = v + self.skip_scale * (cond - skipped(z, t, positive).float())
            return v

        return guided


def _sides(
    velocity: ConditionalVelocity, positive: Condition, negative: Condition, scale: float
) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """(z, t) -> conditional and unconditional velocity, float32, from one batch of both.

    At scale 1 the unconditional one cancels: it is not computed, the other stands in for it.
    """
    if scale == 1.0:

        def one(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
            cond = velocity(z, t, positive).float()
            return cond, cond

        return one

    both = Condition(
        torch.cat([positive.c_vec, negative.c_vec]),
        torch.cat([positive.c_ctxt, negative.c_ctxt]),
    )

    def two(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        cond, uncond = velocity(torch.cat([z, z]), t, both).float().chunk(2)
        return cond, uncond

    return two
