"""The shift of noise levels with resolution, shared by training and sampling (Eq. 23)."""

import torch
from torch import Tensor

from mmdit.checks import number, whole_number
from mmdit.registry import register


@register
class Shift:
    """t -> alpha t / (1 + (alpha - 1) t) (Eq. 23, Sec. 5.3.2).

    More pixels need more noise to hide the same image. From n to m pixels alpha = sqrt(m/n); the
    log-SNR moves by -2 log(alpha). Training draws and sampling grids both pass through here.

    Args:
        alpha: positive; 1 leaves t as it is, 3 is the paper's choice at 1024 x 1024.

    Raises:
        UserError: `alpha` is not positive, or not finite.
    """

    def __init__(self, *, alpha: float = 1.0) -> None:
        number(f"{type(self).__name__}: alpha", alpha, above=0)
        self.alpha = alpha

    def __call__(self, t: Tensor) -> Tensor:
        # Eq. 23 with its denominator written so that t = 1 stays exactly 1 for every alpha.
        return self.alpha * t / (self.alpha * t + (1.0 - t))

    def grid(self, steps: int) -> Tensor:
        """Decreasing noise levels from 1 to 0 for `steps` steps: (steps + 1,), float64.

        Raises:
            UserError: fewer than one step.
        """
        whole_number("steps", steps)
        return self(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))

    def inverse(self, t: Tensor) -> Tensor:
        """The t' that the shift maps to t."""
        return t / (t + self.alpha * (1.0 - t))


@register
class PublishedShift(Shift):
    """The shift of the published SD3 samplers, which apply it twice to the grid.

    The reference and diffusers space times linearly between end points that are already shifted,
    t = 1 and the smallest training time 1/1000, shift them again and append 0. At alpha = 3 the
    last step therefore begins at 0.0089; shifted once, 1/1000 would become 0.0030.
    """

    def grid(self, steps: int) -> Tensor:
        whole_number("steps", steps)
        least = self(torch.tensor(1e-3, dtype=torch.float64)).item()
        times = self(torch.linspace(1.0, least, steps, dtype=torch.float64))
        return torch.cat([times, times.new_zeros(1)])
