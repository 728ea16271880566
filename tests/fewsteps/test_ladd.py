"""LADD: each side of the contest descends its own loss, and the teacher stays as it is."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdit
from mmdit.engine import adamw
from mmdit.errors import UserError
from mmdit.fewsteps import LADD
from mmdit.fewsteps.heads import Heads
from mmdit.fewsteps.ladd import AdversarialDraw
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.keys import generator_for
from mmdit.models.dit import DiT
from mmdit.models.mmdit import MMDiT

OPTIMIZER = functools.partial(adamw, lr=1e-3)


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published).requires_grad_(False)


def method(**changes) -> LADD:
    return LADD(**{"optimizer": OPTIMIZER, "channels": 8, **changes})


class Contest:
    """A student, its teacher with heads, and a batch."""

    def __init__(self, pipe: mmdit.Pipeline) -> None:
        self.method, self.pipe = method(), pipe
        torch.manual_seed(0)
        heads = self.method.opponent(pipe.mmdit).module
        assert isinstance(heads, Heads)
        self.heads = heads
        network = copy.deepcopy(pipe.mmdit)
        self.teacher = Teacher(network, pipe.encode([""]), 1.0, self.heads)
        self.student = pipe.mmdit.requires_grad_(True)
        shape = (pipe.mmdit.latent_channels, 8, 8)
        generators = [generator_for(0, i) for i in range(2)]
        self.draw: AdversarialDraw = self.method.draw(pipe.objective, shape, generators)
        self.x = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
        self.condition: Condition = pipe.encode(["a red cat", "two dogs"])

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        objective, method = self.pipe.objective, self.method
        return method.loss(objective, self.teacher, self.student, self.x, self.condition, self.draw)


def gradients(loss: Tensor, weights: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))


def test_each_side_descends_its_own_loss_alone(pipe) -> None:
    contest = Contest(pipe)
    losses, figures = contest.loss()
    total = losses.sum()
    own = {
        "loss_of_heads": list(contest.heads.parameters()),
        "loss_of_student": list(contest.student.parameters()),
    }
    for name, weights in own.items():
        found, alone = gradients(total, weights), gradients(figures[name].sum(), weights)
        assert any(grad is not None and grad.abs().max() > 0 for grad in found)
        for one, other in zip(found, alone, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    others = gradients(figures["loss_of_heads"].sum(), own["loss_of_student"])
    assert all(grad is None for grad in others)
    others = gradients(figures["loss_of_student"].sum(), own["loss_of_heads"])
    assert all(grad is None for grad in others)


def test_the_students_gradient_equals_finite_differences(pipe) -> None:
    contest = Contest(pipe)
    pipe.mmdit.double()
    contest.teacher.network.double()
    contest.heads.double()
    pipe.mmdit.compute_dtype = contest.teacher.network.compute_dtype = torch.float64
    contest.x, contest.draw = contest.x.double(), AdversarialDraw(*map(Tensor.double, contest.draw))
    contest.condition = contest.condition.map(Tensor.double)
    weight = contest.student.output.linear.bias
    (found,) = torch.autograd.grad(contest.loss()[1]["loss_of_student"].sum(), [weight])
    h, slopes = 1e-5, torch.empty(3, dtype=torch.float64)
    for i in range(3):
        sides = []
        for step in (h, -h):
            with torch.no_grad():
                weight[i] += step
                sides.append(contest.loss()[1]["loss_of_student"].sum())
                weight[i] -= step
        slopes[i] = (sides[0] - sides[1]) / (2 * h)
    assert slopes.abs().max() > 1e-4
    torch.testing.assert_close(found[:3], slopes, rtol=1e-4, atol=1e-8)


def test_the_teacher_is_read_and_not_changed(pipe) -> None:
    contest = Contest(pipe)
    before = {name: weight.clone() for name, weight in contest.teacher.network.state_dict().items()}
    losses, _ = contest.loss()
    losses.sum().backward()
    for name, weight in contest.teacher.network.named_parameters():
        assert weight.grad is None and torch.equal(weight, before[name])
    z, t = contest.x[:, 0], torch.tensor([0.3, 0.9])
    tokens, y, rows = contest.teacher.features(pipe.objective, z, t, contest.condition)
    assert len(tokens) == len(pipe.mmdit.layers) and rows == 8 // pipe.mmdit.patch_size
    assert {part.shape for part in tokens} == {(2, rows * rows, pipe.mmdit.width)}
    network = contest.teacher.network
    time = pipe.objective.prediction.inputs(pipe.objective.path, z, t)[1]
    torch.testing.assert_close(y, network.vector(time, contest.condition.c_vec))
    predicted = network.prediction(tokens[-1], y, 8, 8)
    c_vec, c_ctxt, _ = contest.condition
    torch.testing.assert_close(predicted, network(z, time, c_vec, c_ctxt))
    assert not any(layer._forward_hooks for layer in network.layers)


def test_the_student_starts_at_the_levels_that_it_samples_with(pipe) -> None:
    shape, generators = (16, 8, 8), [generator_for(0, i) for i in range(400)]
    draw = method(steps=3).draw(pipe.objective, shape, generators)
    levels, counts = draw.t.unique(return_counts=True)
    expected = pipe.objective.times(3)[:-1].float().sort().values
    torch.testing.assert_close(levels, expected)
    assert counts.min() > 100
    assert not torch.equal(draw.epsilon, draw.noise)
    some = method(steps=3).draw(pipe.objective, shape, generators=[generator_for(0, 7)])
    assert all(torch.equal(part[7:8], own) for part, own in zip(draw, some, strict=True))


def test_heads_see_what_the_condition_asks_for() -> None:
    torch.manual_seed(0)
    heads = Heads(MMDiT(depth=2, width=16, num_heads=2, position_size=4), 8)
    features, y = [torch.randn(3, 8, 16) for _ in range(2)], torch.randn(3, 16)
    scores = heads(features, y, 2)
    assert scores.shape == (3, 2 * 8)
    assert not torch.allclose(scores, heads(features, y.roll(1, 0), 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [("pairs", 0), ("channels", 0), ("seed", -1), ("steps", 0), ("guidance", "much")],
)
def test_bad_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"student\.{key}="):
        method(**{key: value})


def test_other_networks_are_refused(pipe) -> None:
    method().check(pipe)
    pipe.mmdit = DiT(depth=1, width=16, num_heads=2)
    with pytest.raises(UserError, match="teacher is a DiT: choose student=reflow"):
        method().check(pipe)
