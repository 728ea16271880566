"""Identity preference optimization (Azar et al. 2023), for flows as Diffusion-DPO is."""

from torch import Tensor

from mmdit.alignment.algorithm import Levels, Result
from mmdit.alignment.diffusion_dpo import compared
from mmdit.alignment.models import Models
from mmdit.alignment.rollouts import Rollouts, best_and_worst
from mmdit.checks import number
from mmdit.flow.objective import Draw


class DiffusionIPO:
    """Pushes two images of a prompt apart until they are a given distance from the reference.

    With h = log rho_w - log rho_l, the likelihood ratios to the reference of the preferred and the
    other image as in `DiffusionDPO`,

        loss = (beta h - 1/2)^2.

    Preferences that always agree drive DPO ever further from the reference; here the gradient ends
    at h = 1 / (2 beta), and turns beyond it.

    Args:
        beta: how strongly the reference holds; above 0. A greater one holds more.
    """

    levels: Levels = "objective"
    forward_passes = 8.0  # two images

    def __init__(self, *, beta: float = 100.0) -> None:
        self.beta = number("algorithm.beta", beta, above=0)

    def select(self, rollouts: Rollouts) -> Tensor:
        """Pairs of a best and a worst image of the groups whose rewards differ: two columns."""
        return best_and_worst(rollouts)

    def __call__(self, models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw) -> Result:
        distance, figures = compared(models, rollouts, chosen, draw)
        return Result((self.beta * distance - 0.5).square(), figures)
