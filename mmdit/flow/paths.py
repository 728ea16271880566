"""Forward paths z_t = a_t x_0 + b_t epsilon, from data at t = 0 to noise at t = 1 (Sec. 2).

All paths between data and Gaussian noise visit the same noise levels, at different times and
scales: z_t / (a_t + b_t) lies on the straight path at sigma = b_t / (a_t + b_t). Sampling always
follows the straight path; `straight` and `time_at` convert between t and sigma.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmdit.checks import number, whole_number
from mmdit.errors import UserError
from mmdit.registry import register


class Path(ABC):
    """Coefficients of a path, and quantities derived from them; methods act elementwise on t."""

    @abstractmethod
    def a(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def b(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def da(self, t: Tensor) -> Tensor:
        """d a_t / dt."""

    @abstractmethod
    def db(self, t: Tensor) -> Tensor:
        """d b_t / dt."""

    @abstractmethod
    def time_at(self, sigma: Tensor) -> Tensor:
        """The t with the noise level of sigma on the straight path: the inverse of `straight`."""

    @property
    def noisiest(self) -> float:
        """The noise level at which sampling starts: sigma on the straight path."""
        return 1.0

    def straight(self, t: Tensor) -> Tensor:
        """The sigma in [0, 1] with the noise level of t, on the straight path."""
        return self.b(t) / (self.a(t) + self.b(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(a_t^2 / b_t^2)."""
        return 2.0 * (self.a(t).log() - self.b(t).log())

    def d_log_snr(self, t: Tensor) -> Tensor:
        """lambda'_t = 2 (a'_t / a_t - b'_t / b_t); never positive."""
        return 2.0 * (self.da(t) / self.a(t) - self.db(t) / self.b(t))

    def interpolate(self, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """z_t (Eq. 1); x_0 and epsilon (b, ...), t (b,)."""
        return like(self.a(t), x_0) * x_0 + like(self.b(t), x_0) * epsilon

    def velocity(self, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt along the path of one pair (x_0, epsilon)."""
        return like(self.da(t), x_0) * x_0 + like(self.db(t), x_0) * epsilon


@register
class RectifiedFlow(Path):
    """The straight path z_t = (1 - t) x_0 + t epsilon (Eq. 13)."""

    def a(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def b(self, t: Tensor) -> Tensor:
        return t

    def da(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def db(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, sigma: Tensor) -> Tensor:
        return sigma


@register
class Cosine(Path):
    """z_t = cos(pi t / 2) x_0 + sin(pi t / 2) epsilon (Nichol & Dhariwal 2021; Eq. 16).

    Args:
        last: the t in (0, 1] at which sampling starts. At t = 1 only noise is left, and computing
            x_0 from an epsilon-prediction would divide by zero.

    Raises:
        UserError: `last` lies outside (0, 1].
    """

    def __init__(self, *, last: float = 0.98) -> None:
        if not 0.0 < last <= 1.0:
            raise UserError(f"Cosine: last {last} must lie in (0, 1]")
        self.last = last

    def a(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def b(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def da(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def db(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def time_at(self, sigma: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(sigma, 1.0 - sigma)

    @property
    def noisiest(self) -> float:
        return self.straight(torch.tensor(self.last, dtype=torch.float64)).item()


@register
class LDMLinear(Path):
    """The path of latent diffusion: a_t^2 = prod_{s <= t} (1 - beta_s), a_t^2 + b_t^2 = 1 (Sec. 2).

    The square roots of the betas increase linearly. Step k of the T discrete steps lies at
    t = (k + 1) / T, where `DiscreteUniform` draws for training; between steps log a_t is linear,
    so that sampling may evaluate anywhere. At t = 1 some signal is left (a_1 = 0.068).

    Args:
        beta_start, beta_end: beta_0 and beta_{T-1}, increasing, in (0, 1).
        steps: T, at least 2.

    Raises:
        UserError: betas that are not increasing or not in (0, 1), or too few steps.
    """

    def __init__(
        self, *, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000
    ) -> None:
        if not 0.0 < beta_start <= beta_end < 1.0:
            raise UserError(
                f"LDMLinear: beta_start {beta_start} and beta_end {beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1"
            )
        whole_number("LDMLinear: steps", steps, 2)
        self.beta_start, self.beta_end, self.steps = beta_start, beta_end, steps
        # A table of constants, not weights: it needs values even when networks are built on meta.
        with torch.device("cpu"):
            roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        betas = roots.square()
        # log a_t at t = 0, 1/T, ..., 1
        self._log_a = torch.cat([betas.new_zeros(1), (1 - betas).log().cumsum(0) / 2])

    def a(self, t: Tensor) -> Tensor:
        return self._log_a_at(t).exp()

    def b(self, t: Tensor) -> Tensor:
        return torch.expm1(2 * self._log_a_at(t)).abs().sqrt()

    def da(self, t: Tensor) -> Tensor:
        _, slope, _ = self._piece(t)
        return self.a(t) * slope

    def db(self, t: Tensor) -> Tensor:
        return -self.a(t) * self.da(t) / self.b(t)  # derivative of a^2 + b^2 = 1

    def time_at(self, sigma: Tensor) -> Tensor:
        knots = self._log_a.to(sigma)
        # a = (1 - sigma) / hypot(1 - sigma, sigma), clamped at the path's end, its noisiest point.
        log_a = -torch.log1p((sigma / (1 - sigma)).square()) / 2
        log_a = log_a.clamp(min=knots[-1].item())
        i = torch.searchsorted(-knots, -log_a).clamp(1, self.steps)
        before, after = knots[i - 1], knots[i]
        return ((i - 1).to(sigma) + (log_a - before) / (after - before)) / self.steps

    @property
    def noisiest(self) -> float:
        return self.straight(torch.ones((), dtype=torch.float64)).item()

    def _log_a_at(self, t: Tensor) -> Tensor:
        start, slope, since = self._piece(t)
        return start + slope * since

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The segment of log a_t that contains t: its first value, slope, and t since its start."""
        knots = self._log_a.to(t)
        i = (t.detach() * self.steps).long().clamp(0, self.steps - 1)
        return knots[i], (knots[i + 1] - knots[i]) * self.steps, t - i.to(t) / self.steps


class VarianceExploding(Path):
    """Paths with a_t = 1 and increasing noise, as in EDM (Karras et al. 2022).

    Args:
        sigma_max: the b_t, EDM's sigma, at which sampling starts; positive.

    Raises:
        UserError: `sigma_max` is not positive, or not finite.
    """

    def __init__(self, *, sigma_max: float) -> None:
        number(f"{type(self).__name__}: sigma_max", sigma_max, above=0)
        self.sigma_max = sigma_max

    def a(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def da(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @abstractmethod
    def time_of_noise(self, b: Tensor) -> Tensor:
        """The t at which b_t is `b`."""

    def time_at(self, sigma: Tensor) -> Tensor:
        return self.time_of_noise(sigma / (1.0 - sigma))

    @property
    def noisiest(self) -> float:
        # Sampling starts at the end of the path where that comes before sigma_max.
        end = self.b(torch.ones((), dtype=torch.float64)).item()
        b = min(self.sigma_max, end)
        return b / (1.0 + b)


@register
class EDM(VarianceExploding):
    """`edm(P_m, P_s)`: a_t = 1, log b_t normally distributed for uniform t (Sec. 2).

    b_t = exp(P_m + P_s F^-1(t)) with F^-1 the normal quantile, so lambda ~ N(-2 P_m, (2 P_s)^2).

    Args:
        P_m, P_s: mean and standard deviation of log b_t; P_s positive.
        sigma_max: the b_t at which sampling starts; positive.

    Raises:
        UserError: P_s or `sigma_max` is not positive, or one of the three not finite.
    """

    def __init__(self, *, P_m: float = -1.2, P_s: float = 1.2, sigma_max: float = 80.0) -> None:
        if not math.isfinite(P_m):
            raise UserError(f"EDM: P_m {P_m} must be finite")
        number("EDM: P_s", P_s, above=0)
        super().__init__(sigma_max=sigma_max)
        self.P_m, self.P_s = P_m, P_s

    def b(self, t: Tensor) -> Tensor:
        return (self.P_m + self.P_s * self._quantile(t)).exp()

    def db(self, t: Tensor) -> Tensor:
        # The derivative of the normal quantile is the inverse of the normal density.
        inverse_density = math.sqrt(2 * math.pi) * (self._quantile(t).square() / 2).exp()
        return self.b(t) * self.P_s * inverse_density

    def time_of_noise(self, b: Tensor) -> Tensor:
        # Not torch.special.ndtr, whose lower tail vanishes below 1e-16: low noise would become 0.
        return torch.erfc((self.P_m - b.log()) / (self.P_s * math.sqrt(2))) / 2

    def _quantile(self, t: Tensor) -> Tensor:
        quantile: Tensor = torch.special.ndtri(_inside(t))
        return quantile


@register
class MatchedEDM(VarianceExploding):
    """`edm/rf` and `edm/cos`: a_t = 1, b_t = sigma_data tan(pi t / 2) (Sec. 5.1).

    The noise levels for which the loss of the F-prediction has the weight of `rf` and `v/cos`:
    their w(lambda) is the same function, t / (1 - t) = e^(-lambda/2). The F-prediction's is
    p(lambda) (e^-lambda + sigma_data^2), so p must be a hyperbolic secant, whose quantile b_t is.

    Args:
        sigma_data: the `sigma_data` of `FPrediction`, positive.
        sigma_max: the b_t at which sampling starts; positive.

    Raises:
        UserError: `sigma_data` or `sigma_max` is not positive, or not finite.
    """

    def __init__(self, *, sigma_data: float = 0.5, sigma_max: float = 80.0) -> None:
        number("MatchedEDM: sigma_data", sigma_data, above=0)
        super().__init__(sigma_max=sigma_max)
        self.sigma_data = sigma_data

    def b(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.tan(math.pi / 2 * _inside(t))

    def db(self, t: Tensor) -> Tensor:
        return self.sigma_data * math.pi / 2 / torch.cos(math.pi / 2 * _inside(t)).square()

    def time_of_noise(self, b: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(b / self.sigma_data)


def _inside(t: Tensor) -> Tensor:
    """t clamped to the open interval (0, 1): at its ends b_t is 0 or infinite."""
    limits = torch.finfo(t.dtype)
    return t.clamp(limits.tiny, 1.0 - limits.eps / 2)


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """(b,) -> (b, 1, ..., 1), in dtype and on the device of x, to broadcast over samples."""
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))
