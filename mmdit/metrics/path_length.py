"""How far a picture travels from noise to data: the length of its path (Table 6).

The straighter the paths, the fewer steps follow them; larger models have shorter ones (Sec. 5.3).
"""

import torch
from torch import Tensor

from mmdit.dtypes import wide
from mmdit.flow.guidance import Guidance, Sides
from mmdit.flow.solvers import VelocityFunction


class MeasuredVelocity:
    """A velocity that adds up the path it is followed along: sum of ||v(z_i, t_i)|| (t_i - t_i+1).

    The norm is that of all values of a picture's latent. Only the steps of the grid count, not what
    a solver asks between them, and of several questions at one time the last: the one from which
    the next step starts, where a guess was tried before.

    Args:
        velocity: what is followed.
        grid: the falling times of the solver, (n + 1,).
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
        """Of each picture's path, (b,).

        Raises:
            ValueError: it has not been followed along the whole grid.
        """
        if missing := len(self._steps) - len(self._lengths):
            raise ValueError(f"{missing} of {len(self._steps)} steps were not made")
        return torch.stack(list(self._lengths.values())).sum(dim=0)


class MeasuredGuidance(Guidance):
    """A guidance whose every picture's path is measured; it paints what `inner` does.

    Args:
        inner: the guidance that is followed.
    """

    def __init__(self, *, inner: Guidance) -> None:
        self.inner = inner
        self._followed: list[MeasuredVelocity] = []

    @property
    def reads_negative(self) -> bool:
        return self.inner.reads_negative

    def guided(self, sides: Sides, grid: Tensor, steps: int) -> VelocityFunction:
        velocity = MeasuredVelocity(self.inner.guided(sides, grid, steps), grid)
        self._followed.append(velocity)
        return velocity

    def lengths(self) -> Tensor:
        """Of the paths of all pictures painted so far, in their order, (n,), on the CPU."""
        return torch.cat([velocity.lengths().cpu() for velocity in self._followed])
