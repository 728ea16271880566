"""Finetuning on the best of n: the baseline that every algorithm must beat at equal compute."""

from torch import Tensor

from mmdit.alignment.algorithm import Levels, Result
from mmdit.alignment.models import Models
from mmdit.alignment.rollouts import Rollouts, best_and_worst
from mmdit.flow.objective import Draw, squared_error


class BestOfN:
    """The flow loss |v - u|^2 on the images with the greatest reward of their group.

    Groups whose rewards do not differ are left out: nothing in them is better than the rest.
    """

    levels: Levels = "objective"
    forward_passes = 3.0

    def select(self, rollouts: Rollouts) -> Tensor:
        """The best images of each group whose rewards differ, one column."""
        return best_and_worst(rollouts)[:, :1].unique(dim=0)

    def __call__(self, models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw) -> Result:
        x_0 = rollouts.x_0[chosen[:, 0]].to(draw.t.device)
        output = models.policy.output(x_0, draw)
        return Result(squared_error(output, models.policy.pipe.objective.target(x_0, draw)), {})
