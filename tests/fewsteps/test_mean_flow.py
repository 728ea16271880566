"""MeanFlow: the identity holds for averages; where nothing is averaged, the loss is the flow's."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdit
from mmdit.engine.activations import recompute
from mmdit.errors import UserError
from mmdit.fewsteps import MeanFlow
from mmdit.fewsteps.mean_flow import IntervalDraw, average_target
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.flow.objective import Draw, Objective
from mmdit.flow.paths import Cosine, RectifiedFlow
from mmdit.flow.predictions import Epsilon, Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import LogitNormal
from mmdit.keys import generator_for
from mmdit.models.interval import with_intervals
from mmdit.pipeline import NetworkVelocity

DEVIATION = 0.4  # of the data


def deviation(t: Tensor) -> Tensor:
    """Standard deviation of z_t for Gaussian data."""
    return ((1 - t) ** 2 * DEVIATION**2 + t**2).sqrt()


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """The optimal velocity, z_t d log deviation(t) / dt."""
    return z * ((t - (1 - t) * DEVIATION**2) / deviation(t) ** 2)[:, None]


def average(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The exact average velocity: trajectories keep z_t / deviation(t)."""
    return z * ((1 - deviation(r) / deviation(t)) / (t - r))[:, None]


def points(n: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(2, n, generator=generator, dtype=torch.float64).sort(0).values
    r, t = 0.98 * times[0], 0.02 + 0.98 * times[1]
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return z, r, t


def test_the_exact_average_obeys_the_identity() -> None:
    z, r, t = points()
    target = average_target(average, z, r, t, velocity(z, t))
    torch.testing.assert_close(target, average(z, r, t), rtol=1e-9, atol=1e-9)
    wrong = average_target(lambda z, r, t: velocity(z, t), z, r, t, velocity(z, t))
    assert (wrong - velocity(z, t)).abs().max() > 0.1


def test_the_derivative_equals_central_differences() -> None:
    z, r, t = points()
    v, h = velocity(z, t), 1e-5

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (z * z).sin() * (3 * t - r).exp()[:, None]

    slope = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
    expected = v - (t - r)[:, None] * slope
    torch.testing.assert_close(average_target(u, z, r, t, v), expected, rtol=1e-6, atol=1e-6)


def objective(**changes) -> Objective:
    parts = {"path": RectifiedFlow(), "prediction": Velocity(), "timesteps": LogitNormal()}
    return Objective(**{**parts, "shift": Shift(alpha=3.0), **changes})


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published).requires_grad_(False)


def batch(pipe: mmdit.Pipeline, n: int = 4) -> tuple[Tensor, Condition]:
    shape = (n, pipe.mmdit.latent_channels, 8, 8)
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x_0, pipe.encode(["a red cat", "two dogs", "", "a ball"][:n])


def drawn(method: MeanFlow, pipe: mmdit.Pipeline, n: int = 4) -> IntervalDraw:
    shape = (pipe.mmdit.latent_channels, 8, 8)
    return method.draw(objective(), shape, [generator_for(0, i) for i in range(n)])


def test_without_intervals_the_loss_is_the_flows(pipe) -> None:
    method = MeanFlow(share=0, teacher=False, power=0)
    x_0, condition = batch(pipe)
    draw = drawn(method, pipe)
    student = with_intervals(pipe.mmdit)
    with torch.no_grad():
        losses = method.loss(objective(), None, student, x_0, condition, draw).losses
        flow = objective()(pipe.mmdit, x_0, condition, Draw(draw.t, draw.epsilon))
        assert torch.equal(losses, flow)
        weighted = MeanFlow(share=0, teacher=False, power=0.5, offset=0.1)
        losses = weighted.loss(objective(), None, student, x_0, condition, draw).losses
    torch.testing.assert_close(losses, flow / (flow + 0.1) ** 0.5)


def test_a_new_student_has_nothing_to_learn_from_an_unguided_teacher_but_averages(pipe) -> None:
    method = MeanFlow(share=0.5, guidance=1.0, power=0)
    x_0, condition = batch(pipe)
    t, epsilon, _ = drawn(method, pipe)
    draw = IntervalDraw(t, epsilon, torch.tensor([0.5, 1.0, 0.1, 1.0]) * t)
    student = with_intervals(pipe.mmdit)
    teacher = Teacher(copy.deepcopy(student), pipe.encode([""]), 1.0)
    with torch.no_grad():
        losses = method.loss(objective(), teacher, student, x_0, condition, draw).losses
    assert losses[[1, 3]].max() == 0 < losses[[0, 2]].min()


