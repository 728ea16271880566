"""Solvers of dz/dt = v(z, t): stateless functions over a falling grid of times.

`velocity(z, t)` takes z (b, ...) and a float t, the noise level of the straight path
(`Objective.velocity` brings every formulation there); the grid runs from noise (1) to data (0).
`progress`, if given, is called after each step as `progress(i, t, z)`: the number of
the step, from 0, the time and the state, which it may look at and must leave as it is.
"""

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.keys import generator_for

VelocityFunction = Callable[[Tensor, float], Tensor]
Progress = Callable[[int, float, Tensor], object]
Solver = Callable[[VelocityFunction, Tensor, Tensor, Progress | None], Tensor]


def euler(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """First order, one evaluation a step; exact on straight paths."""
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        z = z + (t_next - t) * velocity(z, t)
        if progress is not None:
            progress(i, t_next, z)
    return z


def heun(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Second order (trapezoid), two evaluations a step, one in the last."""
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        v = velocity(z, t)
        guess = z + (t_next - t) * v
        # The network is not trained at t = 0, where all noise is gone: Euler ends the path.
        z = guess if t_next == 0 else z + (t_next - t) * (v + velocity(guess, t_next)) / 2
        if progress is not None:
            progress(i, t_next, z)
    return z


def midpoint(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Second order, two evaluations a step, at its start and at its middle."""
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        middle = (t + t_next) / 2
        half = z + (middle - t) * velocity(z, t)
        z = z + (t_next - t) * velocity(half, middle)
        if progress is not None:
            progress(i, t_next, z)
    return z


def dpmpp_2m(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022) with the clock -log t, as SD3's published sampler runs it.

    Second order, one evaluation a step, on the straight path. -log t is half the log-SNR of a path
    that keeps a_t = 1; `dpmpp_2m_log_snr` takes that of the straight one.
    """
    return _two_step(velocity, z, grid, -grid.log(), progress)


def dpmpp_2m_log_snr(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022) with its own clock, half the log-SNR: log((1 - t) / t).

    Second order, one evaluation a step, on the straight path; the flow form of diffusers.
    """
    return _two_step(velocity, z, grid, -grid.logit(), progress)


def euler_ancestral(
    velocity: VelocityFunction,
    z: Tensor,
    grid: Tensor,
    progress: Progress | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """Euler's method with fresh noise: part of the old noise is replaced at every step.

    At eta = 1 ancestral sampling, the posterior of the diffusion (Ho et al. 2020, Sec. 3.2), at 0
    `euler` (Song et al. 2021, Eq. 16). First order, one evaluation a step. The noise is keyed by
    the latent that an image starts from: it depends neither on the batch nor on the device.

    Raises:
        UserError: eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"euler_ancestral: eta {eta} must lie in [0, 1]")
    keys = [hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for x in z.float()]
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        v = velocity(z, t)
        x_0, epsilon = z - t * v, z + (1 - t) * v
        # Ratio of the noise-to-data ratios after and before; 0 when all was noise.
        ratio = t_next * (1 - t) / (t * (1 - t_next))
        fresh = eta * t_next * math.sqrt(1 - ratio**2)
        z = (1 - t_next) * x_0 + math.sqrt(t_next**2 - fresh**2) * epsilon
        if fresh > 0:
            shape = x_0.shape[1:]
            noise = [torch.randn(shape, generator=generator_for(key, "fresh", i)) for key in keys]
            z = z + fresh * torch.stack(noise).to(z)
        if progress is not None:
            progress(i, t_next, z)
    return z


def _two_step(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, clock: Tensor, progress: Progress | None
) -> Tensor:
    """Follow x_0, read from the velocity and extrapolated half a step along a rising clock.

    Were x_0 constant over a step, z would reach (t_next/t) z + (1 - t_next/t) x_0 exactly.
    """
    before, h_before = z, math.inf
    ticks = clock.diff().tolist()
    steps = zip(pairwise(grid.tolist()), ticks, strict=True)
    for i, ((t, t_next), h) in enumerate(steps):
        x_0 = z - t * velocity(z, t)
        # Euler where there is no slope: in the first step, and where the clock runs to infinity.
        known = math.isfinite(h) and math.isfinite(h_before)
        guess = x_0 + h / (2 * h_before) * (x_0 - before) if known else x_0
        z = t_next / t * z + (1 - t_next / t) * guess
        before, h_before = x_0, h
        if progress is not None:
            progress(i, t_next, z)
    return z
