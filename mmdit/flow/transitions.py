"""Steps of stochastic samplers as Gaussians N(mean, std^2 I), whose densities can be computed.

Reinforcement learning treats sampling as a sequence of decisions and needs the probability of each
step. All steps here lead from z at time t to z' at t' < t, on the straight path, as

    z' = (1 - t') x_0 + kept epsilon + fresh noise,  x_0 = z - t v,  epsilon = z + (1 - t) v.

They differ in how much of the predicted noise epsilon is kept and how much is drawn afresh.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdit.checks import number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.flow.paths import like
from mmdit.registry import register


class Transition(ABC):
    """A step z -> z' of a stochastic sampler: a Gaussian with the mean and std of `moments`.

    In the step to t' = 0 nothing is drawn, as fresh noise would remain in the image. That step is
    deterministic: its std is 0, it has no density and cannot be trained on.
    """

    @abstractmethod
    def noise(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """The factors `kept` of epsilon and `fresh` of new noise, elementwise; t > t_next >= 0."""

    def moments(self, v: Tensor, z: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b, ...) and standard deviation (b,) of z'.

        Args:
            v: velocity at z, (b, ...).
            z: state on the straight path, (b, ...).
            t, t_next: the times of z and z', (b,). Give them in float64 and on the CPU, as they
                are in grids: the coefficients are computed in their dtype, and std is returned in
                it.
        """
        kept, fresh = self.noise(t, t_next)
        x_0, epsilon = z - like(t, z) * v, z + like(1 - t, z) * v
        return like(1 - t_next, z) * x_0 + like(kept, z) * epsilon, fresh


