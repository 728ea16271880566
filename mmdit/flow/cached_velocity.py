"""Velocities that are partly answered from memory, and their memories; see `caches.py`."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Generic, Protocol, Self, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.flow.condition import Condition, ConditionalVelocity


class Residuals:
    """What the blocks of a network added to the tokens of each sample; see `FirstBlockCache`.

    The view of the network that `Backbone.reusing` makes writes and reads it.

    Args:
        threshold: relative change of the first block's residual below which the later blocks are
            not evaluated.
        max_consecutive: how often in a row; None is without limit.

    Attributes:
        full: whether the next evaluation is one of all blocks, whatever has changed.
        sides: how often the next batch has each latent, outermost; these decide together.
        rows: the samples of the latest evaluation for which all blocks were evaluated.
        share: these, as a share of its samples.
    """

    def __init__(self, threshold: float, max_consecutive: int | None = None) -> None:
        self.threshold, self.max_consecutive = threshold, max_consecutive
        self.full, self.sides = False, 1
        self.rows = torch.empty(0, dtype=torch.int64)
        self.share = 1.0
        self._first: Tensor | None = None  # residual of the first block, (b, n, d)
        self._later = torch.empty(0)  # of all later blocks together, (b, n, d)
        self._reused = torch.empty(0)  # times in a row, (b,)
        self._tokens = torch.empty(0)  # after the first block, (b, n, d)

    def choose(self, before: Tensor, after: Tensor) -> Tensor:
        """The samples whose later blocks are to be evaluated, given the tokens around the first.

        Args:
            before, after: image tokens (b, n, d).

        Returns:
            Their indices, increasing.
        """
        residual, self._tokens = after - before, after
        if self._first is None:
            self._first, self._reused = residual, torch.zeros(len(after), device=after.device)
            reuse = torch.zeros_like(self._reused, dtype=torch.bool)
        else:
            changes = rearrange(
                relative_change(residual, self._first), "(s b) -> s b", s=self.sides
            )
            reuse = (changes < self.threshold).all(0).repeat(self.sides)  # false for NaN
            if self.full:
                reuse = torch.zeros_like(reuse)
            if self.max_consecutive is not None:
                reuse &= self._reused < self.max_consecutive
        self.rows = torch.nonzero(~reuse).flatten()
        self.share = len(self.rows) / len(after)
        self._first[self.rows] = residual[self.rows]
        self._reused = torch.where(reuse, self._reused + 1, 0)
        return self.rows

    def complete(self, tokens: Tensor) -> Tensor:
        """The tokens after the last block, (b, n, d), given those of `rows`."""
        if len(tokens) == len(self._tokens):
            self._later = tokens - self._tokens
            return tokens
        self._later[self.rows] = tokens - self._tokens[self.rows]
        completed = self._tokens + self._later
        completed[self.rows] = tokens
        return completed


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """mean|new - old| / mean|old| over the values of each sample (b, ...): (b,)."""
    new, old = wide(new).flatten(1), wide(old).flatten(1)
    return (new - old).abs().mean(1) / old.abs().mean(1)


class Forecast:
    """The polynomial through the latest velocities; see `TaylorCache`.

    Args:
        order: degree of the polynomial; lower as long as fewer than order + 1 velocities are known.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.step = -1  # of the latest evaluation
        self._times: list[float] = []  # of the latest order + 1 evaluations, newest first
        self._differences: list[Tensor] = []  # divided differences over the first 1, 2, ... times

    @property
    def complete(self) -> bool:
        """Whether the polynomial has its whole order."""
        return len(self._times) > self.order

    def add(self, velocity: Tensor, t: float, step: int) -> None:
        """Take in an evaluation."""
        times = [t, *self._times[: self.order]]
        differences = [velocity]
        for k, (before, older) in enumerate(zip(self._differences, times[1:], strict=False)):
            differences.append((differences[k] - before) / (t - older))
        self._times, self._differences, self.step = times, differences, step

    def __call__(self, t: float) -> Tensor:
        """The velocity at time t, by Newton's formula."""
        velocity = self._differences[-1]
        for difference, known in zip(self._differences[-2::-1], self._times[-2::-1], strict=True):
            velocity = difference + (t - known) * velocity
        return velocity


class CacheableVelocity(Protocol):
    """The velocity of a network that can skip some of its blocks, and reuse what they add."""

    def __call__(self, z_t: Tensor, t: float, condition: Condition, /) -> Tensor:
        """dz/dt, shape of z_t."""

    def skipping(self, layers: Collection[int]) -> "CacheableVelocity":
        """The velocity of the same network without the blocks with these indices."""

    def reusing(self, residuals: Residuals) -> ConditionalVelocity:
        """The velocity of the same network, which evaluates all blocks only where it must."""


M = TypeVar("M")


class CachedVelocity(ABC, Generic[M]):
    """A velocity with a memory for each set of conditions; used in place of the one it wraps.

    A memory that was not used in the step before is dropped.

    Args:
        velocity: that of the network.
        grid: the solver's decreasing times, (n + 1,).
    """

    def __init__(self, velocity: CacheableVelocity, grid: Tensor) -> None:
        self.velocity, self.grid = velocity, grid
        self._steps = {t: i for i, t in enumerate(grid[:-1].tolist())}
        self._memories: list[tuple[Condition, int, M]] = []  # with the step of the latest use

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Tensor:
        """dz/dt, shape of z_t.

        Raises:
            UserError: t is not a time of the grid, or gradients are recorded.
        """
        if torch.is_grad_enabled():
            raise UserError(
                "a cache is for sampling, not for training: no gradient flows through what it "
                "remembers. Use torch.no_grad(), or leave the cache out"
            )
        if t not in self._steps:
            raise UserError(
                f"a cache needs a solver and a guidance that evaluate at the times of the grid, "
                f"but here is t={t:g}, which is not one of them"
            )
        step = self._steps[t]
        known = [entry for entry in self._memories if step - 1 <= entry[1] <= step]
        memory = next((memory for of, _, memory in known if of is condition), None)
        memory = self.empty() if memory is None else memory
        others = [entry for entry in known if entry[0] is not condition]
        self._memories = [*others, (condition, step, memory)]
        return self.evaluate(memory, step, z_t, t, condition)

    @abstractmethod
    def skipping(self, layers: Collection[int]) -> Self:
        """The velocity of the same network without these blocks, with memories of its own."""

    @abstractmethod
    def empty(self) -> M:
        """A memory of nothing."""

    @abstractmethod
    def evaluate(self, memory: M, step: int, z_t: Tensor, t: float, condition: Condition) -> Tensor:
        """The velocity at a step, given what is remembered for this condition."""
