"""Flow-GRPO (Liu et al. 2025): policy gradients of stochastic sampling."""

import torch
from torch import Tensor

from mmdit.alignment.algorithm import Levels, Result, informative_rows
from mmdit.alignment.models import Models
from mmdit.alignment.ratios import clipped
from mmdit.alignment.rollouts import Rollouts
from mmdit.checks import number
from mmdit.errors import UserError
from mmdit.flow.objective import Draw
from mmdit.flow.transitions import Transition, kl, log_prob


class FlowGRPO:
    """Each stochastic step of sampling is an action, whose Gaussian density is known.

    With the density p of a step from z_t to z_t' (mean over values) and its ratio to the old
    policy's, rho = p(z_t' | z_t) / p_old(z_t' | z_t),

        loss = -min(A rho, A clip(rho, 1 - clip, 1 + clip)) + kl |mean - mean_ref|^2 / (2 std^2).

    The images come from stochastic sampling: `sampler.transition` says which. Its window of
    steps is what is trained (the fast form trains one to three early ones).

    Args:
        transition: the stochastic step, that of the sampler.
        clip: how far the ratio may move; above 0. Densities are means over values, so ratios stay
            close to 1.
        most: at which advantages are clipped; above 0.
        kl: weight of the divergence from the reference; at least 0.
    """

    levels: Levels = "objective"

    def __init__(
        self, *, transition: Transition, clip: float = 1e-4, most: float = 5.0, kl: float = 0.04
    ) -> None:
        self.transition = transition
        self.clip = number("algorithm.clip", clip, above=0, below=1)
        self.most = number("algorithm.most", most, above=0)
        self.kl = number("algorithm.kl", kl, 0)

    @property
    def forward_passes(self) -> float:
        return 4.0 if self.kl else 3.0

    def select(self, rollouts: Rollouts) -> Tensor:
        """The images of groups whose rewards differ, and which step of theirs: two columns.

        Raises:
            UserError: the images were sampled without noise in between.
        """
        if rollouts.trajectory is None:
            raise UserError(
                "algorithm=flow_grpo trains the steps of stochastic sampling, but these images "
                "were sampled without noise in between: choose sampler=sde"
            )
        rows = informative_rows(rollouts)[:, 0]
        return torch.cartesian_prod(rows, torch.arange(rollouts.trajectory.log_prob.shape[1]))

    def __call__(self, models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw) -> Result:
        made = rollouts.trajectory
        assert made is not None
        rows, steps = chosen.unbind(1)
        device = draw.t.device
        z, z_next = (made.z[rows, at].to(device) for at in (steps, steps + 1))
        t, t_next = made.t[steps], made.t[steps + 1]
        v = models.policy.velocity(z, t)
        mean, std = self.transition.moments(v, z, t, t_next)
        log_ratio = log_prob(z_next, mean, std) - made.log_prob[rows, steps].to(device)
        advantages = rollouts.advantages(self.most)[rows].to(device)
        losses, figures = clipped(log_ratio, advantages, self.clip)
        if self.kl:
            reference = models.reference.velocity(z, t)
            divergence = kl(mean, self.transition.moments(reference, z, t, t_next)[0], std)
            losses = losses + self.kl * divergence
            figures |= {
                "kl": divergence.detach(),
                "reference_norm_ratio": v.detach().norm() / reference.norm(),
            }
        return Result(losses, figures)
