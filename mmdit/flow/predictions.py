"""The meaning of a network's output, and its conversion to x_0, epsilon and velocity (Sec. 2).

Every output is a combination p_t x_0 + q_t epsilon. With z_t = a_t x_0 + b_t epsilon it forms a
system of two linear equations, which all conversions solve.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.checks import number
from mmdit.flow.paths import Path, like
from mmdit.registry import register


class Coefficients(NamedTuple):
    """Coefficients of the network's output p_t x_0 + q_t epsilon."""

    p: Tensor
    q: Tensor


class Prediction(ABC):
    """The meaning of a network's output on a path."""

    @abstractmethod
    def coefficients(self, path: Path, t: Tensor) -> Coefficients:
        """p_t and q_t, with the shape of t."""

    def inputs(self, path: Path, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's inputs for z_t (b, ...) and t (b,): scaled latents and times."""
        return z_t, t

    def misfit(self, path: Path) -> str | None:
        """A property that this prediction requires and the path lacks; None if it fits."""
        return None

    def target(self, path: Path, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """The training target for this pair: p_t x_0 + q_t epsilon, same shape as x_0."""
        p, q = self.coefficients(path, t)
        return like(p, x_0) * x_0 + like(q, x_0) * epsilon

    def determinant(self, path: Path, t: Tensor) -> Tensor:
        """a q - b p; for given z_t, an output error e is an epsilon error e a / determinant."""
        p, q = self.coefficients(path, t)
        return path.a(t) * q - path.b(t) * p

    def x_0(self, path: Path, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The predicted data; same shape as z_t."""
        _, q = self.coefficients(path, t)
        return self._solved(path, t, q, -path.b(t), z_t, output)

    def epsilon(self, path: Path, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The predicted noise; same shape as z_t."""
        p, _ = self.coefficients(path, t)
        return self._solved(path, t, -p, path.a(t), z_t, output)

    def velocity(self, path: Path, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt = a'_t x_0 + b'_t epsilon (Eq. 9); same shape as z_t."""
        p, q = self.coefficients(path, t)
        da, db = path.da(t), path.db(t)
        return self._solved(path, t, da * q - db * p, db * path.a(t) - da * path.b(t), z_t, output)

    def straight_velocity(self, path: Path, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """epsilon - x_0, the velocity of the straight path; same shape as z_t.

        For a velocity prediction on that path this is the output, bit for bit, because the factors
        are exactly 0 and 1.
        """
        p, q = self.coefficients(path, t)
        return self._solved(path, t, -(p + q), path.a(t) + path.b(t), z_t, output)

    def _solved(
        self, path: Path, t: Tensor, of_z: Tensor, of_output: Tensor, z_t: Tensor, output: Tensor
    ) -> Tensor:
        """(of_z z_t + of_output output) / determinant."""
        determinant = self.determinant(path, t)
        return like(of_output / determinant, z_t) * output + like(of_z / determinant, z_t) * z_t


@register
class Velocity(Prediction):
    """The output is the velocity of the path: epsilon - x_0 on the straight path (Eq. 14)."""

    def coefficients(self, path: Path, t: Tensor) -> Coefficients:
        return Coefficients(path.da(t), path.db(t))


@register
class Epsilon(Prediction):
    """The output is the noise (Ho et al. 2020)."""

    def coefficients(self, path: Path, t: Tensor) -> Coefficients:
        return Coefficients(torch.zeros_like(t), torch.ones_like(t))


@register
class V(Prediction):
    """The output is v = a_t epsilon - b_t x_0 (Salimans & Ho 2022)."""

    def coefficients(self, path: Path, t: Tensor) -> Coefficients:
        return Coefficients(-path.b(t), path.a(t))


@register
class FPrediction(Prediction):
    """The output is EDM's F: x_0 = c_skip z_t + c_out F(c_in z_t, c_noise) (Karras et al. 2022).

    Input and target have unit variance at every noise level. It requires a path with a_t = 1;
    with sigma = b_t, c_skip = sigma_data^2 / (sigma^2 + sigma_data^2), c_out = sigma sigma_data /
    sqrt(sigma^2 + sigma_data^2), c_in = 1 / sqrt(sigma^2 + sigma_data^2), c_noise = log(sigma) / 4.

    Args:
        sigma_data: standard deviation of the data that the preconditioning assumes; positive.

    Raises:
        UserError: `sigma_data` is not positive, or not finite.
    """

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        number("FPrediction: sigma_data", sigma_data, above=0)
        self.sigma_data = sigma_data

    def coefficients(self, path: Path, t: Tensor) -> Coefficients:
        # (x_0 - c_skip z_t) / c_out, in terms of x_0 and epsilon.
        sigma = path.b(t)
        norm = torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
        return Coefficients(sigma / (self.sigma_data * norm), -self.sigma_data / norm)

    def misfit(self, path: Path) -> str | None:
        keeps = (path.a(torch.linspace(0.1, 0.9, 9, device="cpu")) == 1.0).all()
        return None if keeps else "a_t = 1 (the paths edm and matched_edm have it)"

    def inputs(self, path: Path, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = path.b(t)
        norm = torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
        return like(1 / norm, z_t) * z_t, sigma.log() / 4
