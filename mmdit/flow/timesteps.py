"""Timestep densities pi(t), from which training *draws* t (Sec. 3.1).

t = 1 is noise. A density is never used as a loss weight: t is drawn from it, and the loss is not
weighted. Each class maps a uniform u to t monotonically, so that all share one keyed draw.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from mmdit.checks import number, whole_number
from mmdit.errors import UserError
from mmdit.registry import register


class TimestepDensity(ABC):
    """A density on (0, 1)."""

    @abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u ~ U(0, 1) to t ~ pi."""

    @abstractmethod
    def pdf(self, t: Tensor) -> Tensor:
        """pi(t), which integrates to 1 over (0, 1)."""

    def sample(self, n: int, generator: Generator) -> Tensor:
        """n draws of t, float32 (n,)."""
        # Exclude exactly 0 and 1, whose logit is infinite in LogitNormal.
        u = torch.rand(n, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        return self.from_uniform(u).float()


@register
class Uniform(TimestepDensity):
    """pi(t) = 1: the original rectified flow, `rf`."""

    def from_uniform(self, u: Tensor) -> Tensor:
        return u

    def pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@register
class DiscreteUniform(TimestepDensity):
    """Uniform over the T discrete timesteps of latent diffusion, t = 1/T, 2/T, ..., 1.

    Its `pdf` is that of `Uniform`: the probability of a step, spread over the step's width.

    Args:
        steps: T, at least 1.

    Raises:
        UserError: `steps` is less than 1.
    """

    def __init__(self, *, steps: int = 1000) -> None:
        whole_number("DiscreteUniform: steps", steps)
        self.steps = steps

    def from_uniform(self, u: Tensor) -> Tensor:
        return torch.ceil(u * self.steps).clamp(min=1) / self.steps

    def pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@register
class LogitNormal(TimestepDensity):
    """`rf/lognorm(m, s)`: logit(t) ~ N(m, s^2) (Eq. 19). Positive m favours noise.

    Args:
        m: location, in logits.
        s: scale, in logits, positive.

    Raises:
        UserError: `s` is not positive, or one of them not finite.
    """

    def __init__(self, *, m: float = 0.0, s: float = 1.0) -> None:
        if not math.isfinite(m):
            raise UserError(f"LogitNormal: m {m} must be finite")
        number("LogitNormal: s", s, above=0)
        self.m, self.s = m, s

    def from_uniform(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.m + self.s * torch.special.ndtri(u))

    def pdf(self, t: Tensor) -> Tensor:
        gauss = torch.exp(-((torch.logit(t) - self.m) ** 2) / (2 * self.s**2))
        return gauss / (self.s * math.sqrt(2 * math.pi) * t * (1 - t))


@register
class Mode(TimestepDensity):
    """`rf/mode(s)`: mode sampling with heavy tails (Eq. 20). s = 0 is uniform.

    Args:
        s: scale in [-1, 2/(pi - 2)], where the map is monotone; positive favours the middle.

    Raises:
        UserError: `s` lies outside this range.
    """

    LARGEST = 2.0 / (math.pi - 2.0)

    def __init__(self, *, s: float = 1.29) -> None:
        if not -1.0 <= s <= self.LARGEST:
            raise UserError(f"Mode: s {s} must lie in [-1, 2/(pi-2) = {self.LARGEST:.4f}]")
        self.s = s

    def from_uniform(self, u: Tensor) -> Tensor:
        return 1 - u - self.s * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    def pdf(self, t: Tensor) -> Tensor:
        # pi(t) = |du/dt|; f has no closed inverse, so u is found by bisection (f decreases).
        wanted = t.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            too_large = self.from_uniform(middle) > wanted
            low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
        u = (low + high) / 2
        slope = -1 - self.s * (1 - math.pi / 2 * torch.sin(math.pi * u))
        return (1 / slope.abs()).to(t)


@register
class CosMap(TimestepDensity):
    """`rf/cosmap`: the density whose log-SNR weighting is that of the cosine path (Eq. 21)."""

    def from_uniform(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)

    def pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)
