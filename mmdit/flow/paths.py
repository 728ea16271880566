"""Forward paths z_t = a_t x_0 + b_t epsilon, from data at t = 0 to noise at t = 1 (Sec. 2)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmdit.registry import register


class Path(ABC):
    """Coefficients of a path and what follows from them; every method maps t elementwise."""

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

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(a_t^2 / b_t^2)."""
        return 2.0 * (self.a(t).log() - self.b(t).log())

    def interpolate(self, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """z_t (Eq. 1); x_0 and epsilon (b, ...), t (b,)."""
        return _as(self.a(t), x_0) * x_0 + _as(self.b(t), x_0) * epsilon

    def velocity(self, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt along the path of one pair (x_0, epsilon)."""
        return _as(self.da(t), x_0) * x_0 + _as(self.db(t), x_0) * epsilon


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


def _as(coefficient: Tensor, x: Tensor) -> Tensor:
    """(b,) -> (b, 1, ..., 1), so that it multiplies each sample and never mixes them."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))
