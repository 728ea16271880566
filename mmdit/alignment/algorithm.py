"""What an algorithm of post-training is: which images of a round it reads, and one loss."""

from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from mmdit.alignment.models import Models
from mmdit.alignment.rollouts import Rollouts
from mmdit.flow.objective import Draw


class Result(NamedTuple):
    """The losses of a batch (b,), and what is logged of it: each a mean, or one value a sample."""

    losses: Tensor
    figures: dict[str, Tensor]


Levels: TypeAlias = Literal["objective", "sampler"]


class Algorithm(Protocol):
    """A loss on the images of a round."""

    @property
    def levels(self) -> Levels:
        """The noise levels of its draws: those of pretraining, or the sampler's own steps."""

    @property
    def forward_passes(self) -> float:
        """What a training sample costs, in forward passes; one with its gradient counts as 3."""

    def select(self, rollouts: Rollouts) -> Tensor:
        """What a round is trained on, int64 (k, r): r numbers for each of k training samples.

        The first is a row of the rollouts; what further ones mean is for the algorithm to say.
        """

    def __call__(self, models: Models, rollouts: Rollouts, chosen: Tensor, draw: Draw) -> Result:
        """The losses of a batch.

        Args:
            models: with the conditions of the images in the first column of `chosen`.
            rollouts: of the round, on the CPU.
            chosen: rows of `select`, (b, r), on the CPU.
            draw: t and epsilon for each, on the device of the models.
        """


def every_row(rollouts: Rollouts) -> Tensor:
    """All images of a round, one column: what `Algorithm.select` may return."""
    return torch.arange(len(rollouts.x_0))[:, None]


def informative_rows(rollouts: Rollouts) -> Tensor:
    """The images of groups whose rewards differ, one column; all where there are none."""
    rows = torch.nonzero(rollouts.informative)
    return rows if len(rows) else every_row(rollouts)
