"""DiffusionNFT (Zheng et al. 2025): reinforcement learning on the forward process."""

from typing import get_args

from torch import Tensor

from mmdit.alignment.algorithm import Levels, Result, every_row
from mmdit.alignment.models import Models
from mmdit.alignment.rollouts import Rollouts
from mmdit.checks import number, one_of
from mmdit.dtypes import wide
from mmdit.flow.objective import Draw, squared_error
from mmdit.flow.paths import like


class DiffusionNFT:
    """Contrasts what is better than its group with what is worse, on noised clean images.

    With the optimality r = A / (2 A_max) + 1/2 in [0, 1] of an image, the two implicit policies

        v+ = (1 - beta) v_old + beta v          v- = (1 + beta) v_old - beta v

    and the error of the clean image D(v) = |x_0(v) - x_0|^2 / sg(mean |x_0(v) - x_0|), the loss is

        A_max [r D(v+) + (1 - r) D(v-)] / beta + kl |v - v_ref|^2.

    Any solver may sample the images, with or without guidance; no likelihood is needed.

    Args:
        beta: how far the implicit policies are from the old one; above 0.
        most: A_max, at which advantages are clipped; above 0.
        kl: weight of the distance to the reference; at least 0.
        levels: at which images are noised: 'objective', drawn as in pretraining; or 'sampler',
            those that the sampler steps through, as in the authors' code.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        most: float = 5.0,
        kl: float = 1e-4,
        levels: Levels = "objective",
    ) -> None:
        self.beta = number("algorithm.beta", beta, above=0)
        self.most = number("algorithm.most", most, above=0)
        self.kl = number("algorithm.kl", kl, 0)
        one_of("algorithm.levels", levels, get_args(Levels))
        self.levels: Levels = levels

    @property
    def forward_passes(self) -> float:
        return 5.0 if self.kl else 4.0

    def select(self, rollouts: Rollouts) -> Tensor:
        """All images: those of a group without differences hold the policy where it is."""
        return every_row(rollouts)

    def __call__(self, models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw) -> Result:
        rows = chosen[:, 0]
        x_0 = rollouts.x_0[rows].to(draw.t.device)
        r = (rollouts.advantages(self.most)[rows] / (2 * self.most) + 0.5).to(x_0.device)
        objective = models.policy.pipe.objective
        v, old = wide(models.policy.output(x_0, draw)), wide(models.old.output(x_0, draw))
        better = (1 - self.beta) * old + self.beta * v
        worse = (1 + self.beta) * old - self.beta * v
        target = objective.target(x_0, draw)
        scale = objective.error_of_data(draw.t)
        losses = (
            self.most
            / self.beta
            * (
                r * normalized_error(better - target, scale)
                + (1 - r) * normalized_error(worse - target, scale)
            )
        )
        reference = models.reference.output(x_0, draw) if self.kl else v.detach()
        distance = squared_error(v, reference)
        figures = {
            "distance_to_reference": distance,
            "distance_to_old": squared_error(v, old),
            "reference_norm_ratio": wide(v).norm() / wide(reference).norm(),
        }
        return Result(losses + self.kl * distance, figures)


def normalized_error(error: Tensor, scale: Tensor) -> Tensor:
    """|e|^2 / mean |e| of the error e = scale * error of the clean image, mean over values, (b,).

    Args:
        error: of the network's output (b, c, h, w).
        scale: of each sample, (b,).
    """
    error = like(scale, error) * error
    size = error.detach().abs().double().flatten(1).mean(1).clamp(min=1e-5)
    return error.square().flatten(1).mean(1) / size.to(error.dtype)
