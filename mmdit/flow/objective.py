"""The training loss (Eq. 12): the only code that draws t, forms z_t and computes the error."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.dtypes import at_least_float32, wide
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.grids import Grid, UniformGrid
from mmdit.flow.paths import Path, like
from mmdit.flow.predictions import Prediction
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import TimestepDensity
from mmdit.registry import register

Model = Callable[..., Tensor]  # (z_t, t, c_vec, c_ctxt, **extra), as `Condition` has them


class Draw(NamedTuple):
    """The random numbers of a training batch."""

    t: Tensor  # (b,)
    epsilon: Tensor  # (b, c, h, w)


@register
class Objective:
    """A formulation: path x timestep density x prediction, for training and for sampling.

    Args:
        path: interpolation between data and noise.
        timesteps: density from which t is drawn in training.
        prediction: what the network outputs.
        shift: shift of the noise level with resolution, in training and in sampling.
        grid: the default noise levels of sampling; None for `UniformGrid`.

    Raises:
        UserError: the prediction is not defined on this path.
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
        """t ~ pi(t), shifted, and epsilon ~ N(0, I), both float32.

        Args:
            shape: the shape (c, h, w) of one sample.
            generators: one per sample, so that a draw does not depend on the batch.
        """
        t = self.draw_times(generators)
        epsilon = torch.stack(
            [torch.randn(*shape, generator=generator) for generator in generators]
        )
        return Draw(t, epsilon)

    def draw_times(self, generators: Sequence[torch.Generator]) -> Tensor:
        """t ~ pi(t), shifted: float32 (b,), one for each generator."""
        t = torch.cat([self.timesteps.sample(1, generator) for generator in generators])
        # Noise levels are shifted, not t, so that lambda moves by the same amount on every path.
        return self.path.time_at(self.shift(self.path.straight(t.double()))).float()

    def __call__(self, model: Model, x_0: Tensor, condition: Condition, draw: Draw) -> Tensor:
        """The mean of (model(z_t, t) - target)^2 over the values of each sample.

        Args:
            model: the network.
            x_0: normalized latents (b, c, h, w).
            condition: the conditioning of the batch.
            draw: t and epsilon for the batch, from `draw`.

        Returns:
            Losses (b,), at least float32.
        """
        output = self.predict(model, x_0, condition, draw)
        return squared_error(output, self.target(x_0, draw))

    def predict(self, model: Model, x_0: Tensor, condition: Condition, draw: Draw) -> Tensor:
        """The model's output for z_t (b, c, h, w); arguments as in `__call__`."""
        t = draw.t.to(torch.promote_types(draw.t.dtype, x_0.dtype))  # float64 stays on the path
        z_t = self.path.interpolate(x_0, draw.epsilon, t)
        c_vec, c_ctxt, extra = condition
        output: Tensor = model(*self.prediction.inputs(self.path, z_t, t), c_vec, c_ctxt, **extra)
        return output

    def target(self, x_0: Tensor, draw: Draw) -> Tensor:
        """What the model is to predict for z_t (b, c, h, w); arguments as in `__call__`."""
        t = draw.t.to(torch.promote_types(draw.t.dtype, x_0.dtype))
        return self.prediction.target(self.path, x_0, draw.epsilon, t)

    def error_of_data(self, t: Tensor) -> Tensor:
        """Error of the predicted x_0 for an error of 1 of the output at times t, (b,); t itself
        for rectified flow.
        """
        return (self.path.b(t) / self.prediction.determinant(self.path, t)).abs()

    def density(self, t: Tensor) -> Tensor:
        """Density of the times that `draw` returns, after the shift; integrates to 1 over (0, 1).

        On a path that still contains signal at t = 1, a shift to more noise moves some times
        beyond its end. They are clamped to t = 1, and the integral lacks their share.
        """
        path = self.path
        unshifted = self.shift.inverse(path.straight(t))
        drawn = path.time_at(unshifted)
        # The shift translates lambda, so pi(t) / |lambda'_t|, the density of lambda, is preserved.
        density = self.timesteps.pdf(drawn).to(t) * path.d_log_snr(t) / path.d_log_snr(drawn)
        # A shift to less noise moves the end of the path, too: no t beyond it is drawn.
        return density * (unshifted <= path.straight(torch.ones_like(t)))

    def weight(self, t: Tensor) -> Tensor:
        """w_t, the effective weight of noise levels in Eq. 12, including the density (Sec. 2)."""
        path = self.path
        per_error = (self.prediction.determinant(path, t) / path.a(t)).square()
        return -2.0 * self.density(t) * per_error / path.d_log_snr(t)

    def times(self, steps: int, *, strength: float = 1.0, grid: Grid | None = None) -> Tensor:
        """Decreasing noise levels sigma of the straight path for sampling, down to 0: float64.

        Args:
            steps: number of steps from pure noise, at least 1.
            strength: in [0, 1]; the share of the steps that is taken, see `Grid.remaining`.
            grid: replaces the formulation's own.

        Raises:
            UserError: fewer than one step, `strength` outside [0, 1], or x_0 cannot be recovered
                from the network's output at the first noise level.
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
                f"{type(self.prediction).__name__} on {type(path).__name__} does not determine the "
                f"data at sigma = {sigma.item():g}, where {type(grid).__name__} starts: choose a "
                "grid or a path that starts below 1, or another prediction"
            )

    def velocity(
        self, model: Model, z: Tensor, sigma: float | Tensor, condition: Condition
    ) -> Tensor:
        """dz/dsigma = epsilon - x_0 on the straight path, z = (1 - sigma) x_0 + sigma epsilon.

        The network is evaluated on the path in training, at the same noise level. Integrated with
        Euler's method, this is DDIM for every path.

        Args:
            model: the network.
            z: state (b, c, h, w) on the straight path.
            sigma: noise level in (0, 1], one for all or one for each, (b,).
            condition: the conditioning of the batch.

        Returns:
            (b, c, h, w), in the wider dtype of z and the network's output, at least float32.
        """
        path = self.path
        levels = sigma if isinstance(sigma, Tensor) else torch.tensor([sigma], dtype=torch.float64)
        t = path.time_at(levels)
        z_t = like(path.a(t) + path.b(t), z) * z
        scaled, time = self.prediction.inputs(path, z_t, t)
        # In bfloat16, half of the timesteps would coincide before the network embeds them.
        precise = at_least_float32(z.dtype)
        time = time.to(z.device, precise).expand(len(z))
        c_vec, c_ctxt, extra = condition
        output = wide(model(scaled, time, c_vec, c_ctxt, **extra))
        return self.prediction.straight_velocity(path, output, z_t, t)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean of (output - target)^2 over the values of each sample, (b,), at least float32."""
    return (wide(output) - wide(target)).square().flatten(1).mean(1)
