"""LADD (Sauer et al. 2024): adversarial distillation in latents, behind SD3.5 Large Turbo."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmdit.checks import whole_number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.fewsteps.heads import Heads
from mmdit.fewsteps.student import Lesson, MadePairs, Opposed, check_text_alone, checked, made_pairs
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Model, Objective
from mmdit.flow.paths import RectifiedFlow, like
from mmdit.flow.timesteps import LogitNormal, TimestepDensity
from mmdit.models.backbone import Backbone
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline import Pipeline

STRAIGHT = RectifiedFlow()  # the path that sampling follows, whatever the teacher was trained on


class AdversarialDraw(NamedTuple):
    """The random numbers of a batch."""

    t: Tensor  # (b,), noise levels that the student starts a step from
    epsilon: Tensor  # (b, c, h, w), its noise
    level: Tensor  # (b,), at which images are judged
    noise: Tensor  # (b, c, h, w), of that


class LADD:
    """Trains a student to make images that heads on the frozen teacher take for the teacher's.

    The student denoises z_t, at the levels t that its own sampling goes through, in one step to
    x_hat = z_t - t v. Images of the teacher, made with guidance, and those of the student are then
    noised to a level of their own, and the teacher reads them. With D, the scores of the heads
    after each of its blocks, the losses are those of a hinge:

        heads     max(0, 1 - D(teacher's)) + max(0, 1 + D(x_hat))
        student   -D(x_hat)

    There is no distillation loss. One step updates both, from the same batch.

    Args:
        pairs, teacher_steps, guidance, seed, batch_size: of the teacher's images, as in `Reflow`.
        density: of the levels at which images are judged: much noise shows structure, little
            texture.
        channels: of each head.
        optimizer: of the heads.
        steps: number of solver steps that the student samples with by default.

    Raises:
        UserError: a value is out of range.
    """

    taught = True
    not_whole: str | None = "student=ladd reads the tokens after each block of its teacher"
    not_adapter: str | None = None

    def __init__(
        self,
        *,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        density: TimestepDensity | None = None,
        channels: int = 64,
        pairs: int = 4000,
        teacher_steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        steps: int = 2,
    ) -> None:
        self.optimizer = optimizer
        self.density = LogitNormal(m=1.0, s=1.0) if density is None else density
        self.channels = whole_number("student.channels", channels)
        self.pairs: MadePairs | None = made_pairs(pairs, seed, batch_size)
        self.teacher_steps, self.guidance, self.steps = teacher_steps, guidance, steps
        checked(self)

    def check(self, teacher: Pipeline) -> None:
        """Raise UserError unless the teacher is an `MMDiT` that reads text and a time alone."""
        if not isinstance(teacher.mmdit, MMDiT):
            raise UserError(
                "student=ladd judges images by the tokens after each block of an MMDiT, but the "
                f"teacher is a {type(teacher.mmdit).__name__}: choose student=reflow"
            )
        check_text_alone("ladd", teacher)

    def network(self, teacher: Backbone) -> Backbone:
        """The teacher's own."""
        return teacher

    def opponent(self, teacher: Backbone) -> Opposed:
        """The heads of the discriminator."""
        return Opposed(Heads(cast(MMDiT, teacher), self.channels), self.optimizer)

    def draw(
        self, objective: Objective, shape: Sequence[int], generators: Sequence[torch.Generator]
    ) -> AdversarialDraw:
        """t is a level of the student's own sampling, each as often as the others."""
        levels = objective.times(self.steps)[:-1].float()
        chosen = [torch.randint(len(levels), (1,), generator=g) for g in generators]
        epsilon = [torch.randn(*shape, generator=g) for g in generators]
        level = torch.cat([self.density.sample(1, g) for g in generators])
        noise = [torch.randn(*shape, generator=g) for g in generators]
        return AdversarialDraw(
            levels[torch.cat(chosen)], torch.stack(epsilon), level.float(), torch.stack(noise)
        )

    def loss(
        self,
        objective: Objective,
        teacher: Teacher | None,
        model: Model,
        x: Tensor,
        condition: Condition,
        draw: AdversarialDraw,
    ) -> Lesson:
        assert teacher is not None and isinstance(teacher.opponent, Heads)
        heads, x_0 = teacher.opponent, x[:, 0]  # as `Pairs` holds them
        z = STRAIGHT.interpolate(x_0, draw.epsilon, draw.t)
        x_hat = z - like(draw.t, z) * objective.velocity(model, z, draw.t, condition)

        def read(images: Tensor) -> tuple[list[Tensor], Tensor, int]:
            noised = STRAIGHT.interpolate(images, draw.noise, draw.level)
            return teacher.features(objective, noised, draw.level, condition)

        features, y, rows = read(x_hat)
        with torch.no_grad():
            true_features, *_ = read(x_0)
        fixed = {name: weight.detach() for name, weight in heads.named_parameters()}
        judged = wide(functional_call(heads, fixed, (features, y, rows)))
        true = wide(heads(true_features, y, rows))
        false = wide(heads([part.detach() for part in features], y, rows))
        hinge = ((1 - true).relu() + (1 + false).relu()).mean(1)
        deceit = -judged.mean(1)
        figures = {
            "loss_of_heads": hinge,
            "loss_of_student": deceit,
            "score_of_teacher": true.mean(1),
            "score_of_student": false.mean(1),
        }
        return Lesson(hinge + deceit, figures)

    def forwards(self) -> float:
        """Forward and backward of the student; the same of the teacher, without its weights; and
        a forward pass of the teacher on its own images.
        """
        return 3.0 + 2.0 + 1.0
