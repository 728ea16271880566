"""Solvers of dz/dt = v(z, t): stateless functions over a falling grid of times.

`velocity(z, t)` takes z (b, ...) and a float t; the grid runs from noise (1) to data (0).
`progress`, when given, is called after each step.
"""

from collections.abc import Callable

from torch import Tensor

VelocityFunction = Callable[[Tensor, float], Tensor]
Progress = Callable[[], object]


def euler(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """First order, one evaluation a step; exact on straight paths."""
    for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        z = z + (t_next - t) * velocity(z, t)
        if progress is not None:
            progress()
    return z


def heun(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Second order (trapezoid), two evaluations a step, one in the last."""
    for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        v = velocity(z, t)
        guess = z + (t_next - t) * v
        # At t = 0 there is no noise left and the network was never trained: Euler ends the path.
        z = guess if t_next == 0 else z + (t_next - t) * (v + velocity(guess, t_next)) / 2
        if progress is not None:
            progress()
    return z


def midpoint(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Second order, two evaluations a step, at its start and at its middle."""
    for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        middle = (t + t_next) / 2
        half = z + (middle - t) * velocity(z, t)
        z = z + (t_next - t) * velocity(half, middle)
        if progress is not None:
            progress()
    return z
