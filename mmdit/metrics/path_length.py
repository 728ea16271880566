"""The length of an image's sampling path from noise to data (Table 6).

Straighter paths need fewer steps; larger models have shorter paths (Sec. 5.3).
"""

import torch
from torch import Tensor

from mmdit.dtypes import wide
from mmdit.flow.guidance import Guidance, GuidedPair
from mmdit.flow.solvers import VelocityFunction


class MeasuredVelocity:
    """A velocity that measures the length of the path, sum of ||v(z_i, t_i)|| (t_i - t_i+1).

    The norm is over an image's latent. Only evaluations at times of the grid count, not a solver's
    intermediate ones; of several at one time the last counts, from which the next step starts.

    Args:
        velocity: the velocity.
        grid: the solver's decreasing times, (n + 1,).
    """

    def __init__(self, velocity: VelocityFunction, grid: Tensor) -> None:
        self.velocity = velocity
        self._steps = dict(zip(grid[:-1].tolist(), (grid[:-1] - grid[1:]).tolist(), strict=True))
        self._lengths: dict[float, Tensor] = {}

    def __call__(self, z: Tensor, t: float) -> Tensor:
        """The velocity itself, unchanged."""
        v = self.velocity(z, t)
        if t in self._steps:
            self._lengths[t] = self._steps[t] * wide(v).flatten(1).norm(dim=1)
        return v

    def lengths(self) -> Tensor:
        """The length of each image's path, (b,).

        Raises:
            ValueError: sampling has not reached the end of the grid.
        """
        if missing := len(self._steps) - len(self._lengths):
            raise ValueError(f"{missing} of {len(self._steps)} steps were not made")
        return torch.stack(list(self._lengths.values())).sum(dim=0)


class MeasuredGuidance(Guidance):
    """A guidance that measures the path of every image, and samples exactly as `inner` does.

    Args:
        inner: the guidance to measure.
    """

    def __init__(self, *, inner: Guidance) -> None:
        self.inner = inner
        self._followed: list[MeasuredVelocity] = []

    @property
    def reads_negative(self) -> bool:
        return self.inner.reads_negative

    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        velocity = MeasuredVelocity(self.inner.guided(pair, grid, steps), grid)
        self._followed.append(velocity)
        return velocity

    def lengths(self) -> Tensor:
        """The path lengths of all images sampled so far, in order, (n,), on the CPU."""
        return torch.cat([velocity.lengths().cpu() for velocity in self._followed])
