"""Sampling grids: noise levels sigma of the straight path, from noise (1) down to data (0).

Solvers follow the straight path regardless of the path in training (`mmdit.flow.paths`), so any
grid works with any formulation.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmdit.checks import number, whole_number
from mmdit.errors import UserError
from mmdit.flow.paths import Cosine, LDMLinear, Path
from mmdit.flow.schedule import Shift
from mmdit.registry import register


class Grid(ABC):
    """A way to distribute solver steps over noise levels."""

    @abstractmethod
    def __call__(self, steps: int, shift: Shift, path: Path) -> Tensor:
        """Decreasing noise levels in [0, 1] for `steps` steps, the last 0: (steps + 1,), float64.

        Args:
            steps: number of solver steps, at least 1.
            shift: applied to all noise levels.
            path: the path in training; grids with equal steps of a path's own time use it.

        Raises:
            UserError: fewer than one step.
        """

    def remaining(self, steps: int, shift: Shift, path: Path, *, strength: float) -> Tensor:
        """The end of the grid, for changing a given image: (n + 1,), float64.

        It begins at step int(steps * (1 - strength)), as in the reference. diffusers uses
        int(steps - steps * strength), which after rounding is sometimes one step later (with 40
        steps and strength 0.8, 8 instead of 7). The full grid is `squeezed` to the path's start.

        Args:
            steps, shift, path: as in `__call__`.
            strength: in [0, 1]; the share of the grid to keep.

        Raises:
            UserError: fewer than one step, or `strength` outside [0, 1].
        """
        if not 0.0 <= strength <= 1.0:
            raise UserError(f"strength {strength} must lie in [0, 1]")
        full = squeezed(self(steps, shift, path), noisiest=path.noisiest)
        return full[int(steps * (1.0 - strength)) :]


@register
class UniformGrid(Grid):
    """Equal steps of the straight path's own time, shifted; with `PublishedShift`, SD3's grid."""

    def __call__(self, steps: int, shift: Shift, path: Path) -> Tensor:
        return shift.grid(steps)


@register
class CosineGrid(Grid):
    """Equal steps of the time of the cosine path: the training path, or else `Cosine()`."""

    def __call__(self, steps: int, shift: Shift, path: Path) -> Tensor:
        cosine = path if isinstance(path, Cosine) else Cosine()
        return shift(cosine.straight(_equal_steps(steps, start=cosine.last)))


@register
class LDMGrid(Grid):
    """Equal steps of latent diffusion's timesteps: the training path's, or else `LDMLinear()`'s."""

    def __call__(self, steps: int, shift: Shift, path: Path) -> Tensor:
        linear = path if isinstance(path, LDMLinear) else LDMLinear()
        return shift(linear.straight(_equal_steps(steps, start=1.0)))


@register
class KarrasGrid(Grid):
    """Equal steps of the rho-th root of b / a, followed by 0 (Karras et al. 2022, Eq. 5).

    Args:
        sigma_min, sigma_max: b / a at the last step and at the first; not sigma of the straight
            path, which is b / (a + b).
        rho: exponent; larger values put more steps at low noise.

    Raises:
        UserError: not 0 < sigma_min < sigma_max, or rho not positive.
    """

    def __init__(
        self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> None:
        if not 0.0 < sigma_min < sigma_max < math.inf:
            raise UserError(
                f"KarrasGrid: sigma_min {sigma_min} and sigma_max {sigma_max} must satisfy "
                "0 < sigma_min < sigma_max"
            )
        number("KarrasGrid: rho", rho, above=0)
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def __call__(self, steps: int, shift: Shift, path: Path) -> Tensor:
        whole_number("steps", steps)
        least, most = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        noise = torch.linspace(most, least, steps, dtype=torch.float64) ** self.rho
        return torch.cat([shift(noise / (1.0 + noise)), noise.new_zeros(1)])


def squeezed(grid: Tensor, *, noisiest: float) -> Tensor:
    """Scale down a grid that starts above the noise level `noisiest` so that it starts there."""
    return grid * min(1.0, noisiest / grid[0].item())


def _equal_steps(steps: int, *, start: float) -> Tensor:
    whole_number("steps", steps)
    return torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)
