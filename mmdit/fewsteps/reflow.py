"""Reflow (Liu et al. 2022): straighten the teacher's trajectories by training on their two ends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit.fewsteps.student import Lesson, MadePairs, check_text_alone, checked, made_pairs
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Draw, Model, Objective
from mmdit.models.backbone import Backbone
from mmdit.pipeline import Pipeline


class Reflow:
    """Trains the flow's own loss on pairs of noise and of what the teacher makes of it.

    Each pair (epsilon, x_0) is the start and the end of a guided trajectory of the teacher. On
    E |v(z_t, t) - (epsilon - x_0)|^2 with z_t = (1 - t) x_0 + t epsilon (Eq. 1), trajectories no
    longer cross as much, so they become straighter, and long steps more accurate. The network is
    the teacher's, without anything new.

    Args:
        pairs: number of them; made first, and kept in `runs/pairs-<hash>`.
        teacher_steps: of the solver that makes them; None is the teacher's default.
        guidance: scale of the teacher; None is its default.
        seed: pair i starts from noise that is keyed by (seed, i).
        batch_size: pairs made at a time.
        steps: that the student samples with by default.

    Raises:
        UserError: a value is out of range.
    """

    taught = False  # the pairs are all that it learns from
    not_whole: str | None = None
    not_adapter: str | None = None

    def __init__(
        self,
        *,
        pairs: int = 4000,
        teacher_steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        steps: int = 2,
    ) -> None:
        self.pairs: MadePairs | None = made_pairs(pairs, seed, batch_size)
        self.teacher_steps, self.guidance, self.steps = teacher_steps, guidance, steps
        checked(self)

    def check(self, teacher: Pipeline) -> None:
        """Raise UserError if the teacher's network reads more than text and a time."""
        check_text_alone("reflow", teacher)

    def network(self, teacher: Backbone) -> Backbone:
        """The teacher's own."""
        return teacher

    def opponent(self, teacher: Backbone) -> None:
        """Nothing."""

    def draw(
        self, objective: Objective, shape: Sequence[int], generators: Sequence[torch.Generator]
    ) -> Draw:
        """t, as the objective draws it; its noise is not used, as each pair has its own."""
        return objective.draw(shape, generators)

    def loss(
        self,
        objective: Objective,
        teacher: Teacher | None,
        model: Model,
        x: Tensor,
        condition: Condition,
        draw: Draw,
    ) -> Lesson:
        x_0, epsilon = x.unbind(1)  # as `Pairs` holds them
        return Lesson(objective(model, x_0, condition, Draw(draw.t, epsilon)), {})

    def forwards(self) -> float:
        """Forward and backward."""
        return 3.0