@register
class Ancestral(Transition):
    """Ancestral sampling: fresh = eta t' sqrt(1 - (t' (1 - t) / (t (1 - t')))^2).

    kept^2 + fresh^2 = t'^2. With eta = 1 this is the posterior of z' given z and x_0 (Ho et al.
    2020, Sec. 3.2), as if the predicted x_0 were exact; with eta = 0 it is Euler's step (Song et
    al. 2021, Eq. 16).

    Args:
        eta: in [0, 1]; scales the standard deviation of the fresh noise.

    Raises:
        UserError: eta outside [0, 1].
    """

    def __init__(self, *, eta: float = 1.0) -> None:
        self.eta = number("Ancestral: eta", eta, 0, 1)

    def noise(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        # Ratio of the noise-to-data ratios after and before; 0 when all was noise.
        ratio = t_next * (1 - t) / (t * (1 - t_next))
        fresh = self.eta * t_next * (1 - ratio**2).sqrt()
        return (t_next**2 - fresh**2).sqrt(), fresh


@register
class CPS(Transition):
    """Coefficients-preserving sampling: fresh = t' sin(eta pi/2), kept = t' cos(eta pi/2).

    kept^2 + fresh^2 = t'^2, as in ancestral sampling, but the share that is replaced does not
    depend on the length of the step (Wang & Yu 2025).

    Args:
        eta: in [0, 1]; 0 is Euler's step, 1 replaces all noise.

    Raises:
        UserError: eta outside [0, 1].
    """

    def __init__(self, *, eta: float = 0.7) -> None:
        self.eta = number("CPS: eta", eta, 0, 1)

    def noise(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.eta * math.pi / 2
        return t_next * math.cos(angle), t_next * math.sin(angle)


class EulerMaruyama(Transition):
    """Euler's step of an SDE: fresh = g sqrt(t - t'), kept = t' - fresh^2 / (2 t).

    The SDE is dz = v dt + g^2 / (2 t) epsilon dt + g dw, run backwards in time. In continuous time
    it has the marginals of the ODE for every g(t), since the score is -epsilon / t; in steps of
    finite length it has not.
    """

    @abstractmethod
    def diffusion(self, t: Tensor, t_next: Tensor) -> Tensor:
        """The g of the step from t to t_next."""

    def noise(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        fresh = self.diffusion(t, t_next) * (t - t_next).sqrt() * (t_next > 0)
        return t_next - fresh**2 / (2 * t), fresh


@register
class FlowSDE(EulerMaruyama):
    """The step of Flow-GRPO: g = a sqrt(t / (1 - t)) (Liu et al. 2025).

    At t = 1, where g would be infinite, 1 - t' replaces 1 - t, as in the authors' code. Unlike
    here, their last step draws noise too, which their loss leaves out.

    Args:
        a: noise level, at least 0; 0 is Euler's step.

    Raises:
        UserError: `a` is negative, or not finite.
    """

    def __init__(self, *, a: float = 0.7) -> None:
        self.a = number("FlowSDE: a", a, 0)

    def diffusion(self, t: Tensor, t_next: Tensor) -> Tensor:
        return self.a * (t / (1 - torch.where(t == 1, t_next, t))).sqrt()


@register
class DanceSDE(EulerMaruyama):
    """The step of DanceGRPO: g = eta, constant (Xue et al. 2025).

    Args:
        eta: noise level, at least 0; 0 is Euler's step.

    Raises:
        UserError: eta is negative, or not finite.
    """

    def __init__(self, *, eta: float = 0.3) -> None:
        self.eta = number("DanceSDE: eta", eta, 0)

    def diffusion(self, t: Tensor, t_next: Tensor) -> Tensor:
        return torch.full_like(t, self.eta)


@register
class GaussianSDE(Transition):
    """Exact for Gaussian data: with S_t^2 = (1 - t)^2 variance + t^2, the variance of z at t,

        fresh = eta S_t' lambda,  lambda^2 = (t^2 - ((1 - t) / (1 - t'))^2 t'^2) / S_t^2,
        kept = (S_t S_t' sqrt(1 - (eta lambda)^2) - (1 - t) (1 - t') variance) / t.

    With data of this variance and the optimal velocity, z' has exactly the variance S_t'^2 after
    steps of any length. With eta = 1 it is the posterior of z' given z alone, which adds to that
    of ancestral sampling what z leaves open about x_0 (Bao et al. 2022, Analytic-DPM); with
    eta = 0 it solves the ODE exactly. The step to t' = 0 is that of eta = 0. With variance = 0 it
    is `Ancestral`.

    Args:
        variance: of the data, at least 0. If it differs between frequencies give the smallest:
            a larger one leaves noise in those that have less.
        eta: in [0, 1]; scales the standard deviation of the fresh noise.

    Raises:
        UserError: a negative variance, or eta outside [0, 1].
    """

    def __init__(self, *, variance: float = 0.01, eta: float = 1.0) -> None:
        self.variance = number("GaussianSDE: variance", variance, 0)
        self.eta = number("GaussianSDE: eta", eta, 0, 1)

    def noise(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        now, after = ((self.variance * (1 - u) ** 2 + u**2).sqrt() for u in (t, t_next))
        still = (1 - t) / (1 - t_next) * t_next  # of the noise at t, what was there at t_next
        share = self.eta**2 * (t_next > 0) * (t**2 - still**2) / now**2
        kept = (now * after * (1 - share).sqrt() - (1 - t) * (1 - t_next) * self.variance) / t
        return kept, after * share.sqrt()


def sample(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """mean + std noise: mean and noise (b, ...), std (b,)."""
    return mean + like(std, mean) * noise


def log_prob(z_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(z_next; mean, std^2 I), averaged over the values of a sample: (b,).

    It is computed in float32 at least. Keep z_next as it was sampled: rounded to 16 bits it would
    be another point.

    Raises:
        UserError: a std is 0, so that there is no density.
    """
    _expect_density("log_prob", std)
    deviation = wide(z_next) - wide(mean)
    squares = (deviation / like(std, deviation)).square().flatten(1).mean(1)
    return -squares / 2 - std.log().to(squares) - math.log(2 * math.pi) / 2


def kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL divergence of N(mean, std^2 I) from N(mean_ref, std^2 I), averaged over values: (b,).

    (mean - mean_ref)^2 / (2 std^2), in float32 at least.

    Raises:
        UserError: a std is 0, so that there is no density.
    """
    _expect_density("kl", std)
    deviation = wide(mean) - wide(mean_ref)
    return (deviation / like(std, deviation)).square().flatten(1).mean(1) / 2


def _expect_density(what: str, std: Tensor) -> None:
    if not (std > 0).all():
        raise UserError(
            f"{what}: std={std.tolist()} must be above 0: a step without fresh noise has no "
            "density. Leave out the step to t = 0, and give the transition some noise (a or eta)"
        )


@dataclass
class Trajectory:
    """What a stochastic solver went through, for `stochastic(..., trajectory=...)` to fill in."""

    states: list[Tensor] = field(default_factory=list)  # z at each time of the grid, (b, ...)
    log_probs: dict[int, Tensor] = field(default_factory=dict)  # (b,), of the random steps, from 0
