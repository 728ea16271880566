"""What every way to train a student of few steps has to say."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmdit.checks import MOST_STEPS, number, seed_number, whole_number
from mmdit.errors import UserError
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Model, Objective
from mmdit.models.backbone import Backbone
from mmdit.models.interval import IntervalMMDiT
from mmdit.pipeline import Pipeline


class Lesson(NamedTuple):
    """The losses of a batch (b,), and what is logged of it: each a mean, or one value a sample."""

    losses: Tensor
    figures: dict[str, Tensor]


class MadePairs(NamedTuple):
    """Pairs of noise and of what the teacher makes of it, which are made first."""

    number: int
    seed: int  # pair i starts from noise that is keyed by (seed, i)
    batch_size: int  # pairs made at a time


class Opposed(NamedTuple):
    """What is trained beside a student, to tell it from the teacher."""

    module: nn.Module
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


class Student(Protocol):
    """A way to train a network that samples in few steps, without guidance.

    Attributes:
        steps: number of solver steps that the student samples with by default.
        guidance, teacher_steps: how the teacher samples; None is its default.
        taught: whether the loss needs the teacher, of which a copy is then kept.
        pairs: what it learns from instead of the latents of images, if anything.
        not_whole: why its blocks can be neither compiled nor sharded; None if they can.
        not_adapter: what an adapter of the teacher cannot hold of the student; None if it can.
    """

    steps: int
    guidance: float | None
    teacher_steps: int | None
    taught: bool
    pairs: MadePairs | None
    not_whole: str | None
    not_adapter: str | None

    def check(self, teacher: Pipeline) -> None:
        """Raise UserError if this model cannot be the teacher."""

    def network(self, teacher: Backbone) -> Backbone:
        """The network that is trained, which at first computes what the teacher's does."""

    def opponent(self, teacher: Backbone) -> Opposed | None:
        """What is trained beside the student, if anything."""

    def draw(
        self, objective: Objective, shape: Sequence[int], generators: Sequence[torch.Generator]
    ) -> Any:
        """What chance decides about a batch: a `Draw`, or one with more fields."""

    def loss(
        self,
        objective: Objective,
        teacher: Teacher | None,
        model: Model,
        x: Tensor,
        condition: Condition,
        draw: Any,
    ) -> Lesson:
        """Losses of a batch of what the source of latents holds, at least float32."""

    def forwards(self) -> float:
        """Evaluations of the network that a step costs per sample; a backward pass counts two."""


def check_text_alone(name: str, teacher: Pipeline) -> None:
    """Check that a teacher makes images of captions by the velocity at the start of a step.

    Raises:
        UserError: its network reads more than text, or the end of a step, as after MeanFlow.
    """
    if teacher.mmdit.reads:
        reads = ", ".join(sorted(teacher.mmdit.reads))
        raise UserError(
            f"student={name} makes images of captions alone, but the teacher reads {reads}, too"
        )
    if isinstance(teacher.mmdit, IntervalMMDiT):
        raise UserError(
            f"student={name} cannot be taught by a student of MeanFlow, whose network also reads "
            "where a step ends: choose student=mean_flow, or the teacher that it had"
        )


def checked(student: Student) -> None:
    """Raise UserError, naming the key, if a value that all students have is invalid."""
    whole_number("student.steps", student.steps, most=MOST_STEPS)
    if student.teacher_steps is not None:
        whole_number("student.teacher_steps", student.teacher_steps, most=MOST_STEPS)
    if student.guidance is not None:
        number("student.guidance", student.guidance)


def made_pairs(number: int, seed: int, batch_size: int) -> MadePairs:
    """The pairs that a student asks for.

    Raises:
        UserError: a value is out of range; the message names its key.
    """
    whole_number("student.pairs", number)
    whole_number("student.batch_size", batch_size)
    return MadePairs(number, seed_number("student.seed", seed), batch_size)
