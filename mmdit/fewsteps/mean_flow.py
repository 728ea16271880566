"""MeanFlow (Geng et al. 2025): learn the average velocity over a step instead of its start's."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit.checks import flag, number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.fewsteps.student import Lesson, MadePairs, checked
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Model, Objective, squared_error
from mmdit.flow.paths import RectifiedFlow, like
from mmdit.flow.predictions import Velocity
from mmdit.models.backbone import Backbone
from mmdit.models.interval import IntervalMMDiT, with_intervals
from mmdit.pipeline import Pipeline


class IntervalDraw(NamedTuple):
    """The random numbers of a batch: as in `Draw`, and where each interval ends."""

    t: Tensor  # (b,)
    epsilon: Tensor  # (b, c, h, w)
    r: Tensor  # (b,), at most t


class MeanFlow:
    """Trains u(z_t, r, t), the average velocity between r and t, by the MeanFlow identity.

    Differentiating (t - r) u = int_r^t v ds by t gives u = v - (t - r) du/dt, where the total
    derivative du/dt = v du/dz + du/dt is one Jacobian-vector product (Eq. 6 to 8). The loss is
    w |u - sg(v - (t - r) du/dt)|^2, with w = 1 / (|error|^2 + c)^p constant (Eq. 9, 22). At r = t,
    for most samples, that is the flow's own loss.

    v is the guided velocity of the teacher, so the student needs no guidance; or epsilon - x_0, as
    the paper trains without a teacher.

    Args:
        share: of the samples with r < t, in [0, 1].
        teacher: whether v is the teacher's; otherwise it is that of the data.
        guidance: scale of the teacher; None is its default.
        teacher_steps: of the teacher, that evaluations compare with; None is its default.
        power, offset: p and c of the weight; p = 0 is none. The error is a mean over values.
        steps: that the student samples with by default.

    Raises:
        UserError: a value is out of range.
    """

    pairs: MadePairs | None = None  # it learns from the latents of images
    not_whole: str | None = "student=mean_flow differentiates the network forwards"
    not_adapter: str | None = "student=mean_flow has an embedding of its own"

    def __init__(
        self,
        *,
        share: float = 0.25,
        teacher: bool = True,
        guidance: float | None = None,
        teacher_steps: int | None = None,
        power: float = 1.0,
        offset: float = 1e-3,
        steps: int = 2,
    ) -> None:
        self.share = number("student.share", share, 0, 1)
        flag("student.teacher", teacher)
        self.power = number("student.power", power, 0)
        self.offset = number("student.offset", offset, above=0)
        self.taught, self.guidance = teacher, guidance
        self.teacher_steps, self.steps = teacher_steps, steps
        checked(self)

    def check(self, teacher: Pipeline) -> None:
        """Raise UserError unless the teacher predicts the velocity of the straight path."""
        objective = teacher.objective
        parts = type(objective.path), type(objective.prediction)
        if parts != (RectifiedFlow, Velocity):
            names = " and ".join(part.__name__ for part in parts)
            raise UserError(
                "student=mean_flow averages the velocity of the straight path (RectifiedFlow and "
                f"Velocity), but the teacher was trained with {names}: choose student=reflow"
            )

    def network(self, teacher: Backbone) -> IntervalMMDiT:
        """The teacher's network with an embedding of the interval, which changes nothing yet."""
        return with_intervals(teacher)

    def opponent(self, teacher: Backbone) -> None:
        """Nothing."""

    def draw(
        self, objective: Objective, shape: Sequence[int], generators: Sequence[torch.Generator]
    ) -> IntervalDraw:
        """t and r are two times of the objective's density, sorted; for most samples r = t."""
        t, epsilon = objective.draw(shape, generators)
        other = objective.draw_times(generators)
        apart = torch.cat([torch.rand(1, generator=g) for g in generators]) < self.share
        later = torch.where(apart, torch.maximum(t, other), t)
        return IntervalDraw(later, epsilon, torch.where(apart, torch.minimum(t, other), t))

    def loss(
        self,
        objective: Objective,
        teacher: Teacher | None,
        model: Model,
        x: Tensor,
        condition: Condition,
        draw: IntervalDraw,
    ) -> Lesson:
        t, epsilon, r = draw
        z = objective.path.interpolate(x, epsilon, t)
        v = epsilon - x if teacher is None else teacher.velocity(z, t, condition)
        target = v.clone()
        apart = (r < t).nonzero()[:, 0]
        if len(apart):
            some = condition.map(lambda part: part.to(z.device)[apart])

            def average(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
                output: Tensor = model(z, t, some.c_vec, some.c_ctxt, r=r, **some.extra)
                return output

            target[apart] = average_target(average, z[apart], r[apart], t[apart], v[apart])
        c_vec, c_ctxt, extra = condition
        error = squared_error(model(z, t, c_vec, c_ctxt, r=r, **extra), target)
        return Lesson(error / (error.detach() + self.offset) ** self.power, {})

    def forwards(self) -> float:
        """Forward and backward, twice the teacher, and two for each Jacobian-vector product."""
        guided = (1 if self.guidance == 1.0 else 2) if self.taught else 0
        return 3 + guided + 2 * self.share


@torch.no_grad()
def average_target(
    u: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, r: Tensor, t: Tensor, v: Tensor
) -> Tensor:
    """v - (t - r) (v du/dz + du/dt), what u(z, r, t) is where it is an average of v: like z.

    Args:
        u: a function of z, r, t.
        z: (b, ...).
        r, t: (b,).
        v: velocities at z and t, like z.
    """
    along = (v, torch.zeros_like(r), torch.ones_like(t))
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no forward derivative
        derivative: Tensor = torch.func.jvp(u, (z, r, t), along)[1]
    return v - like(t - r, z) * wide(derivative)