def test_targets_are_constants(pipe) -> None:
    """The gradient is that of |u - target|^2 / weight with both held fixed."""
    method = MeanFlow(share=1.0, guidance=2.0, power=1.0, offset=0.01)
    x_0, condition = batch(pipe)
    t, epsilon, r = drawn(method, pipe)
    assert (r < t).all()
    student = with_intervals(pipe.mmdit)
    teacher = Teacher(copy.deepcopy(student), pipe.encode([""]), 2.0)
    student.requires_grad_(True)
    weights = list(student.parameters())
    draw = IntervalDraw(t, epsilon, r)
    losses = method.loss(objective(), teacher, student, x_0, condition, draw).losses
    found = torch.autograd.grad(losses.sum(), weights, allow_unused=True)

    z = RectifiedFlow().interpolate(x_0, epsilon, t)
    named = {"c_vec": condition.c_vec, "c_ctxt": condition.c_ctxt}
    v = teacher.velocity(z, t, condition)
    target = average_target(lambda z, r, t: student(z, t=t, r=r, **named), z, r, t, v)
    error = (student(z, t=t, r=r, **named) - target).square().flatten(1).mean(1)
    fixed = error / (error.detach() + 0.01)
    expected = torch.autograd.grad(fixed.sum(), weights, allow_unused=True)
    torch.testing.assert_close(losses, fixed, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_is_guided_as_in_sampling(pipe, scale: float) -> None:
    x_0, condition = batch(pipe)
    teacher = Teacher(pipe.mmdit, pipe.encode([""]), scale)
    guidance = ClassifierFreeGuidance(scale=scale)
    velocity = NetworkVelocity(pipe.mmdit, pipe.objective)
    with torch.no_grad():
        negative = pipe.encode([""] * 4) if guidance.reads_negative else None
        expected = guidance(velocity, condition, negative, torch.tensor([1.0, 0.0]), 1)(x_0, 0.7)
    found = teacher.velocity(x_0, torch.full((4,), 0.7), condition)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_copied_teacher_stays_where_blocks_recompute_activations(pipe) -> None:
    x_0, condition = batch(pipe)
    pipe.requires_grad_(True)
    recompute(pipe, "full")
    teacher = Teacher(copy.deepcopy(pipe.mmdit), condition, 1.0)
    t = torch.full((4,), 0.7)
    before = teacher.velocity(x_0, t, condition)
    with torch.no_grad():
        for weight in pipe.mmdit.parameters():
            weight.mul_(2)
    assert torch.equal(teacher.velocity(x_0, t, condition), before)


def test_intervals_follow_the_sample(pipe) -> None:
    method = MeanFlow(share=0.25)
    whole = drawn(method, pipe, 2000)
    apart = whole.r < whole.t
    assert (whole.r <= whole.t).all() and whole.r.min() > 0 and whole.t.max() <= 1
    assert abs(apart.double().mean().item() - 0.25) < 0.04
    some = method.draw(objective(), (16, 8, 8), [generator_for(0, i) for i in range(5, 9)])
    assert all(torch.equal(part[5:9], own) for part, own in zip(whole, some, strict=True))
    # A single time of each pair has the density of the objective.
    shuffled = torch.where(torch.arange(2000) % 2 == 0, whole.t, whole.r)[apart]
    alone = whole.t[~apart]
    assert abs(shuffled.median() - alone.median()) < 0.06


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", -0.1),
        ("share", 1.5),
        ("share", "half"),
        ("power", -1),
        ("offset", 0),
        ("teacher", 1),
        ("guidance", float("nan")),
        ("steps", 0),
        ("teacher_steps", 2.5),
    ],
)
def test_bad_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"student\.{key}="):
        MeanFlow(**{key: value})


def test_other_paths_are_refused(pipe) -> None:
    MeanFlow().check(pipe)
    for other in (
        objective(path=Cosine(), prediction=Epsilon()),
        objective(prediction=Epsilon()),
    ):
        pipe.objective = other
        with pytest.raises(UserError, match=r"velocity of the straight path.*student=reflow"):
            MeanFlow().check(pipe)
