"""Advantage-weighted matching (Xue et al. 2025): policy gradients of the flow loss itself."""

from torch import Tensor

from mmdit.alignment.algorithm import Levels, Result, informative_rows
from mmdit.alignment.models import Models
from mmdit.alignment.ratios import clipped
from mmdit.alignment.rollouts import Rollouts
from mmdit.checks import number
from mmdit.flow.objective import Draw, squared_error


class AdvantageWeightedMatching:
    """The flow loss stands for the log-likelihood of an image, which its advantage weights.

        log rho = |v_old - u|^2 - |v - u|^2
        loss = -min(A rho, A clip(rho, 1 - clip, 1 + clip)) + kl |v - v_ref|^2

    At the old policy, the gradient is that of A |v - u|^2: the loss of pretraining, weighted.

    Args:
        clip: how far the ratio may move; above 0.
        most: at which advantages are clipped; above 0.
        kl: weight of the distance to the reference; at least 0.
    """

    levels: Levels = "objective"

    def __init__(self, *, clip: float = 0.2, most: float = 5.0, kl: float = 0.1) -> None:
        self.clip = number("algorithm.clip", clip, above=0, below=1)
        self.most = number("algorithm.most", most, above=0)
        self.kl = number("algorithm.kl", kl, 0)

    @property
    def forward_passes(self) -> float:
        return 5.0 if self.kl else 4.0

    def select(self, rollouts: Rollouts) -> Tensor:
        """The images of groups whose rewards differ."""
        return informative_rows(rollouts)

    def __call__(self, models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw) -> Result:
        rows = chosen[:, 0]
        x_0 = rollouts.x_0[rows].to(draw.t.device)
        advantages = rollouts.advantages(self.most)[rows].to(x_0.device)
        target = models.policy.pipe.objective.target(x_0, draw)
        v, old = models.policy.output(x_0, draw), models.old.output(x_0, draw)
        log_ratio = squared_error(old, target) - squared_error(v, target)
        losses, figures = clipped(log_ratio, advantages, self.clip)
        reference = models.reference.output(x_0, draw) if self.kl else v.detach()
        distance = squared_error(v, reference)
        figures |= {
            "distance_to_reference": distance,
            "reference_norm_ratio": v.norm() / reference.norm(),
        }
        return Result(losses + self.kl * distance, figures)
