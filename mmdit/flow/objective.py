"""The training loss (Eq. 12): the one place that draws t, forms z_t and compares."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.dtypes import at_least_float32, wide
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.grids import Grid, UniformGrid
from mmdit.flow.paths import Path
from mmdit.flow.predictions import Prediction
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import TimestepDensity
from mmdit.registry import register

Model = Callable[..., Tensor]  # (z_t, t, c_vec, c_ctxt, **extra), as `Condition` has them


class Draw(NamedTuple):
    """What chance decides about a batch."""

    t: Tensor  # (b,)
    epsilon: Tensor  # (b, c, h, w)


@register
class Objective:
    """A formulation: path x timestep density x prediction, for training and for sampling.

    Args:
        path: how data becomes noise.
        timesteps: density from which t is drawn.
        prediction: what the network outputs.
        shift: of the noise level with resolution; the sampler uses the same object.
        grid: where the sampler stops by default.

    Raises:
        UserError: the prediction is not made for this path.
    """

    LEAST_DETERMINANT = 1e-6  # relative to a_t + b_t; float32 keeps seven digits

    def __init__(
        self,
        *,
        path: Path,
        timesteps: TimestepDensity,
        prediction: Prediction,
        shift: Shift,
        grid: Grid | None = None,
    ) -> None:
        self.path, self.timesteps, self.prediction = path, timesteps, prediction
        if lacks := prediction.misfit(path):
            names = type(prediction).__name__, type(path).__name__
            raise UserError(f"{names[0]} does not fit {names[1]}, which lacks {lacks}")
        self.shift = shift
        self.grid = UniformGrid() if grid is None else grid

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Draw:
        """t ~ pi(t), shifted, and epsilon ~ N(0, I): each sample from its own generator."""
        t = torch.cat([self.timesteps.sample(1, generator) for generator in generators])
        epsilon = torch.stack(
            [torch.randn(*shape, generator=generator) for generator in generators]
        )
        # The shift is one of noise levels: on every path it moves lambda by the same amount.
        shifted = self.path.time_at(self.shift(self.path.straight(t.double())))
        return Draw(shifted.float(), epsilon)

    def __call__(self, model: Model, x_0: Tensor, condition: Condition, draw: Draw) -> Tensor:
        """E || model(z_t, t) - target ||^2 per sample, averaged over its values.

        Args:
            x_0: normalized latents (b, c, h, w).
            condition: the text, and what else the network reads, of each sample.

        Returns:
            (b,), in no less than float32.
        """
        t, epsilon = draw
        t = t.to(torch.promote_types(t.dtype, x_0.dtype))  # so that float64 stays on the path
        z_t = self.path.interpolate(x_0, epsilon, t)
        target = self.prediction.target(self.path, x_0, epsilon, t)
        c_vec, c_ctxt, extra = condition
        output = model(*self.prediction.inputs(self.path, z_t, t), c_vec, c_ctxt, **extra)
        return (wide(output) - wide(target)).square().flatten(1).mean(1)

    def density(self, t: Tensor) -> Tensor:
        """pi(t) of the times that `draw` gives, after the shift; integrates to one over (0, 1).

        On a path that ends before all is noise, a shift to more noise gathers at t = 1 what it
        moves beyond that end; this share is missing from the integral.
        """
        path = self.path
        unshifted = self.shift.inverse(path.straight(t))
        drawn = path.time_at(unshifted)
        # The shift moves lambda as a whole, so pi(t) / |lambda'_t| is carried along.
        density = self.timesteps.pdf(drawn).to(t) * path.d_log_snr(t) / path.d_log_snr(drawn)
        # A shift to less noise leaves none beyond where the end of the path has moved to.
        return density * (unshifted <= path.straight(torch.ones_like(t)))

    def weight(self, t: Tensor) -> Tensor:
        """w_t, the effective weight of the noise level in Eq. 12, density included (Sec. 2)."""
        path = self.path
        per_error = (self.prediction.determinant(path, t) / path.a(t)).square()
        return -2.0 * self.density(t) * per_error / path.d_log_snr(t)

    def times(self, steps: int, *, strength: float = 1.0, grid: Grid | None = None) -> Tensor:
        """Noise levels sigma of the straight path for `velocity`, falling to 0: float64.

        Args:
            steps: number of steps from pure noise.
            strength: the part of them that is left to do, from the end; see `Grid.remaining`.
            grid: instead of the formulation's own.

        Raises:
            UserError: fewer than one step, `strength` outside [0, 1], or at the first of them the
                network's output says nothing about the data.
        """
        grid = grid or self.grid
        times = grid.remaining(steps, self.shift, self.path, strength=strength)
        if len(times) > 1:
            self._check_start(times[0], grid)
        return times

    def _check_start(self, sigma: Tensor, grid: Grid) -> None:
        path = self.path
        t = path.time_at(sigma)
        known = self.prediction.determinant(path, t).abs() / (path.a(t) + path.b(t))
        if known < self.LEAST_DETERMINANT:
            raise UserError(
                f"{type(self.prediction).__name__} on {type(path).__name__} says nothing about the "
                f"data at sigma = {sigma.item():g}, where {type(grid).__name__} starts: choose a "
                "grid or a path that starts below 1, or another prediction"
            )

    def velocity(self, model: Model, z: Tensor, sigma: float, condition: Condition) -> Tensor:
        """dz/dsigma = epsilon - x_0 on the straight path, z = (1 - sigma) x_0 + sigma epsilon.

        The network is asked on the path that it was trained on, at the same noise level. Followed
        with Euler's method, this is DDIM, whatever that path is.

        Args:
            z: (b, c, h, w), on the straight path.
            sigma: in (0, 1].

        Returns:
            (b, c, h, w), in the precision of z or of the network, and no less than float32.
        """
        path = self.path
        t = path.time_at(torch.tensor([sigma], dtype=torch.float64))
        z_t = (path.a(t) + path.b(t)).item() * z
        shown, time = self.prediction.inputs(path, z_t, t)
        # Half the timesteps would fall together in bfloat16, before the network embeds them.
        precise = at_least_float32(z.dtype)
        time = time.to(z.device, precise).expand(len(z))
        c_vec, c_ctxt, extra = condition
        output = wide(model(shown, time, c_vec, c_ctxt, **extra))
        return self.prediction.straight_velocity(path, output, z_t, t)
