import math

import pytest
import torch
from torch import Tensor

from mmdit.flow.condition import Condition
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.flow.solvers import dpmpp_2m, euler, heun, midpoint
from mmdit.metrics.path_length import MeasuredGuidance, MeasuredVelocity

GRID = torch.tensor([1.0, 0.7, 0.35, 0.1, 0.0], dtype=torch.float64)


def noise(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", [euler, heun, midpoint, dpmpp_2m])
def test_a_constant_velocity_has_its_norm_as_length(solver):
    v = noise()
    measured = MeasuredVelocity(lambda z, t: v, GRID)
    solver(measured, noise(1), GRID)
    expected = v.flatten(1).norm(dim=1)
    torch.testing.assert_close(measured.lengths().double(), expected, rtol=1e-6, atol=0)


def test_with_euler_it_is_the_distance_travelled_step_by_step():
    def velocity(z: Tensor, t: float) -> Tensor:
        return torch.sin(5 * z) + t

    measured, z, distance = MeasuredVelocity(velocity, GRID), noise(), torch.zeros(3).double()
    states = [z]
    for i in range(len(GRID) - 1):
        states.append(euler(velocity, states[-1], GRID[i : i + 2]))
        distance += (states[-1] - states[-2]).flatten(1).norm(dim=1)
    end = euler(measured, z, GRID)
    assert torch.equal(end, states[-1])
    torch.testing.assert_close(measured.lengths().double(), distance, rtol=1e-6, atol=0)


def test_a_rotation_has_the_length_of_its_arc():
    """dz/dt turns z by a right angle: a quarter of the circle for t from 1 to 0."""

    def velocity(z: Tensor, t: float) -> Tensor:
        x, y = z.unbind(1)
        return math.pi / 2 * torch.stack([-y, x], dim=1)

    z = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    grid = torch.linspace(1, 0, 401, dtype=torch.float64)
    for solver in (heun, midpoint):
        measured = MeasuredVelocity(velocity, grid)
        solver(measured, z, grid)
        assert measured.lengths().item() == pytest.approx(math.pi, rel=1e-4)


def test_of_several_questions_at_one_time_the_last_counts():
    measured = MeasuredVelocity(lambda z, t: z, torch.tensor([1.0, 0.0]))
    measured(torch.full((1, 4), 100.0), 1.0)
    measured(torch.full((1, 4), 3.0), 1.0)
    measured(torch.full((1, 4), 100.0), 0.5)
    measured(torch.full((1, 4), 100.0), 0.0)
    assert measured.lengths().item() == 6.0


def test_a_path_that_was_not_followed_to_its_end_has_no_length():
    measured = MeasuredVelocity(lambda z, t: z, GRID)
    euler(measured, noise(), GRID[:3])
    with pytest.raises(ValueError, match="2 of 4 steps"):
        measured.lengths()


class Constant:
    """The same velocity for each image and condition: its pooled text."""

    def __call__(self, z: Tensor, t: float, condition: Condition) -> Tensor:
        return condition.c_vec[:, :, None, None].expand_as(z)

    def skipping(self, layers: object) -> "Constant":
        return self


def test_guided_paths_are_those_of_the_inner_guidance():
    """v = 1 + 3 (2 - 1) = 4 in each of 16 values."""
    positive = Condition(torch.full((3, 4), 2.0), torch.zeros(3, 1, 1))
    negative = Condition(torch.full((3, 4), 1.0), torch.zeros(3, 1, 1))
    guidance = MeasuredGuidance(inner=ClassifierFreeGuidance(scale=3.0))
    for batch in (slice(0, 2), slice(2, 3)):
        pair = [side.map(lambda part, batch=batch: part[batch]) for side in (positive, negative)]
        end = euler(guidance(Constant(), *pair, GRID, 4), noise()[batch], GRID)
        torch.testing.assert_close(end, noise()[batch] - 4)
    assert guidance.lengths().tolist() == pytest.approx([16.0] * 3, rel=1e-6)
