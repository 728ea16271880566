"""Diffusion-DPO (Wallace et al. 2023; App. C): preferences between two images of a prompt."""

from torch import Tensor
from torch.nn import functional as F

from mmdit.alignment.algorithm import Levels, Result
from mmdit.alignment.models import Models
from mmdit.alignment.rollouts import Rollouts, best_and_worst
from mmdit.checks import number
from mmdit.flow.objective import Draw, squared_error


class DiffusionDPO:
    """Direct preference optimization, with the flow loss for the log-likelihood.

    For an image w that is preferred to l, both noised with the same t and epsilon,

        loss = -log sigmoid(beta (log rho_w - log rho_l)),
        log rho = -(|v - u|^2 - |v_ref - u|^2) / 2

    with errors that are means over values. At the reference, it is log 2.

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
        margin = self.beta * distance
        figures["sigmoid"] = margin.detach().sigmoid()  # near 0 or 1, a pair teaches nothing more
        return Result(-F.logsigmoid(margin), figures)


def compared(
    models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw
) -> tuple[Tensor, dict[str, Tensor]]:
    """log rho_w - log rho_l of pairs of rows, (b,), and what is logged of it."""
    preferred, other = (rollouts.x_0[rows].to(draw.t.device) for rows in chosen.unbind(1))
    better, worse = log_ratio(models, preferred, draw), log_ratio(models, other, draw)
    distance = better - worse
    figures = {
        "implicit_accuracy": (distance > 0).float() + 0.5 * (distance == 0).float(),
        "gain_preferred": better.detach(),
        "gain_other": worse.detach(),
    }
    return distance, figures


def log_ratio(models: Models, x_0: Tensor, draw: Draw) -> Tensor:
    """-(|v - u|^2 - |v_ref - u|^2) / 2 for each image, (b,)."""
    target = models.policy.pipe.objective.target(x_0, draw)
    output, reference = models.policy.output(x_0, draw), models.reference.output(x_0, draw)
    return (squared_error(reference, target) - squared_error(output, target)) / 2
