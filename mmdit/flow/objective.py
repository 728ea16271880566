"""The training loss (Eq. 12): the one place that draws t, forms z_t and compares."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.flow.paths import Path
from mmdit.flow.predictions import Prediction
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import TimestepDensity
from mmdit.registry import register

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Draw(NamedTuple):
    """What chance decides about a batch."""

    t: Tensor  # (b,)
    epsilon: Tensor  # (b, c, h, w)


@register
class Objective:
    """Denoising loss of a formulation: path x timestep density x prediction.

    Args:
        path: how data becomes noise.
        timesteps: density from which t is drawn.
        prediction: what the network outputs.
        shift: of t with resolution; the sampler uses the same object.
    """

    def __init__(
        self, *, path: Path, timesteps: TimestepDensity, prediction: Prediction, shift: Shift
    ) -> None:
        self.path, self.timesteps, self.prediction = path, timesteps, prediction
        self.shift = shift

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Draw:
        """t ~ pi(t), shifted, and epsilon ~ N(0, I): each sample from its own generator."""
        t = torch.cat([self.timesteps.sample(1, generator) for generator in generators])
        epsilon = torch.stack(
            [torch.randn(*shape, generator=generator) for generator in generators]
        )
        return Draw(self.shift(t), epsilon)

    def __call__(
        self, model: Model, x_0: Tensor, c_vec: Tensor, c_ctxt: Tensor, draw: Draw
    ) -> Tensor:
        """E || model(z_t, t) - target ||^2 per sample, averaged over its values.

        Args:
            x_0: normalized latents (b, c, h, w).
            c_vec, c_ctxt: the text (b, p), (b, l, d).

        Returns:
            (b,), float32.
        """
        t, epsilon = draw
        z_t = self.path.interpolate(x_0, epsilon, t)
        target = self.prediction.target(self.path, x_0, epsilon, t)
        output = model(z_t, t, c_vec, c_ctxt)
        return (output.float() - target.float()).square().flatten(1).mean(1)
