"""Caches: fewer evaluations of the network while sampling.

A cache wraps the velocity of the network, so every guidance works with it:

    pipe("a cat", cache=FirstBlockCache(threshold=0.1))
    pipe("a cat", cache=TaylorCache(interval=3), guidance=GuidanceInterval(inner=...))

It is a choice of settings and has no state. What is remembered belongs to one call of
`Pipeline.denoise`, so nothing passes from one call, prompt or batch to the next. Each set of
conditions that guidance evaluates together has a memory of its own: the conditional and the
unconditional velocity in one batch, the conditional one alone outside a `GuidanceInterval`, and
that of the network without some blocks. A change from one set to another starts anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mmdit.checks import MOST_STEPS, number, whole_number
from mmdit.errors import UserError
from mmdit.flow.cached_velocity import CacheableVelocity, CachedVelocity, Forecast, Residuals
from mmdit.flow.condition import Condition, ConditionalVelocity
from mmdit.flow.solvers import Solver, dpmpp_2m, dpmpp_2m_log_snr, euler
from mmdit.registry import register

# They evaluate once per step, at the times of the grid, and draw nothing at random.
SOLVERS = (euler, dpmpp_2m, dpmpp_2m_log_snr)
HIGHEST_ORDER = 4


class Cache(ABC):
    """A rule for which evaluations of the network are saved."""

    @abstractmethod
    def cached(self, velocity: CacheableVelocity, grid: Tensor) -> CachedVelocity[Any]:
        """The velocity with an empty memory, for one integration along a grid.

        Args:
            velocity: that of the network.
            grid: the solver's decreasing times, (n + 1,).
        """


@register
class FirstBlockCache(Cache):
    """Evaluates the first block, and the others only where the first one's output has changed.

    The first block is evaluated at every step. Where its residual r, of the image tokens, has
    changed by mean|r - r_full| / mean|r_full| < threshold since the latest evaluation of all
    blocks, what the others added there is reused (as in ParaAttention and diffusers). Every image
    of a batch decides for itself, so that it does not depend on the others. Its conditional and
    unconditional halves decide together, and all blocks are evaluated where one half has changed:
    guidance multiplies their difference, in which the errors of old residuals cancel only if both
    are equally old.

    Args:
        threshold: of the relative change, from 0 (full sampling) to 1. Lower is closer to full
            sampling, higher is faster.
        warmup_steps: solver steps at the beginning in which all blocks are evaluated.
        max_consecutive: number of steps in a row in which the others may be reused; None is any.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.1,
        warmup_steps: int = 0,
        max_consecutive: int | None = None,
    ) -> None:
        self.threshold = number("FirstBlockCache: threshold", threshold, 0.0, 1.0)
        self.warmup_steps = whole_number(
            "FirstBlockCache: warmup_steps", warmup_steps, 0, MOST_STEPS
        )
        if max_consecutive is not None:
            whole_number("FirstBlockCache: max_consecutive", max_consecutive, most=MOST_STEPS)
        self.max_consecutive = max_consecutive

    def cached(self, velocity: CacheableVelocity, grid: Tensor) -> CachedVelocity[Any]:
        return _FirstBlockVelocity(self, velocity, grid)


class _Reusing(NamedTuple):
    """A memory of residuals, and the velocity that uses it."""

    residuals: Residuals
    velocity: ConditionalVelocity


class _FirstBlockVelocity(CachedVelocity[_Reusing]):
    def __init__(self, cache: FirstBlockCache, velocity: CacheableVelocity, grid: Tensor) -> None:
        super().__init__(velocity, grid)
        self.cache = cache

    def skipping(self, layers: Collection[int]) -> Self:
        return type(self)(self.cache, self.velocity.skipping(layers), self.grid)

    def empty(self) -> _Reusing:
        residuals = Residuals(self.cache.threshold, self.cache.max_consecutive)
        return _Reusing(residuals, self.velocity.reusing(residuals))

    def evaluate(
        self, memory: _Reusing, step: int, z_t: Tensor, t: float, condition: Condition
    ) -> Tensor:
        memory.residuals.full = step < self.cache.warmup_steps
        one, other = z_t.tensor_split(2)  # guidance evaluates both conditions of the same latents
        memory.residuals.sides = 2 if torch.equal(one, other) else 1
        return memory.velocity(z_t, t, condition)


@register
class TaylorCache(Cache):
    """Evaluates the network every few steps, and extrapolates its velocity in between.

    TaylorSeer's forecast (Liu et al. 2025) of the velocity as a function of t along the trajectory:
    the polynomial of the given order through the latest evaluations. It is the Taylor polynomial
    whose derivatives are finite differences, in Newton's form, which unlike TaylorSeer's is exact
    for polynomials of its order, and on grids of uneven steps. TaylorSeer forecasts the features of
    each block; here it is the velocity, which costs nothing and needs no access to the network.

    The first order + 1 steps are evaluated, since a polynomial takes as many.

    Args:
        interval: steps from one evaluation to the next; 1 is full sampling.
        order: of the polynomial, 0 to 4. 0 repeats the latest velocity.
        warmup_steps: solver steps at the beginning that are all evaluated.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, *, interval: int = 2, order: int = 1, warmup_steps: int = 0) -> None:
        self.interval = whole_number("TaylorCache: interval", interval, most=MOST_STEPS)
        self.order = whole_number("TaylorCache: order", order, 0, HIGHEST_ORDER)
        self.warmup_steps = whole_number("TaylorCache: warmup_steps", warmup_steps, 0, MOST_STEPS)

    def cached(self, velocity: CacheableVelocity, grid: Tensor) -> CachedVelocity[Any]:
        return _ForecastVelocity(self, velocity, grid)


class _ForecastVelocity(CachedVelocity[Forecast]):
    def __init__(self, cache: TaylorCache, velocity: CacheableVelocity, grid: Tensor) -> None:
        super().__init__(velocity, grid)
        self.cache = cache

    def skipping(self, layers: Collection[int]) -> Self:
        return type(self)(self.cache, self.velocity.skipping(layers), self.grid)

    def empty(self) -> Forecast:
        return Forecast(self.cache.order)

    def evaluate(
        self, memory: Forecast, step: int, z_t: Tensor, t: float, condition: Condition
    ) -> Tensor:
        due = step < self.cache.warmup_steps or step - memory.step >= self.cache.interval
        again = step == memory.step  # at other latents, which are not those of the trajectory
        if memory.complete and not (due or again):
            return memory(t)
        velocity = self.velocity(z_t, t, condition)
        if not again:
            memory.add(velocity, t, step)
        return velocity


def expect_cacheable(solver: Solver) -> None:
    """Check that a solver evaluates once per step, at the times of the grid, and is deterministic.

    Raises:
        UserError: it does not: a cache would answer its second evaluation from the first, or meet
            velocities that random noise has changed.
    """
    function = getattr(solver, "func", solver)
    if function not in SOLVERS:
        name = getattr(function, "__name__", repr(function))
        names = ", ".join(known.__name__ for known in SOLVERS)
        raise UserError(
            f"solver={name} does not work with a cache, which needs one evaluation per step and "
            f"steps that are not random: choose one of {names}, or leave the cache out"
        )
