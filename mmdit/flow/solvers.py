"""Solvers of dz/dt = v(z, t): stateless functions of a decreasing grid of times.

`velocity(z, t)` takes z (b, ...) and a float t, the noise level of the straight path, to which
`Objective.velocity` converts every formulation; the grid runs from noise (1) to data (0).
`progress`, if given, is called after each step as `progress(i, t, z)` with the index of the step,
from 0, the new time, and the new state, which it must not modify.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmdit.checks import expect, listed, whole_number
from mmdit.errors import UserError
from mmdit.flow.transitions import Ancestral, Trajectory, Transition, log_prob, sample
from mmdit.keys import generator_for

VelocityFunction = Callable[[Tensor, float], Tensor]
Progress = Callable[[int, float, Tensor], object]
Solver = Callable[[VelocityFunction, Tensor, Tensor, Progress | None], Tensor]


def euler(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Euler's method: first order, one evaluation per step; exact on straight trajectories."""
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        z = z + (t_next - t) * velocity(z, t)
        if progress is not None:
            progress(i, t_next, z)
    return z


def heun(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Heun's method: second order (trapezoidal), two evaluations per step, one in the last."""
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        v = velocity(z, t)
        guess = z + (t_next - t) * v
        # The network is not trained at t = 0, without noise, so the last step is Euler's.
        z = guess if t_next == 0 else z + (t_next - t) * (v + velocity(guess, t_next)) / 2
        if progress is not None:
            progress(i, t_next, z)
    return z


def midpoint(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """Midpoint method: second order, two evaluations per step, at its start and at its middle."""
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
    """DPM-Solver++(2M) (Lu et al. 2022) with the clock -log t, as in SD3's published sampler.

    Second order, one evaluation per step, on the straight path. -log t is half the log-SNR of a
    path with a_t = 1; `dpmpp_2m_log_snr` uses that of the straight path.
    """
    return _two_step(velocity, z, grid, -grid.log(), progress)


def dpmpp_2m_log_snr(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022) with its own clock, half the log-SNR: log((1 - t) / t).

    Second order, one evaluation per step, on the straight path, as in diffusers for flow models.
    """
    return _two_step(velocity, z, grid, -grid.logit(), progress)


def stochastic(
    velocity: VelocityFunction,
    z: Tensor,
    grid: Tensor,
    progress: Progress | None = None,
    *,
    transition: Transition,
    window: Sequence[int] | None = None,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """Steps drawn at random from a transition, first order, one evaluation per step.

    Fresh noise is keyed by an image's initial latent, so it depends neither on the batch nor on the
    device.

    Example:
        trajectory = Trajectory()
        solver = functools.partial(stochastic, transition=FlowSDE(), trajectory=trajectory)
        latents = pipe.denoise(z, times, condition, guidance=guidance, solver=solver).latents
        first, second = trajectory.states[:2]
        trajectory.log_probs[0]  # log-probability of the step from first to second, (b,)

    Args:
        transition: distribution of a step, from `mmdit.flow.transitions`.
        window: first and last of the random steps, counted from 0; the others are Euler's, as in
            MixGRPO and the fast form of Flow-GRPO. None is all steps.
        trajectory: receives all states, and the log-probabilities of the random steps.

    Raises:
        UserError: the window does not lie inside the grid.
    """
    steps = len(grid) - 1
    first, last = (0, steps - 1) if window is None else _window(window, steps)
    keys = [hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for x in z.detach().float()]
    if trajectory is not None:
        trajectory.states, trajectory.log_probs = [z], {}
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        v = velocity(z, t)
        if first <= i <= last:
            times = (torch.full((len(z),), u, dtype=torch.float64) for u in (t, t_next))
            mean, std = transition.moments(v, z, *times)
            random = bool((std > 0).all())
            z = sample(mean, std, _fresh_noise(keys, i, mean)) if random else mean
            if random and trajectory is not None:
                trajectory.log_probs[i] = log_prob(z, mean, std)
        else:
            z = z + (t_next - t) * v
        if trajectory is not None:
            trajectory.states.append(z)
        if progress is not None:
            progress(i, t_next, z)
    return z


def _window(window: Sequence[int], steps: int) -> tuple[int, int]:
    """The first and last step of a window, checked."""
    listed("window", window)
    expect(
        len(window) == 2, "window", [*window], "must be two numbers, the first and the last step"
    )
    first = whole_number("window[0]", window[0], 0, steps - 1)
    return first, whole_number("window[1]", window[1], first, steps - 1)


def _fresh_noise(keys: Sequence[str], step: int, like: Tensor) -> Tensor:
    """Noise (b, ...) of a step, each sample's from its own key."""
    shape = like.shape[1:]
    draws = [torch.randn(shape, generator=generator_for(key, "fresh", step)) for key in keys]
    return torch.stack(draws).to(like)


def euler_ancestral(
    velocity: VelocityFunction,
    z: Tensor,
    grid: Tensor,
    progress: Progress | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """Euler's method with fresh noise: part of the noise is replaced at every step.

    `stochastic` with the transition `Ancestral`.

    Args:
        eta: in [0, 1]; scales the standard deviation of the fresh noise. 0 is `euler`.

    Raises:
        UserError: eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"euler_ancestral: eta {eta} must lie in [0, 1]")
    return stochastic(velocity, z, grid, progress, transition=Ancestral(eta=eta))


def _two_step(
    velocity: VelocityFunction, z: Tensor, grid: Tensor, clock: Tensor, progress: Progress | None
) -> Tensor:
    """Two-step method: extrapolates the predicted x_0 half a step along an increasing clock.

    If x_0 is constant over a step, z becomes exactly (t_next/t) z + (1 - t_next/t) x_0.
    """
    before, h_before = z, math.inf
    ticks = clock.diff().tolist()
    steps = zip(pairwise(grid.tolist()), ticks, strict=True)
    for i, ((t, t_next), h) in enumerate(steps):
        x_0 = z - t * velocity(z, t)
        # Euler where the slope is unknown: in the first step, and where the clock is infinite.
        known = math.isfinite(h) and math.isfinite(h_before)
        guess = x_0 + h / (2 * h_before) * (x_0 - before) if known else x_0
        z = t_next / t * z + (1 - t_next / t) * guess
        before, h_before = x_0, h
        if progress is not None:
            progress(i, t_next, z)
    return z
